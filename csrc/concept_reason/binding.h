// concept_reason and its backward, from tensors to what the kernels take. Device: Cpu or Cuda.
#pragma once
#include "../binding/unpack.h"
#include "args.h"

namespace vcr {

// f(A{}) with the states' type.
template <class F>
auto dispatch_states(const Tensor& h, F f) {
  require(h.dim() == 3, "states are (N, C, pt)");
  if (h.scalar_type() == ScalarType::Double) return f(double{});
  require(h.scalar_type() == ScalarType::Float, "states are float32 or float64");
  return f(float{});
}
inline int64_t edge_size(Edges edges, int64_t C, int64_t pt) { return edges == Edges::dynamic_edges ? pt * C : C * C; }

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> reason(const Tensor& h, const OptionalTensor& edge, const OptionalTensor& mean,
                                                  const OptionalTensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
                                                  double eps, const std::string edges, bool save) {
  Device device(h);
  return dispatch_states(h, [&](auto type) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using A = decltype(type);
    ReasonForward<A> f;
    f.N = h.size(0), f.C = h.size(1), f.pt = h.size(2);
    f.edges = variant<Edges>(edges_names, edges, "edges");
    f.batch = !mean.has_value();
    f.eps = eps;
    const int64_t states = f.N * f.C * f.pt, square = f.N * f.C * f.C;
    Params<A, Device> get(device);
    f.h = get(h, states, "h");
    f.edge = f.edges == Edges::none ? nullptr : get(edge, edge_size(f.edges, f.C, f.pt), "edge");
    require(f.edges == Edges::none || f.edge != nullptr, "dynamic and static edges take edge");
    f.weight = get(weight, f.pt, "weight");
    f.bias = get(bias, f.pt, "bias");
    Tensor state = new_small<A>(device.place(), {f.N, f.C, f.pt});
    Tensor saved = new_small<A>(device.place(), {states + square + 4 * f.pt});
    Tensor new_mean = new_small<A>(device.place(), {f.batch ? f.pt : 0}), new_var = new_small<A>(device.place(), {f.batch ? f.pt : 0});
    if (f.batch) {
      f.mean = data<A>(new_mean), f.var = data<A>(new_var);
    } else {
      require(var.has_value(), "mean comes with var");
      f.mean = const_cast<A*>(get(mean, f.pt, "mean")), f.var = const_cast<A*>(get(var, f.pt, "var"));
    }
    f.state = data<A>(state);
    f.g = data<A>(saved), f.a = f.g + states, f.norm = f.a + square;
    device.run(f);
    if (!save) saved = new_small<A>(device.place(), {0});
    return {std::move(state), std::move(new_mean), std::move(new_var), std::move(saved)};
  });
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> reason_backward(const Tensor& dstate, const Tensor& h, const OptionalTensor& edge,
                                                           const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& saved,
                                                           const std::string edges, bool batch) {
  Device device(h);
  return dispatch_states(h, [&](auto type) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using A = decltype(type);
    ReasonBackward<A> f;
    f.N = h.size(0), f.C = h.size(1), f.pt = h.size(2);
    f.edges = variant<Edges>(edges_names, edges, "edges");
    f.batch = batch;
    const int64_t states = f.N * f.C * f.pt, square = f.N * f.C * f.C;
    require(saved.numel() == states + square + 4 * f.pt && saved.scalar_type() == scalar_type<A>(), "saved has another size or dtype");
    Params<A, Device> get(device);
    f.dstate = get(dstate, states, "dstate");
    f.h = get(h, states, "h");
    f.edge = f.edges == Edges::none ? nullptr : get(edge, edge_size(f.edges, f.C, f.pt), "edge");
    f.weight = get(weight, f.pt, "weight");
    f.bias = get(bias, f.pt, "bias");
    f.g = static_cast<const A*>(saved.const_data_ptr()), f.a = f.g + states, f.norm = f.a + square;
    Tensor dh = new_small<A>(device.place(), {f.N, f.C, f.pt}), dedge = new_gradient<A>(device.place(), edge);
    Tensor dweight = new_gradient<A>(device.place(), weight), dbias = new_gradient<A>(device.place(), bias),
           unused = new_small<A>(device.place(), {2 * f.pt});
    f.dh = data<A>(dh);
    f.dedge = edge.has_value() ? data<A>(dedge) : nullptr;
    f.dweight = weight.has_value() ? data<A>(dweight) : data<A>(unused);
    f.dbias = bias.has_value() ? data<A>(dbias) : data<A>(unused) + f.pt;
    device.run(f);
    to_type_of<A>(device, edge, dedge), to_type_of<A>(device, weight, dweight), to_type_of<A>(device, bias, dbias);
    device.finish();
    return {std::move(dh), std::move(dedge), std::move(dweight), std::move(dbias)};
  });
}

}  // namespace vcr
