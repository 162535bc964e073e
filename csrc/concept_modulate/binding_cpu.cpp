// torch.ops.vcr_ops.concept_modulate and its backward: schemas and CPU kernels.
#include "../binding/unpack.h"
#include "../cpu/isa.h"
#include "args.h"

namespace vcr {
namespace {

// state (N, C, pt) gives C and pt; z's channels give p.
Problem problem_of_states(const MapShape& z, const Tensor& state) {
  require(state.dim() == 3, "state is (N, C, pt)");
  const int64_t C = state.size(1);
  require(state.size(0) == z.N && C > 0 && z.channels % C == 0, "state's images or concepts don't fit z");
  return {z.N, C, z.channels / C, state.size(2), z.S};
}

template <class A>
ModulatorWeights<A> unpack_weights(Params<A>& get, const Problem& pr, const OptionalTensor& scale_weight,
                                   const OptionalTensor& shift_weight, const Tensor& scale_bias, const Tensor& shift_bias) {
  const int64_t weights = pr.channels() * pr.pt;
  return {get(scale_weight, weights, "scale_weight"), get(shift_weight, weights, "shift_weight"),
          get(scale_bias, pr.channels(), "scale_bias"), get(shift_bias, pr.channels(), "shift_bias")};
}

Tensor modulate(const Tensor& z, const Tensor& state, const OptionalTensor& scale_weight, const OptionalTensor& shift_weight,
                const Tensor& scale_bias, const Tensor& shift_bias, const OptionalTensor& attention) {
  return dispatch(z, [&](auto type) -> Tensor {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(z);
    ModulateForward<T> f;
    f.problem = problem_of_states(map.shape(), state);
    const Problem& pr = f.problem;
    Params<A> get;
    f.weights = unpack_weights(get, pr, scale_weight, shift_weight, scale_bias, shift_bias);
    f.state = get(state, pr.N * pr.C * pr.pt, "state");
    f.attention = get(attention, pr.N * pr.C * pr.S, "attention");
    Tensor out = new_map(map.tensor(), map.shape());
    f.z = map.template map<T>();
    f.out = output_map<T>(out);
    f.pool = torch_pool();
    kernels<T>().modulate_forward(f);
    return out;
  });
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward modulate_backward(const Tensor& grad_out, const Tensor& z, const Tensor& state, const OptionalTensor& scale_weight,
                           const OptionalTensor& shift_weight, const Tensor& scale_bias, const Tensor& shift_bias,
                           const OptionalTensor& attention) {
  return dispatch(z, [&](auto type) -> Backward {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(z), grad(grad_out, map);
    ModulateBackward<T> f;
    f.problem = problem_of_states(map.shape(), state);
    const Problem& pr = f.problem;
    Params<A> get;
    f.weights = unpack_weights(get, pr, scale_weight, shift_weight, scale_bias, shift_bias);
    f.state = get(state, pr.N * pr.C * pr.pt, "state");
    f.attention = get(attention, pr.N * pr.C * pr.S, "attention");
    Tensor dz = new_map(map.tensor(), map.shape());
    Tensor dstate = new_gradient<A>(state), dscale = new_gradient<A>(scale_weight), dshift = new_gradient<A>(shift_weight);
    Tensor dscale_bias = new_gradient<A>(scale_bias), dshift_bias = new_gradient<A>(shift_bias);
    Tensor dattention = new_gradient<A>(attention);
    f.z = map.template map<T>();
    f.grad_out = grad.template map<T>();
    f.dz = output_map<T>(dz);
    f.dstate = data<A>(dstate);
    f.dscale_weight = scale_weight.has_value() ? data<A>(dscale) : nullptr;
    f.dshift_weight = shift_weight.has_value() ? data<A>(dshift) : nullptr;
    f.dscale_bias = data<A>(dscale_bias), f.dshift_bias = data<A>(dshift_bias);
    f.dattention = attention.has_value() ? data<A>(dattention) : nullptr;
    f.pool = torch_pool();
    kernels<T>().modulate_backward(f);
    return {dz,
            in_type_of(dstate, state),
            in_type_of(dscale, scale_weight),
            in_type_of(dshift, shift_weight),
            in_type_of(dscale_bias, scale_bias),
            in_type_of(dshift_bias, shift_bias),
            in_type_of(dattention, attention)};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vcr_ops, m) {
  m.def(
      "concept_modulate(Tensor z, Tensor state, Tensor? scale_weight, Tensor? shift_weight, Tensor scale_bias, Tensor shift_bias, "
      "Tensor? attention) -> Tensor");
  m.def(
      "concept_modulate_backward(Tensor grad_out, Tensor z, Tensor state, Tensor? scale_weight, Tensor? shift_weight, Tensor scale_bias, "
      "Tensor shift_bias, Tensor? attention) -> (Tensor dz, Tensor dstate, Tensor dscale_weight, Tensor dshift_weight, "
      "Tensor dscale_bias, Tensor dshift_bias, Tensor dattention)");
}
STABLE_TORCH_LIBRARY_IMPL(vcr_ops, CPU, m) {
  m.impl("concept_modulate", TORCH_BOX(&modulate));
  m.impl("concept_modulate_backward", TORCH_BOX(&modulate_backward));
}

}  // namespace vcr
