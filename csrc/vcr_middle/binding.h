// vcr_middle and its backward, from tensors to what the kernels take. Device: Cpu or Cuda.
#pragma once
#include "../binding/unpack.h"
#include "args.h"

namespace vcr {

inline MiddleOptions options_of(const std::string& norm, const std::string& sampler, const std::string& edges,
                                const std::string& modulation) {
  MiddleOptions o;
  o.norm = variant<Norm>(norm_names, norm, "norm");
  o.sampler = variant<Sampler>(sampler_names, sampler, "sampler");
  o.edges = variant<Edges>(edges_names, edges, "edges");
  o.modulation = variant<Modulation>(modulation_names, modulation, "modulation");
  require(o.modulation == Modulation::channel || o.sampler != Sampler::pool, "pixel modulation needs an attention sampler");
  return o;
}

// The learned parameters, as both directions take them.
struct Learned {
  const OptionalTensor &norm_weight, &norm_bias;
  const Tensor& value;
  const OptionalTensor &query, &key, &logit, &edge, &state_weight, &state_bias, &scale_weight, &shift_weight;
  const Tensor &scale_bias, &shift_bias;

  template <class A, class Device>
  MiddleParams<A> unpack(Params<A, Device>& get, const Problem& pr, const MiddleOptions& o) const {
    const int64_t CP = pr.channels(), weights = CP * pr.pt;
    MiddleParams<A> p{};
    p.norm_weight = get(norm_weight, CP, "norm_weight");
    p.norm_bias = get(norm_bias, CP, "norm_bias");
    p.value = get(value, weights, "value");
    if (o.sampler == Sampler::dynamic_query) {
      require(query.has_value() && key.has_value(), "the dynamic sampler takes query and key");
      p.query = get(query, weights, "query");
      p.key = get(key, weights, "key");
    }
    if (o.sampler == Sampler::static_query) {
      require(logit.has_value(), "the static sampler takes logit");
      p.logit = get(logit, CP, "logit");
    }
    if (o.edges != Edges::none) {
      require(edge.has_value(), "dynamic and static edges take edge");
      p.edge = get(edge, o.edges == Edges::dynamic_edges ? pr.pt * pr.C : pr.C * pr.C, "edge");
    }
    p.state_weight = get(state_weight, pr.pt, "state_weight");
    p.state_bias = get(state_bias, pr.pt, "state_bias");
    p.scale_weight = get(scale_weight, weights, "scale_weight");
    p.shift_weight = get(shift_weight, weights, "shift_weight");
    p.scale_bias = get(scale_bias, CP, "scale_bias");
    p.shift_bias = get(shift_bias, CP, "shift_bias");
    return p;
  }
};

// All of a forward pass but its outputs. `map`, `get` and the tensors live on in the caller.
template <class T, class Device>
MiddleForward<T> unpack_forward(const MapInput& map, Params<acc_t<T>, Device>& get, const OptionalTensor& norm_mean,
                                const OptionalTensor& norm_var, const Learned& learned, const OptionalTensor& state_mean,
                                const OptionalTensor& state_var, const MiddleOptions& options) {
  using A = acc_t<T>;
  MiddleForward<T> f{};
  f.problem = problem_of(map.shape(), learned.value);
  f.options = options;
  f.options.state_batch = !state_mean.has_value();
  const Problem& pr = f.problem;
  f.params = learned.template unpack<A>(get, pr, f.options);
  if (options.norm == Norm::given) {
    f.params.norm_mean = get.statistic(norm_mean, pr.channels(), "norm_mean");
    f.params.norm_var = get.statistic(norm_var, pr.channels(), "norm_var");
  }
  if (!f.options.state_batch) {
    f.params.state_mean = get.statistic(state_mean, pr.pt, "state_mean");
    f.params.state_var = get.statistic(state_var, pr.pt, "state_var");
  }
  f.y = map.template map<T>();
  return f;
}

// What the forward ops take alike.
#define VCR_FORWARD                                                                                                                    \
  const Tensor &y, const OptionalTensor &norm_mean, const OptionalTensor &norm_var, const OptionalTensor &norm_weight,                 \
      const OptionalTensor &norm_bias, const Tensor &value, const OptionalTensor &query, const OptionalTensor &key,                    \
      const OptionalTensor &logit, const OptionalTensor &edge, const OptionalTensor &state_mean, const OptionalTensor &state_var,      \
      const OptionalTensor &state_weight, const OptionalTensor &state_bias, const OptionalTensor &scale_weight,                        \
      const OptionalTensor &shift_weight, const Tensor &scale_bias, const Tensor &shift_bias, const std::string norm, double norm_eps, \
      double state_eps, const std::string sampler, const std::string edges, const std::string modulation
#define VCR_FORWARD_LEARNED                                                                                                              \
  Learned {                                                                                                                              \
    norm_weight, norm_bias, value, query, key, logit, edge, state_weight, state_bias, scale_weight, shift_weight, scale_bias, shift_bias \
  }

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
Forward middle(VCR_FORWARD, bool save) {
  Device device(y);
  const ScalarType features = y.scalar_type();
  return Device::dispatch(features, [&](auto type) -> Forward {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(y);
    Params<A, Device> get(device, features);
    MiddleOptions options = options_of(norm, sampler, edges, modulation);
    options.save = save, options.norm_eps = norm_eps, options.state_eps = state_eps;
    MiddleForward<T> f = unpack_forward<T>(map, get, norm_mean, norm_var, VCR_FORWARD_LEARNED, state_mean, state_var, options);
    const Problem& pr = f.problem;
    Tensor out = new_map(map.tensor(), map.shape());
    const int64_t size = MiddleSaved<A>::size(pr, save);
    Tensor saved = new_small<A>(device.place(), {save ? size : 0});
    const typename Device::template Scratch<A> unsaved(device, save ? 0 : size);  // of no use to a caller: spares a tensor
    const int64_t channels = options.norm == Norm::batch ? pr.channels() : 0, states = f.options.state_batch ? pr.pt : 0;
    Tensor mean = new_small<A>(device.place(), {channels}), variance = new_small<A>(device.place(), {channels});
    Tensor batch_state_mean = new_small<A>(device.place(), {states}), batch_state_var = new_small<A>(device.place(), {states});
    f.out = output_map<T>(out);
    f.saved = save ? data<A>(saved) : unsaved.get();
    f.norm_mean = data<A>(mean), f.norm_var = data<A>(variance);
    f.state_mean = data<A>(batch_state_mean), f.state_var = data<A>(batch_state_var);
    device.run(f);
    return {std::move(out),  std::move(mean), std::move(variance), std::move(batch_state_mean), std::move(batch_state_var),
            std::move(saved)};
  });
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
Backward middle_backward(const Tensor& grad_out, const Tensor& y, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                         const Tensor& value, const OptionalTensor& query, const OptionalTensor& key, const OptionalTensor& logit,
                         const OptionalTensor& edge, const OptionalTensor& state_weight, const OptionalTensor& state_bias,
                         const OptionalTensor& scale_weight, const OptionalTensor& shift_weight, const Tensor& scale_bias,
                         const Tensor& shift_bias, const Tensor& saved, const std::string norm, bool state_batch, const std::string sampler,
                         const std::string edges, const std::string modulation) {
  Device device(y);
  return Device::dispatch(y.scalar_type(), [&](auto type) -> Backward {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(y), grad(grad_out, map, "grad_out");
    MiddleBackward<T> f;
    f.problem = problem_of(map.shape(), value);
    const Problem& pr = f.problem;
    f.options = options_of(norm, sampler, edges, modulation);
    f.options.state_batch = state_batch;
    require(saved.numel() == MiddleSaved<A>::size(pr, true) && saved.scalar_type() == scalar_type<A>(), "saved has another size or dtype");
    Params<A, Device> get(device);
    f.params = Learned{norm_weight,  norm_bias,  value,        query,        key,        logit,     edge,
                       state_weight, state_bias, scale_weight, shift_weight, scale_bias, shift_bias}
                   .template unpack<A>(get, pr, f.options);
    Tensor dy = new_map(map.tensor(), map.shape());
    f.y = map.template map<T>();
    f.grad_out = grad.template map<T>();
    f.dy = output_map<T>(dy);
    f.saved = static_cast<A*>(const_cast<void*>(saved.const_data_ptr()));
    const Tensor* const parameters[] = {pointer(norm_weight), pointer(norm_bias),    pointer(value),        pointer(query),
                                        pointer(key),         pointer(logit),        pointer(edge),         pointer(state_weight),
                                        pointer(state_bias),  pointer(scale_weight), pointer(shift_weight), pointer(scale_bias),
                                        pointer(shift_bias)};
    Tensor g[13];
    for (int i = 0; i < 13; ++i) g[i] = new_gradient<A>(device.place(), parameters[i]);
    const auto to = [&](int i) { return parameters[i] != nullptr ? data<A>(g[i]) : nullptr; };
    // the batch norm of states always reports its sums, also where it has no weights
    Tensor unused = new_small<A>(device.place(), {2 * pr.pt});
    f.grads = {to(0), to(1), to(2), to(3), to(4), to(5), to(6), to(7), to(8), to(9), to(10), to(11), to(12)};
    if (f.grads.state_weight == nullptr) f.grads.state_weight = data<A>(unused);
    if (f.grads.state_bias == nullptr) f.grads.state_bias = data<A>(unused) + pr.pt;
    device.run(f);
    for (int i = 0; i < 13; ++i) to_type_of<A>(device, parameters[i], g[i]);
    device.finish();
    return {std::move(dy),   std::move(g[0]), std::move(g[1]), std::move(g[2]), std::move(g[3]),  std::move(g[4]),  std::move(g[5]),
            std::move(g[6]), std::move(g[7]), std::move(g[8]), std::move(g[9]), std::move(g[10]), std::move(g[11]), std::move(g[12])};
  });
}

}  // namespace vcr
