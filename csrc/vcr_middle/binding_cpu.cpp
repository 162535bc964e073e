// torch.ops.vcr_ops.vcr_middle and its backward: schemas, and the CPU's kernels; and its single steps, which the CPU alone has.
#include "../binding/cpu.h"
#include "binding.h"

namespace vcr {
namespace {

// With given statistics, and no backward pass to follow: the map alone is returned, which spares five tensors.
Tensor middle_infer(VCR_FORWARD) {
  Cpu device(y);
  const ScalarType features = y.scalar_type();
  return Cpu::dispatch(features, [&](auto type) -> Tensor {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(y);
    Params<A, Cpu> get(device, features);
    MiddleOptions options = options_of(norm, sampler, edges, modulation);
    options.save = false, options.norm_eps = norm_eps, options.state_eps = state_eps;
    require(options.norm != Norm::batch && state_mean.has_value(), "inference takes given statistics");
    MiddleForward<T> f = unpack_forward<T>(map, get, norm_mean, norm_var, VCR_FORWARD_LEARNED, state_mean, state_var, options);
    Tensor out = new_map(map.tensor(), map.shape());
    const Cpu::Scratch<A> unsaved(device, MiddleSaved<A>::size(f.problem, false));
    f.out = output_map<T>(out);
    f.saved = unsaved.get();
    device.run(f);
    return out;
  });
}

// The ops that make the passes one by one, so that statistics can be exchanged between processes in between.

template <class A>
A* writable(const Tensor& t, int64_t count, const char* name) {  // by the kernels' structs; what is read here is not written
  require(t.numel() == count && t.is_cpu() && t.scalar_type() == scalar_type<A>() && t.is_contiguous(), name);
  return static_cast<A*>(const_cast<void*>(t.const_data_ptr()));
}
Norm known_norm(const MiddleOptions& o) {
  require(o.norm != Norm::batch, "norm is given or none");
  return o.norm;
}

Tensor middle_stats(const Tensor& y, int64_t concepts) {
  Cpu device(y);
  return Cpu::dispatch(y.scalar_type(), [&](auto type) -> Tensor {
    using T = decltype(type);
    const MapInput map(y);
    require(concepts > 0 && map.shape().channels % concepts == 0, "concepts doesn't divide y's channels");
    MiddleStats<T> f;
    f.problem = {map.shape().N, concepts, map.shape().channels / concepts, 1, map.shape().S};
    Tensor moments = new_small<double>(device.place(), {2, map.shape().channels});
    f.y = map.template map<T>();
    f.moments = data<double>(moments);
    device.run(f);
    return moments;
  });
}

using States = std::tuple<Tensor, Tensor>;

States middle_states(const Tensor& y, const OptionalTensor& norm_mean, const OptionalTensor& norm_var, const OptionalTensor& norm_weight,
                     const OptionalTensor& norm_bias, const Tensor& value, const OptionalTensor& query, const OptionalTensor& key,
                     const OptionalTensor& logit, const OptionalTensor& edge, const Tensor& scale_bias, const Tensor& shift_bias,
                     const std::string norm, double norm_eps, const std::string sampler, const std::string edges,
                     const std::string modulation) {
  Cpu device(y);
  return Cpu::dispatch(y.scalar_type(), [&](auto type) -> States {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(y);
    const OptionalTensor none;
    MiddleForward<T> f{};
    f.problem = problem_of(map.shape(), value);
    const Problem& pr = f.problem;
    f.options = options_of(norm, sampler, edges, modulation);
    f.options.norm_eps = norm_eps;
    f.step = ForwardStep::states;
    Params<A, Cpu> get(device);
    f.params =
        Learned{norm_weight, norm_bias, value, query, key, logit, edge, none, none, none, none, scale_bias, shift_bias}.template unpack<A>(
            get, pr, f.options);
    if (known_norm(f.options) == Norm::given) {
      require(norm_mean.has_value() && norm_var.has_value(), "norm 'given' takes norm_mean and norm_var");
      f.params.norm_mean = get(norm_mean, pr.channels(), "norm_mean");
      f.params.norm_var = get(norm_var, pr.channels(), "norm_var");
    }
    Tensor saved = new_small<A>(device.place(), {MiddleSaved<A>::size(pr, true) - MiddleSaved<A>::late_size(pr)});
    Tensor moments = new_small<double>(device.place(), {2, pr.pt}),
           late = new_small<A>(device.place(), {MiddleSaved<A>::late_size(pr)});  // late: of no use yet
    f.y = map.template map<T>();
    f.saved = data<A>(saved);
    f.late = data<A>(late);
    f.moments = data<double>(moments);
    device.run(f);
    return {std::move(saved), std::move(moments)};
  });
}

// What the later steps take alike.
#define VCR_LEARNED                                                                                                                       \
  const OptionalTensor &norm_weight, const OptionalTensor &norm_bias, const Tensor &value, const OptionalTensor &query,                   \
      const OptionalTensor &key, const OptionalTensor &logit, const OptionalTensor &edge, const OptionalTensor &state_weight,             \
      const OptionalTensor &state_bias, const OptionalTensor &scale_weight, const OptionalTensor &shift_weight, const Tensor &scale_bias, \
      const Tensor &shift_bias
#define VCR_LEARNED_NAMES \
  norm_weight, norm_bias, value, query, key, logit, edge, state_weight, state_bias, scale_weight, shift_weight, scale_bias, shift_bias
#define VCR_VARIANT const std::string norm, const std::string sampler, const std::string edges, const std::string modulation
#define VCR_VARIANT_NAMES norm, sampler, edges, modulation

using Modulated = std::tuple<Tensor, Tensor>;

Modulated middle_modulate(const Tensor& y, VCR_LEARNED, const Tensor& saved, const Tensor& state_norm, VCR_VARIANT) {
  Cpu device(y);
  return Cpu::dispatch(y.scalar_type(), [&](auto type) -> Modulated {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(y);
    MiddleForward<T> f{};
    f.problem = problem_of(map.shape(), value);
    const Problem& pr = f.problem;
    f.options = options_of(VCR_VARIANT_NAMES);
    known_norm(f.options);
    f.step = ForwardStep::modulate;
    Params<A, Cpu> get(device);
    f.params = Learned{VCR_LEARNED_NAMES}.template unpack<A>(get, pr, f.options);
    Tensor out = new_map(map.tensor(), map.shape()), late = new_small<A>(device.place(), {MiddleSaved<A>::late_size(pr)});
    f.y = map.template map<T>();
    f.out = output_map<T>(out);
    f.saved = writable<A>(saved, MiddleSaved<A>::size(pr, true) - MiddleSaved<A>::late_size(pr), "saved has another size or dtype");
    f.late = data<A>(late);
    f.state_norm = writable<double>(state_norm, 2 * pr.pt, "state_norm is (2, pt) in float64");
    device.run(f);
    return {std::move(out), std::move(late)};
  });
}

// Sizes, options, parameters and what the forward pass kept. `get` and the tensors live on in the caller.
template <class T>
MiddleBackward<T> backward_step(BackwardStep step, const MapInput& map, Params<acc_t<T>, Cpu>& get, VCR_LEARNED, const Tensor& saved,
                                const Tensor& late, const Tensor* state_norm, VCR_VARIANT) {
  using A = acc_t<T>;
  MiddleBackward<T> f{};
  f.step = step;
  f.problem = problem_of(map.shape(), value);
  const Problem& pr = f.problem;
  f.options = options_of(VCR_VARIANT_NAMES);
  known_norm(f.options);
  f.params = Learned{VCR_LEARNED_NAMES}.template unpack<A>(get, pr, f.options);
  f.y = map.template map<T>();
  f.saved = writable<A>(saved, MiddleSaved<A>::size(pr, true) - MiddleSaved<A>::late_size(pr), "saved has another size or dtype");
  f.late = writable<A>(late, MiddleSaved<A>::late_size(pr), "late has another size or dtype");
  if (state_norm != nullptr) f.state_norm = writable<double>(*state_norm, 2 * pr.pt, "state_norm is (2, pt) in float64");
  return f;
}

using Sums = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Sums middle_backward_sums(const Tensor& grad_out, const Tensor& y, VCR_LEARNED, const Tensor& saved, const Tensor& late,
                          const Tensor& state_norm, VCR_VARIANT) {
  Cpu device(y);
  return Cpu::dispatch(y.scalar_type(), [&](auto type) -> Sums {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(y), grad(grad_out, map, "grad_out");
    Params<A, Cpu> get(device);
    MiddleBackward<T> f = backward_step<T>(BackwardStep::sums, map, get, VCR_LEARNED_NAMES, saved, late, &state_norm, VCR_VARIANT_NAMES);
    const Tensor* const parameters[] = {pointer(scale_weight), pointer(shift_weight), pointer(scale_bias), pointer(shift_bias)};
    Tensor g[4], summed = new_small<A>(device.place(), {MiddleBackwardWork::summed(f.problem)}),
                 state_sums = new_small<double>(device.place(), {2, f.problem.pt});
    for (int i = 0; i < 4; ++i) g[i] = new_gradient<A>(device.place(), parameters[i]);
    f.grad_out = grad.template map<T>();
    f.grads.scale_weight = scale_weight.has_value() ? data<A>(g[0]) : nullptr;
    f.grads.shift_weight = shift_weight.has_value() ? data<A>(g[1]) : nullptr;
    f.grads.scale_bias = data<A>(g[2]);
    f.grads.shift_bias = data<A>(g[3]);
    f.summed = data<A>(summed);
    f.state_sums = data<double>(state_sums);
    device.run(f);
    for (int i = 0; i < 4; ++i) to_type_of<A>(device, parameters[i], g[i]);
    return {std::move(summed), std::move(state_sums), std::move(g[0]), std::move(g[1]), std::move(g[2]), std::move(g[3])};
  });
}

using BackwardStates = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardStates middle_backward_states(const Tensor& y, VCR_LEARNED, const Tensor& saved, const Tensor& late, const Tensor& state_norm,
                                      const Tensor& summed, const Tensor& state_shares, VCR_VARIANT) {
  Cpu device(y);
  return Cpu::dispatch(y.scalar_type(), [&](auto type) -> BackwardStates {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(y);
    Params<A, Cpu> get(device);
    MiddleBackward<T> f = backward_step<T>(BackwardStep::states, map, get, VCR_LEARNED_NAMES, saved, late, &state_norm, VCR_VARIANT_NAMES);
    const Problem& pr = f.problem;
    const Tensor* const parameters[] = {pointer(norm_weight), pointer(norm_bias), pointer(value), pointer(query),
                                        pointer(key),         pointer(logit),     pointer(edge)};
    Tensor g[7], attended = new_small<A>(device.place(), {MiddleBackwardWork::attended(pr)}),
                 norm_sums = new_small<A>(device.place(), {2, pr.channels()});
    for (int i = 0; i < 7; ++i) g[i] = new_gradient<A>(device.place(), parameters[i]);
    const auto to = [&](int i) { return parameters[i] != nullptr ? data<A>(g[i]) : nullptr; };
    f.grads.norm_weight = to(0), f.grads.norm_bias = to(1), f.grads.value = to(2), f.grads.query = to(3), f.grads.key = to(4);
    f.grads.logit = to(5), f.grads.edge = to(6);
    f.summed = writable<A>(summed, MiddleBackwardWork::summed(pr), "summed has another size or dtype");
    f.state_shares = writable<double>(state_shares, 2 * pr.pt, "state_shares is (2, pt) in float64");
    f.attended = data<A>(attended);
    f.norm_sums = data<A>(norm_sums);
    device.run(f);
    for (int i = 0; i < 7; ++i) to_type_of<A>(device, parameters[i], g[i]);
    return {std::move(attended), std::move(norm_sums), std::move(g[0]), std::move(g[1]), std::move(g[2]),
            std::move(g[3]),     std::move(g[4]),      std::move(g[5]), std::move(g[6])};
  });
}

Tensor middle_backward_input(const Tensor& grad_out, const Tensor& y, VCR_LEARNED, const Tensor& saved, const Tensor& late,
                             const Tensor& summed, const Tensor& attended, const OptionalTensor& norm_shares, VCR_VARIANT) {
  Cpu device(y);
  return Cpu::dispatch(y.scalar_type(), [&](auto type) -> Tensor {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(y), grad(grad_out, map, "grad_out");
    Params<A, Cpu> get(device);
    MiddleBackward<T> f = backward_step<T>(BackwardStep::input, map, get, VCR_LEARNED_NAMES, saved, late, nullptr, VCR_VARIANT_NAMES);
    const Problem& pr = f.problem;
    Tensor dy = new_map(map.tensor(), map.shape());
    f.grad_out = grad.template map<T>();
    f.dy = output_map<T>(dy);
    f.summed = writable<A>(summed, MiddleBackwardWork::summed(pr), "summed has another size or dtype");
    f.attended = writable<A>(attended, MiddleBackwardWork::attended(pr), "attended has another size or dtype");
    f.norm_shares = get(norm_shares, 2 * pr.channels(), "norm_shares is (2, C p)");
    device.run(f);
    return dy;
  });
}

}  // namespace

#define VCR_FORWARD_SCHEMA                                                                                                        \
  "Tensor y, Tensor? norm_mean, Tensor? norm_var, Tensor? norm_weight, Tensor? norm_bias, Tensor value, Tensor? query, "          \
  "Tensor? key, Tensor? logit, Tensor? edge, Tensor? state_mean, Tensor? state_var, Tensor? state_weight, Tensor? state_bias, "   \
  "Tensor? scale_weight, Tensor? shift_weight, Tensor scale_bias, Tensor shift_bias, str norm, float norm_eps, float state_eps, " \
  "str sampler, str edges, str modulation"
#define VCR_LEARNED_SCHEMA                                                                                          \
  "Tensor? norm_weight, Tensor? norm_bias, Tensor value, Tensor? query, Tensor? key, Tensor? logit, Tensor? edge, " \
  "Tensor? state_weight, Tensor? state_bias, Tensor? scale_weight, Tensor? shift_weight, Tensor scale_bias, Tensor shift_bias, "
#define VCR_VARIANT_SCHEMA "str norm, str sampler, str edges, str modulation"

STABLE_TORCH_LIBRARY_FRAGMENT(vcr_ops, m) {
  m.def("vcr_middle(" VCR_FORWARD_SCHEMA
        ", bool save) -> (Tensor out, Tensor norm_mean, Tensor norm_var, Tensor state_mean, Tensor state_var, Tensor saved)");
  m.def("vcr_middle_infer(" VCR_FORWARD_SCHEMA ") -> Tensor out");
  m.def(
      "vcr_middle_backward(Tensor grad_out, Tensor y, Tensor? norm_weight, Tensor? norm_bias, Tensor value, Tensor? query, Tensor? key, "
      "Tensor? logit, Tensor? edge, Tensor? state_weight, Tensor? state_bias, Tensor? scale_weight, Tensor? shift_weight, "
      "Tensor scale_bias, Tensor shift_bias, Tensor saved, str norm, bool state_batch, str sampler, str edges, str modulation) -> "
      "(Tensor dy, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dvalue, Tensor dquery, Tensor dkey, Tensor dlogit, Tensor dedge, "
      "Tensor dstate_weight, Tensor dstate_bias, Tensor dscale_weight, Tensor dshift_weight, Tensor dscale_bias, Tensor dshift_bias)");
  m.def("vcr_middle_stats(Tensor y, int concepts) -> Tensor moments");
  m.def(
      "vcr_middle_states(Tensor y, Tensor? norm_mean, Tensor? norm_var, Tensor? norm_weight, Tensor? norm_bias, Tensor value, "
      "Tensor? query, Tensor? key, Tensor? logit, Tensor? edge, Tensor scale_bias, Tensor shift_bias, str norm, float norm_eps, "
      "str sampler, str edges, str modulation) -> (Tensor saved, Tensor moments)");
  m.def("vcr_middle_modulate(Tensor y, " VCR_LEARNED_SCHEMA "Tensor saved, Tensor state_norm, " VCR_VARIANT_SCHEMA
        ") -> (Tensor out, Tensor late)");
  m.def("vcr_middle_backward_sums(Tensor grad_out, Tensor y, " VCR_LEARNED_SCHEMA
        "Tensor saved, Tensor late, Tensor state_norm, " VCR_VARIANT_SCHEMA
        ") -> (Tensor summed, Tensor state_sums, Tensor dscale_weight, Tensor dshift_weight, Tensor dscale_bias, Tensor dshift_bias)");
  m.def("vcr_middle_backward_states(Tensor y, " VCR_LEARNED_SCHEMA
        "Tensor saved, Tensor late, Tensor state_norm, Tensor summed, Tensor state_shares, " VCR_VARIANT_SCHEMA
        ") -> (Tensor attended, Tensor norm_sums, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dvalue, Tensor dquery, Tensor dkey, "
        "Tensor dlogit, Tensor dedge)");
  m.def("vcr_middle_backward_input(Tensor grad_out, Tensor y, " VCR_LEARNED_SCHEMA
        "Tensor saved, Tensor late, Tensor summed, Tensor attended, Tensor? norm_shares, " VCR_VARIANT_SCHEMA ") -> Tensor dy");
}
STABLE_TORCH_LIBRARY_IMPL(vcr_ops, CPU, m) {
  m.impl("vcr_middle", &boxed<middle<Cpu>>);
  m.impl("vcr_middle_infer", &boxed<middle_infer>);
  m.impl("vcr_middle_backward", &boxed<middle_backward<Cpu>>);
  m.impl("vcr_middle_stats", &boxed<middle_stats>);
  m.impl("vcr_middle_states", &boxed<middle_states>);
  m.impl("vcr_middle_modulate", &boxed<middle_modulate>);
  m.impl("vcr_middle_backward_sums", &boxed<middle_backward_sums>);
  m.impl("vcr_middle_backward_states", &boxed<middle_backward_states>);
  m.impl("vcr_middle_backward_input", &boxed<middle_backward_input>);
}

}  // namespace vcr
