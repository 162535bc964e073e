// The kernels of concept_sample in order; Runner: see vcr_middle/cuda_launch.h.
#pragma once
#include "../vcr_middle/cuda_launch.h"
#include "cuda_op.cuh"

namespace vcr::cuda {

template <class T>
struct SampleForwardLaunch {
  using A = acc_t<T>;
  const SampleForward<T>& f;
  explicit SampleForwardLaunch(const SampleForward<T>& args) : f(args) {}

  int workspace(Carver&) const { return 0; }  // none
  template <class Runner>
  Status run(Runner& runner, void*) const {
    const Problem& pr = f.problem;
    if (pr.N == 0) return runner.status;
    SampleArgs_<T> a{};
    a.problem = pr, a.sampler = f.sampler, a.y = f.z, a.last = f.z.layout() == Layout::channels_last, a.weights = f.weights;
    a.norm.norm = Norm::none;
    a.to.h = f.h;
    if (f.save) a.to = sample_state(pr, f.saved, f.h, true);
    a.attention = f.attention;
    const BlockShape shape = block_shape(runner.device, pr, sizeof(T), a.last);
    a.concepts = shape.concepts, a.block = shape.block;
    MiddleForwardLaunch<T>::choose_memory(runner.device, a);
    if (!fit<ConceptSample<T>>(runner.device, a, a.concepts, a.block)) return {0, true};
    runner.template launch<ConceptSample<T>>(a);
    return runner.status;
  }
};

template <class T>
struct SampleBackwardLaunch {
  using A = acc_t<T>;
  const SampleBackward<T>& f;
  explicit SampleBackwardLaunch(const SampleBackward<T>& args) : f(args) {}

  bool attention_gradient() const { return f.dattention != nullptr && f.sampler != Sampler::pool; }
  struct Workspace {
    ImageGradients<A> image;
    A *attended, *K1;
  };
  Workspace workspace(Carver& carve) const {
    const Problem& pr = f.problem;
    Workspace at;
    at.image = image_gradients<A>(carve, pr);
    at.attended = carve.take<A>(attention_gradient() ? pr.N * pr.C : 0);
    at.K1 = carve.take<A>(attention_gradient() ? pr.N * pr.channels() : 0);
    return at;
  }
  template <class Runner>
  Status run(Runner& runner, void* memory) const {
    const Problem& pr = f.problem;
    const Device& device = runner.device;
    if (pr.N == 0) {
      for (A* to : std::initializer_list<A*>{f.dvalue, f.dquery, f.dkey}) runner.zero(to, pr.channels() * pr.pt * sizeof(A));
      runner.zero(f.dlogit, pr.channels() * sizeof(A));
      return runner.status;
    }
    Carver carve{static_cast<char*>(memory)};
    Workspace at = workspace(carve);
    at.image.dh = const_cast<A*>(f.dh);  // read only
    const bool last = f.z.layout() == Layout::channels_last;
    const BlockShape shape = block_shape(device, pr, sizeof(T), last);
    const SampleState<A> state = sample_state(pr, f.saved, static_cast<A*>(nullptr), true);
    const NormSeen<A> norm{true, nullptr, nullptr, nullptr, state.m};
    typename AttentionSums<T>::Args sums{pr,      f.z,     last,          shape.concepts, shape.block, state.m,
                                         state.u, state.r, state.softmax, f.dattention,   at.attended, at.K1};
    typename MiddleInputGrad<T, false>::Args grad{};
    grad.view.problem = pr, grad.view.y = f.z, grad.view.last = last, grad.view.norm = norm, grad.view.softmax = state.softmax;
    grad.dy = f.dz, grad.concepts = shape.concepts, grad.block = shape.block, grad.chunk = chunk_of(device, pr, shape, 4);
    grad.sampler = f.sampler, grad.u = state.u, grad.dr = at.image.dr, grad.constant = at.image.constant, grad.rdr = at.image.rdr;
    if (attention_gradient()) grad.dattention = f.dattention, grad.attended = at.attended;
    if (!fit<AttentionSums<T>>(device, sums, sums.concepts, sums.block) ||
        !fit<MiddleInputGrad<T, false>>(device, grad, grad.concepts, grad.block))
      return {0, true};
    if (attention_gradient()) runner.template launch<AttentionSums<T>>(sums);
    const SamplerBackward<A> sampler{pr, f.sampler, norm, f.weights, state, attention_gradient() ? at.K1 : nullptr, at.image};
    runner.template launch<SampleGradients<A>>(typename SampleGradients<A>::Args{sampler, f.dvalue, f.dquery, f.dkey, f.dlogit});
    runner.template launch<MiddleInputGrad<T, false>>(grad);
    return runner.status;
  }
};

}  // namespace vcr::cuda
