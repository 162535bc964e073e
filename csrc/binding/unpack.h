// From torch's tensors to pointers and strides, on any device: cpu.h and cuda.h have what differs. No arithmetic here; the checks guard
// memory only (users' errors are raised in Python, before the op).
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/dtypes.h"
#include "../common/problem.h"
#include "../common/variants.h"
#include "tensor.h"

namespace vcr {

inline void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("vcr_ops: ") + what);
}

template <class Enum, int count>
Enum variant(const char* const (&names)[count], const std::string& name, const char* what) {
  const int index = index_of(names, name.c_str());
  if (index < 0) throw std::invalid_argument("vcr_ops: unknown " + std::string(what) + " '" + name + "'");
  return Enum(index);
}

template <class A>
constexpr ScalarType scalar_type() {
  return sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
}

// A device as the C shim names it.
struct Place {
  int32_t type, index;
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};
inline Place place_of(const Tensor& t) {
  const int32_t type = t.device_type();
  return {type, type == shim_codes.cpu ? 0 : t.device_index()};
}

constexpr int64_t max_rank = 16;

// Sizes and strides of a (N, C p, *spatial) tensor with its spatial dimensions flattened.
struct MapShape {
  int64_t N = 0, channels = 0, S = 1;
  int64_t image = 0, channel = 0, position = 0;
  bool in_place = false;  // the kernels can walk it as it lies
  bool channels_last = false;
  bool dense = false;

  explicit MapShape(const Tensor& t) {
    const auto size = t.sizes(), stride = t.strides();
    const int64_t rank = int64_t(size.size());
    require(rank >= 3, "a feature map has at least three dimensions");
    N = size[0], channels = size[1], image = stride[0], channel = stride[1];
    bool flat = true;
    int64_t next = 0;  // the stride that the next outer dimension must have
    for (int64_t d = rank - 1; d >= 2; --d) {
      S *= size[d];
      if (size[d] == 1) continue;
      if (next == 0)
        position = stride[d], next = stride[d] * size[d];
      else if (stride[d] == next)
        next *= size[d];
      else
        flat = false;
    }
    if (N == 1) image = 0;
    if (S == 1) position = 1;
    if (channels == 1) channel = S;
    // an expanded (stride 0) or otherwise overlapping map is read through a copy
    if (flat && position == 1 && (channel >= S || S == 1)) {
      in_place = true;
      dense = channel == S && (N == 1 || image == channels * S);
    } else if (flat && channel == 1 && position >= channels) {
      in_place = channels_last = true;
      dense = position == channels && (N == 1 || image == channels * S);
    }
  }
};

inline Problem problem_of(const MapShape& y, const Tensor& value) {
  const auto size = value.sizes();
  require(size.size() == 3, "value is (C, p, pt)");
  require(size[0] * size[1] == y.channels, "y's channels differ from value's C * p");
  return {y.N, size[0], size[1], size[2], y.S};
}

inline Tensor dense_contiguous(const Tensor& t) { return Tensor(torch::stable::contiguous(t.stable())); }

// A new tensor, by the C shim that stable::new_empty would reach through the dispatcher's table of names (1 us each).
inline Tensor new_tensor(Place place, const int64_t* size, const int64_t* stride, int64_t rank, ScalarType type) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, size, stride, shim_codes.of(type), place.type, place.index, &handle));
  return Tensor(handle);
}
inline Tensor new_contiguous(Place place, const int64_t* size, int64_t rank, ScalarType type) {
  require(rank <= max_rank, "too many dimensions");
  int64_t stride[max_rank];
  for (int64_t d = rank - 1, next = 1; d >= 0; --d) {
    stride[d] = next;
    next *= size[d] > 1 ? size[d] : 1;
  }
  return new_tensor(place, size, stride, rank, type);
}

// A new map of `like`'s sizes and dtype, dense, channels_last where `shape` is.
inline Tensor new_map(const Tensor& like, const MapShape& shape) {
  const auto size = like.sizes();
  const int64_t rank = int64_t(size.size());
  const Place place = place_of(like);
  if (!shape.channels_last) return new_contiguous(place, size.data(), rank, like.scalar_type());
  require(rank <= max_rank, "too many dimensions");
  int64_t stride[max_rank];
  stride[1] = 1;
  int64_t next = shape.channels;
  for (int64_t d = rank - 1; d >= 2; --d) {
    stride[d] = next;
    next *= size[d] > 1 ? size[d] : 1;
  }
  stride[0] = next;
  return new_tensor(place, size.data(), stride, rank, like.scalar_type());
}

// A map to read: in place where the kernels can walk it, else through one dense copy.
class MapInput {
 public:
  explicit MapInput(const Tensor& t) : given_(t), shape_(t) {
    if (!shape_.in_place) {
      copy_ = dense_contiguous(t);
      shape_ = MapShape(*copy_);
    }
  }
  // In the format of `other`, which the result shares kernels with.
  MapInput(const Tensor& t, const MapInput& other, const char* name) : given_(t), shape_(t) {
    const auto same_as_map = [&](bool condition, const char* what) {
      if (!condition) throw std::invalid_argument("vcr_ops: " + std::string(name) + "'s " + what + " differs from the map's");
    };
    same_as_map(shape_.N == other.shape_.N && shape_.channels == other.shape_.channels && shape_.S == other.shape_.S, "size");
    same_as_map(t.scalar_type() == other.tensor().scalar_type(), "dtype");
    same_as_map(place_of(t) == place_of(other.tensor()), "device");
    const bool same = shape_.in_place && shape_.channels_last == other.shape_.channels_last;
    if (!same) {
      copy_ = new_map(other.tensor(), other.shape_);
      torch::stable::Tensor to = copy_->stable();
      torch::stable::copy_(to, t.stable());
      shape_ = MapShape(*copy_);
      if (shape_.channels_last != other.shape_.channels_last) {  // strides that both formats share
        shape_.channels_last = other.shape_.channels_last;
      }
    }
  }
  MapInput(const MapInput&) = delete;
  const Tensor& tensor() const { return copy_.has_value() ? *copy_ : given_; }
  const MapShape& shape() const { return shape_; }
  template <class T>
  Map<const T> map() const {
    return {static_cast<const T*>(tensor().const_data_ptr()), shape_.image, shape_.channel, shape_.position};
  }

 private:
  const Tensor& given_;  // the caller's
  OptionalTensor copy_;
  MapShape shape_;
};

template <class T>
Map<T> output_map(Tensor& t) {
  const MapShape shape(t);
  return {static_cast<T*>(t.mutable_data_ptr()), shape.image, shape.channel, shape.position};
}

// Parameters in accumulation type: as they lie where they have it already, converted otherwise. `Device` is Cpu or Cuda.
template <class A, class Device>
class Params {
 public:
  explicit Params(Device& device) : device_(device) {}
  // Parameters are refused that have neither the features' type nor float32.
  Params(Device& device, ScalarType features) : device_(device), features_(features) {}
  const A* operator()(const OptionalTensor& t, int64_t count, const char* name) {
    return t.has_value() ? (*this)(*t, count, name) : nullptr;
  }
  const A* operator()(const Tensor& t, int64_t count, const char* name) {
    require(t.numel() == count && device_.has(t), name);
    const ScalarType type = t.scalar_type();
    if (type == scalar_type<A>() && t.is_contiguous()) return static_cast<const A*>(t.const_data_ptr());
    require(features_ == ScalarType::Undefined || type == features_ || type == ScalarType::Float, name);
    return converted(t);
  }
  // Statistics may have any type that features may have.
  const A* statistic(const OptionalTensor& t, int64_t count, const char* name) {
    require(t.has_value() && t->numel() == count && device_.has(*t), name);
    if (t->scalar_type() == scalar_type<A>() && t->is_contiguous()) return static_cast<const A*>(t->const_data_ptr());
    Device::dispatch(t->scalar_type(), [](auto) {});  // refuses others
    return converted(*t);
  }

 private:
  const A* converted(const Tensor& t) {
    held_.push_back(device_.converted(dense_contiguous(t), scalar_type<A>()));
    return static_cast<const A*>(held_.back().const_data_ptr());
  }

  Device& device_;
  ScalarType features_ = ScalarType::Undefined;  // any type will do
  std::vector<Tensor> held_;
};

template <class A>
A* data(Tensor& t) {
  return static_cast<A*>(t.mutable_data_ptr());
}
template <class A>
Tensor new_small(Place place, std::initializer_list<int64_t> size) {
  return new_contiguous(place, size.begin(), int64_t(size.size()), scalar_type<A>());
}
// A gradient in accumulation type; 0 elements where the parameter is absent.
inline const Tensor* pointer(const Tensor& t) { return &t; }
inline const Tensor* pointer(const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; }
template <class A>
Tensor new_gradient(Place place, const Tensor* parameter) {
  if (parameter == nullptr) return new_small<A>(place, {0});
  const auto size = parameter->sizes();
  return new_contiguous(place, size.data(), int64_t(size.size()), scalar_type<A>());
}
template <class A, class Parameter>
Tensor new_gradient(Place place, const Parameter& parameter) {
  return new_gradient<A>(place, pointer(parameter));
}
// `gradient`, which has the accumulation type A, converted where its parameter has another.
template <class A, class Device>
void to_type_of(Device& device, const Tensor* parameter, Tensor& gradient) {
  if (parameter == nullptr) return;
  const ScalarType type = parameter->scalar_type();
  if (type != scalar_type<A>()) gradient = device.converted(gradient, type);
}
template <class A, class Device, class Parameter>
void to_type_of(Device& device, const Parameter& parameter, Tensor& gradient) {
  to_type_of<A>(device, pointer(parameter), gradient);
}

}  // namespace vcr
