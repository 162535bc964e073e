// The kernels of concept_modulate in order; Runner: see vcr_middle/cuda_launch.h.
#pragma once
#include <initializer_list>

#include "../cuda/launch.h"
#include "cuda_op.cuh"

namespace vcr::cuda {

template <class T, class Args>
GivenModulation<T> given_modulation(const Args& f, const BlockShape& shape) {
  return {f.problem, f.z, f.z.layout() == Layout::channels_last, shape.concepts, shape.block, f.weights, f.state, f.attention};
}

template <class T>
struct ModulateForwardLaunch {
  const ModulateForward<T>& f;
  explicit ModulateForwardLaunch(const ModulateForward<T>& args) : f(args) {}

  int workspace(Carver&) const { return 0; }  // none
  template <class Runner>
  Status run(Runner& runner, void*) const {
    const Problem& pr = f.problem;
    if (pr.N == 0) return runner.status;
    const BlockShape shape = block_shape(runner.device, pr, sizeof(T), f.z.layout() == Layout::channels_last);
    typename ModulateAlone<T>::Args a{given_modulation<T>(f, shape), f.out, chunk_of(runner.device, pr, shape, 2)};
    if (!fit<ModulateAlone<T>>(runner.device, a, a.given.concepts, a.given.block)) return {0, true};
    runner.template launch<ModulateAlone<T>>(a);
    return runner.status;
  }
};

template <class T>
struct ModulateBackwardLaunch {
  using A = acc_t<T>;
  const ModulateBackward<T>& f;
  explicit ModulateBackwardLaunch(const ModulateBackward<T>& args) : f(args) {}

  ModulatorSums_<A> workspace(Carver& carve) const {
    const int64_t map = f.problem.N * f.problem.channels();
    ModulatorSums_<A> sums{};
    sums.E0 = carve.take<A>(map), sums.E1 = carve.take<A>(map), sums.F0 = carve.take<A>(map), sums.F1 = carve.take<A>(map);
    return sums;
  }
  template <class Runner>
  Status run(Runner& runner, void* memory) const {
    const Problem& pr = f.problem;
    if (pr.N == 0) {
      for (A* to : std::initializer_list<A*>{f.dscale_weight, f.dshift_weight}) runner.zero(to, pr.channels() * pr.pt * sizeof(A));
      for (A* to : std::initializer_list<A*>{f.dscale_bias, f.dshift_bias}) runner.zero(to, pr.channels() * sizeof(A));
      return runner.status;
    }
    Carver carve{static_cast<char*>(memory)};
    const ModulatorSums_<A> sums = workspace(carve);
    const BlockShape shape = block_shape(runner.device, pr, sizeof(T), f.z.layout() == Layout::channels_last);
    typename ModulateAloneBackward<T>::Args a{given_modulation<T>(f, shape), f.grad_out, f.dz, sums, f.dattention};
    if (!fit<ModulateAloneBackward<T>>(runner.device, a, a.given.concepts, a.given.block)) return {0, true};
    runner.template launch<ModulateAloneBackward<T>>(a);
    runner.template launch<ModulateGradients<A>>(typename ModulateGradients<A>::Args{
        pr, f.weights, sums, f.state, f.dstate, f.dscale_weight, f.dshift_weight, f.dscale_bias, f.dshift_bias});
    return runner.status;
  }
};

}  // namespace vcr::cuda
