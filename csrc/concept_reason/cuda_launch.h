// The kernels of concept_reason in order; Runner: see vcr_middle/cuda_launch.h.
#pragma once
#include "../cuda/launch.h"
#include "cuda_op.cuh"

namespace vcr::cuda {

template <class A>
struct ReasonForwardLaunch {
  const ReasonForward<A>& f;
  explicit ReasonForwardLaunch(const ReasonForward<A>& args) : f(args) {}

  double* workspace(Carver& carve) const { return carve.take<double>(f.batch ? 2 * f.N * f.pt : 0); }
  template <class Runner>
  Status run(Runner& runner, void* memory) const {
    if (f.N == 0) {
      for (A* to : std::initializer_list<A*>{f.mean, f.var})
        if (f.batch) runner.zero(to, f.pt * sizeof(A));
      return runner.status;
    }
    Carver carve{static_cast<char*>(memory)};
    double* parts = workspace(carve);
    const typename ConceptReason<A>::Args reason{
        f.N, f.C, f.pt, f.edges, f.h, f.edge, f.g, f.edges == Edges::dynamic_edges ? f.a : nullptr, f.batch ? parts : nullptr};
    const StateNormArgs<A> norm{f.batch, f.eps, parts, f.mean, f.var, f.mean, f.var, f.norm};
    const typename NormaliseStates<A>::Args normalise{f.N, f.C, f.pt, norm, f.g, f.weight, f.bias, f.state};
    if (shared_bytes<NormaliseStates<A>>(normalise) > runner.device.shared) return {0, true};
    runner.template launch<ConceptReason<A>>(reason);
    runner.template launch<NormaliseStates<A>>(normalise);
    return runner.status;
  }
};

template <class A>
struct ReasonBackwardLaunch {
  const ReasonBackward<A>& f;
  explicit ReasonBackwardLaunch(const ReasonBackward<A>& args) : f(args) {}

  struct Workspace {
    A *masked, *dg, *shares;
    double* parts;
  };
  Workspace workspace(Carver& carve) const {
    const int64_t states = f.N * f.C * f.pt;
    Workspace at;
    at.masked = carve.take<A>(states), at.dg = carve.take<A>(states), at.shares = carve.take<A>(states);
    at.parts = carve.take<double>(2 * f.N * f.pt);
    return at;
  }
  template <class Runner>
  Status run(Runner& runner, void* memory) const {
    if (f.N == 0) {
      for (A* to : std::initializer_list<A*>{f.dweight, f.dbias}) runner.zero(to, f.pt * sizeof(A));
      runner.zero(f.dedge, (f.edges == Edges::none ? 0 : f.edges == Edges::dynamic_edges ? f.pt * f.C : f.C * f.C) * sizeof(A));
      return runner.status;
    }
    Carver carve{static_cast<char*>(memory)};
    const Workspace at = workspace(carve);
    const typename StateNormBackward<A>::Args norm{f.N,      f.C,      f.pt,   f.batch, at.masked, f.g,
                                                   at.parts, f.weight, f.norm, at.dg,   f.dweight, f.dbias};
    if (shared_bytes<StateNormBackward<A>>(norm) > runner.device.shared) return {0, true};
    runner.template launch<StateReluBackward<A>>(
        typename StateReluBackward<A>::Args{f.N, f.C, f.pt, f.dstate, f.g, f.weight, f.bias, f.norm, at.masked, at.parts});
    runner.template launch<StateNormBackward<A>>(norm);
    runner.template launch<ReasonGradients<A>>(
        typename ReasonGradients<A>::Args{f.N, f.C, f.pt, f.edges, at.dg, f.h, f.edge, f.a, f.dh, at.shares, f.dedge});
    return runner.status;
  }
};

}  // namespace vcr::cuda
