// concept_modulate and its backward, from tensors to what the kernels take. Device: Cpu or Cuda.
#pragma once
#include "../binding/unpack.h"
#include "args.h"

namespace vcr {

// state (N, C, pt) gives C and pt; z's channels give p.
inline Problem problem_of_states(const MapShape& z, const Tensor& state) {
  require(state.dim() == 3, "state is (N, C, pt)");
  const int64_t C = state.size(1);
  require(state.size(0) == z.N && C > 0 && z.channels % C == 0, "state's images or concepts don't fit z");
  return {z.N, C, z.channels / C, state.size(2), z.S};
}

template <class A, class Device>
ModulatorWeights<A> unpack_weights(Params<A, Device>& get, const Problem& pr, const OptionalTensor& scale_weight,
                                   const OptionalTensor& shift_weight, const Tensor& scale_bias, const Tensor& shift_bias) {
  const int64_t weights = pr.channels() * pr.pt;
  return {get(scale_weight, weights, "scale_weight"), get(shift_weight, weights, "shift_weight"),
          get(scale_bias, pr.channels(), "scale_bias"), get(shift_bias, pr.channels(), "shift_bias")};
}

template <class Device>
Tensor modulate(const Tensor& z, const Tensor& state, const OptionalTensor& scale_weight, const OptionalTensor& shift_weight,
                const Tensor& scale_bias, const Tensor& shift_bias, const OptionalTensor& attention) {
  Device device(z);
  return Device::dispatch(z.scalar_type(), [&](auto type) -> Tensor {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(z);
    ModulateForward<T> f;
    f.problem = problem_of_states(map.shape(), state);
    const Problem& pr = f.problem;
    Params<A, Device> get(device);
    f.weights = unpack_weights(get, pr, scale_weight, shift_weight, scale_bias, shift_bias);
    f.state = get(state, pr.N * pr.C * pr.pt, "state");
    f.attention = get(attention, pr.N * pr.C * pr.S, "attention");
    Tensor out = new_map(map.tensor(), map.shape());
    f.z = map.template map<T>();
    f.out = output_map<T>(out);
    device.run(f);
    return out;
  });
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
Backward modulate_backward(const Tensor& grad_out, const Tensor& z, const Tensor& state, const OptionalTensor& scale_weight,
                           const OptionalTensor& shift_weight, const Tensor& scale_bias, const Tensor& shift_bias,
                           const OptionalTensor& attention) {
  Device device(z);
  return Device::dispatch(z.scalar_type(), [&](auto type) -> Backward {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(z), grad(grad_out, map, "grad_out");
    ModulateBackward<T> f;
    f.problem = problem_of_states(map.shape(), state);
    const Problem& pr = f.problem;
    Params<A, Device> get(device);
    f.weights = unpack_weights(get, pr, scale_weight, shift_weight, scale_bias, shift_bias);
    f.state = get(state, pr.N * pr.C * pr.pt, "state");
    f.attention = get(attention, pr.N * pr.C * pr.S, "attention");
    Tensor dz = new_map(map.tensor(), map.shape());
    Tensor dstate = new_gradient<A>(device.place(), state), dscale = new_gradient<A>(device.place(), scale_weight),
           dshift = new_gradient<A>(device.place(), shift_weight);
    Tensor dscale_bias = new_gradient<A>(device.place(), scale_bias), dshift_bias = new_gradient<A>(device.place(), shift_bias);
    Tensor dattention = new_gradient<A>(device.place(), attention);
    f.z = map.template map<T>();
    f.grad_out = grad.template map<T>();
    f.dz = output_map<T>(dz);
    f.dstate = data<A>(dstate);
    f.dscale_weight = scale_weight.has_value() ? data<A>(dscale) : nullptr;
    f.dshift_weight = shift_weight.has_value() ? data<A>(dshift) : nullptr;
    f.dscale_bias = data<A>(dscale_bias), f.dshift_bias = data<A>(dshift_bias);
    f.dattention = attention.has_value() ? data<A>(dattention) : nullptr;
    device.run(f);
    to_type_of<A>(device, state, dstate), to_type_of<A>(device, attention, dattention);
    to_type_of<A>(device, scale_weight, dscale), to_type_of<A>(device, shift_weight, dshift);
    to_type_of<A>(device, scale_bias, dscale_bias), to_type_of<A>(device, shift_bias, dshift_bias);
    device.finish();
    return {std::move(dz),          std::move(dstate),      std::move(dscale),    std::move(dshift),
            std::move(dscale_bias), std::move(dshift_bias), std::move(dattention)};
  });
}

}  // namespace vcr
