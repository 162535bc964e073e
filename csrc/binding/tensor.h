// Tensors, and functions of them as ops, straight on LibTorch's C shim: on the way to a small map's kernels there are dozens of tensors.
// (torch::stable::Tensor shares its handle, at an allocation and atomic counts each, and TORCH_BOX copies what is returned several
// times; it never frees the strings that it is given.)
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace vcr {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;

// The shim's numbers for what we take.
struct ShimCodes {
  int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(), bfloat16 = aoti_torch_dtype_bfloat16(),
          float16 = aoti_torch_dtype_float16(), uint8 = aoti_torch_dtype_uint8(), int64 = aoti_torch_dtype_int64();
  int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();

  int32_t of(ScalarType type) const {
    switch (type) {
      case ScalarType::Float: return float32;
      case ScalarType::Double: return float64;
      case ScalarType::BFloat16: return bfloat16;
      case ScalarType::Half: return float16;
      case ScalarType::Byte: return uint8;
      default: throw std::invalid_argument("vcr_ops: no kernel takes this dtype");
    }
  }
  ScalarType type(int32_t code) const {
    return code == float32    ? ScalarType::Float
           : code == float64  ? ScalarType::Double
           : code == bfloat16 ? ScalarType::BFloat16
           : code == float16  ? ScalarType::Half
                              : ScalarType::Undefined;
  }
};
inline const ShimCodes shim_codes;

// Owns a handle; a copy is one more handle of the same tensor.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  explicit Tensor(const torch::stable::Tensor& t) : handle_(another(t.get())) {}
  Tensor(const Tensor& other) : handle_(other.handle_ ? another(other.get()) : nullptr) {}
  Tensor(Tensor&&) noexcept = default;
  Tensor& operator=(const Tensor& other) { return *this = Tensor(other); }
  Tensor& operator=(Tensor&&) noexcept = default;

  AtenTensorHandle get() const { return handle_.get(); }
  AtenTensorHandle release() { return handle_.release(); }
  torch::stable::Tensor stable() const { return torch::stable::Tensor(another(get())); }

  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  IntHeaderOnlyArrayRef sizes() const { return {ask<int64_t*>(aoti_torch_get_sizes), size_t(dim())}; }
  IntHeaderOnlyArrayRef strides() const { return {ask<int64_t*>(aoti_torch_get_strides), size_t(dim())}; }
  int64_t size(int64_t d) const {
    int64_t found;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(get(), d, &found));
    return found;
  }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  ScalarType scalar_type() const { return shim_codes.type(ask<int32_t>(aoti_torch_get_dtype)); }  // Undefined: none that kernels take
  bool is_int64() const { return ask<int32_t>(aoti_torch_get_dtype) == shim_codes.int64; }
  int32_t device_type() const { return ask<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return ask<int32_t>(aoti_torch_get_device_index); }
  bool is_cpu() const { return device_type() == shim_codes.cpu; }
  bool is_cuda() const { return device_type() == shim_codes.cuda; }
  const void* const_data_ptr() const { return ask<const void*>(torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return ask<void*>(torch_get_mutable_data_ptr); }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  static AtenTensorHandle another(AtenTensorHandle handle) {
    AtenTensorHandle found;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &found));
    return found;
  }
  template <class Answer>
  Answer ask(AOTITorchError (*question)(AtenTensorHandle, Answer*)) const {
    Answer answer;
    STABLE_TORCH_ERROR_CODE_CHECK(question(get(), &answer));
    return answer;
  }

  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};
using OptionalTensor = std::optional<Tensor>;

// An op's argument, which is ours to free, and an op's result.
template <class T>
struct Argument {
  static_assert(std::is_same_v<T, bool> || std::is_same_v<T, int64_t> || std::is_same_v<T, double>);
  static T take(StableIValue value) { return torch::stable::detail::to<T>(value); }
};
template <>
struct Argument<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
};
template <>
struct Argument<OptionalTensor> {
  static OptionalTensor take(StableIValue value) {
    const std::unique_ptr<StableIValue> held(torch::stable::detail::to<StableIValue*>(value));
    if (held == nullptr) return std::nullopt;
    return Argument<Tensor>::take(*held);
  }
};
template <>
struct Argument<std::string> {
  static std::string take(StableIValue value) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    const std::unique_ptr<StringOpaque, void (*)(StringHandle)> held(handle, [](StringHandle h) { torch_delete_string(h); });
    size_t length;
    const char* text;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    return {text, length};
  }
};

template <class R, class... P, size_t... I>
void call_boxed(R (*function)(P...), StableIValue* stack, std::index_sequence<I...> /*of the arguments*/) {
  // braces: the arguments are taken in order, each before the next
  std::tuple<std::decay_t<P>...> arguments{Argument<std::decay_t<P>>::take(stack[I])...};
  const auto put = [stack](size_t i, Tensor& result) { stack[i] = torch::stable::detail::from(result.release()); };
  if constexpr (std::is_void_v<R>) {
    std::apply(function, arguments);
  } else if constexpr (std::is_same_v<R, bool>) {
    stack[0] = torch::stable::detail::from(std::apply(function, arguments));
  } else if constexpr (std::is_same_v<R, Tensor>) {
    Tensor result = std::apply(function, arguments);
    put(0, result);
  } else {
    R results = std::apply(function, arguments);
    size_t i = 0;
    std::apply([&](auto&... result) { (put(i++, result), ...); }, results);
  }
}
template <class R, class... P>
void call_boxed(R (*function)(P...), StableIValue* stack, uint64_t count) {
  STD_TORCH_CHECK(count == sizeof...(P), "vcr_ops: a schema has ", count, " arguments, and its kernel takes ", sizeof...(P));
  call_boxed(function, stack, std::index_sequence_for<P...>());
}
// What StableLibrary::impl takes for a function of tensors, strings and numbers that returns a tensor, a tuple of them, a bool
// or nothing.
template <auto function>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t) {
  call_boxed(function, stack, arguments);
}

}  // namespace vcr
