// A CUDA device as the bindings see it.
#pragma once
#include <memory>

#include "../concept_modulate/cuda.h"
#include "../concept_reason/cuda.h"
#include "../concept_sample/cuda.h"
#include "../cuda/convert.h"
#include "../vcr_middle/cuda.h"
#include "unpack.h"

#ifndef VCR_CUDA_KEY
#define VCR_CUDA_KEY CUDA
#endif

namespace vcr {

// What is said of a Status that is too_wide.
inline std::string too_wide_on(int32_t device) {
  return "vcr_ops: a concept has more channels than the shared memory of cuda:" + std::to_string(device) +
         " has room for; take more concepts, or backend='triton' or 'composite'";
}

// cuda.cpp has these four; a test has others, which run the kernels on the host.
bool is_there(const Tensor& t);  // where the kernels run
// Makes a device the current one until the guard goes.
using Guard = std::unique_ptr<void, void (*)(void*)>;
Guard enter(int32_t device);
// PyTorch's current stream of a device, a cudaStream_t.
void* current_stream(int32_t device);
// Throws what a user can act on, unless everything was launched.
void check(const cuda::Status& status, int32_t device);

// Makes its device the current one for as long as it lives, and launches on PyTorch's current stream there.
class Cuda {
 public:
  explicit Cuda(const Tensor& t) : place_(checked_place(t)), guard_(enter(place_.index)), stream_(current_stream(place_.index)) {}
  Place place() const { return place_; }
  bool has(const Tensor& t) const { return is_there(t) && place_of(t) == place_; }

  // f(T{}) with the feature type.
  template <class F>
  static auto dispatch(ScalarType type, F f) {
    switch (type) {
      case ScalarType::Float: return f(float{});
      case ScalarType::Double: return f(double{});
      case ScalarType::BFloat16: return f(bf16{});
      case ScalarType::Half: return f(f16{});
      default: throw std::invalid_argument("vcr_ops: features are float32, float64, bfloat16 or float16");
    }
  }
  // The result is filled by the next run() or finish(), all that have gathered in one launch. `t` is contiguous.
  Tensor converted(const Tensor& t, ScalarType type) {
    if (conversions_.size() == size_t(cuda::conversions_at_once)) finish();
    const auto size = t.sizes();
    Tensor to = new_contiguous(place_, size.data(), int64_t(size.size()), type);
    conversions_.push_back({t.const_data_ptr(), to.mutable_data_ptr(), t.numel(), number(t.scalar_type()), number(type)});
    held_.push_back(t);
    held_.push_back(to);
    return to;
  }
  void finish() {
    if (!conversions_.empty()) check(cuda::convert(conversions_.data(), int(conversions_.size()), stream_), place_.index);
    conversions_.clear();
    held_.clear();  // what is launched later on this stream finds the conversions done
  }
  // The kernels need no memory that they aren't asked to save.
  template <class A>
  class Scratch {
   public:
    Scratch(const Cuda&, int64_t) {}
    A* get() const { return nullptr; }
  };

  template <class T>
  void run(SampleForward<T>& args) {
    launch(cuda::sample_forward_workspace<T>, cuda::sample_forward<T>, args);
  }
  template <class T>
  void run(SampleBackward<T>& args) {
    launch(cuda::sample_backward_workspace<T>, cuda::sample_backward<T>, args);
  }
  template <class A>
  void run(ReasonForward<A>& args) {
    launch(cuda::reason_forward_workspace<A>, cuda::reason_forward<A>, args);
  }
  template <class A>
  void run(ReasonBackward<A>& args) {
    launch(cuda::reason_backward_workspace<A>, cuda::reason_backward<A>, args);
  }
  template <class T>
  void run(ModulateForward<T>& args) {
    launch(cuda::modulate_forward_workspace<T>, cuda::modulate_forward<T>, args);
  }
  template <class T>
  void run(ModulateBackward<T>& args) {
    launch(cuda::modulate_backward_workspace<T>, cuda::modulate_backward<T>, args);
  }
  template <class T>
  void run(MiddleForward<T>& args) {
    launch(cuda::middle_forward_workspace<T>, cuda::middle_forward<T>, args);
  }
  template <class T>
  void run(MiddleBackward<T>& args) {
    launch(cuda::middle_backward_workspace<T>, cuda::middle_backward<T>, args);
  }

 private:
  static Place checked_place(const Tensor& t) {
    require(is_there(t), "the CUDA kernels take CUDA tensors");
    return place_of(t);
  }
  static cuda::Number number(ScalarType type) {
    switch (type) {
      case ScalarType::Float: return cuda::Number::float32;
      case ScalarType::Double: return cuda::Number::float64;
      case ScalarType::BFloat16: return cuda::Number::bfloat16;
      case ScalarType::Half: return cuda::Number::float16;
      default: throw std::invalid_argument("vcr_ops: parameters are float32, float64, bfloat16 or float16");
    }
  }
  template <class Args>
  void launch(int64_t (*workspace)(const Args&), cuda::Status (*launcher)(const Args&, void*, void*), const Args& args) {
    finish();
    const int64_t bytes = workspace(args);
    Tensor memory = new_contiguous(place_, &bytes, 1, ScalarType::Byte);
    check(launcher(args, memory.mutable_data_ptr(), stream_), place_.index);
  }

  Place place_;
  Guard guard_;
  void* stream_;
  std::vector<cuda::Conversion> conversions_;
  std::vector<Tensor> held_;
};

}  // namespace vcr
