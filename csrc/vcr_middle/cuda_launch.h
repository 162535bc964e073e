// The middle's kernels in order, for anything that can launch them: a Runner has `device`, launch<Kernel>(args, cluster) and
// zero(pointer, bytes).
#pragma once
#include <initializer_list>

#include "../cuda/launch.h"
#include "cuda_evaluate.cuh"
#include "cuda_input_grad.cuh"

namespace vcr::cuda {

inline int64_t map_bytes(const Problem& pr, int64_t element) { return pr.N * pr.channels() * pr.S * element; }

template <class T>
struct MiddleForwardLaunch {
  using A = acc_t<T>;
  const MiddleForward<T>& f;
  const Problem& pr;
  const MiddleOptions& o;
  const MiddleParams<A>& w;
  const bool last, pixel;

  explicit MiddleForwardLaunch(const MiddleForward<T>& args)
      : f(args), pr(f.problem), o(f.options), w(f.params), last(f.y.layout() == Layout::channels_last),
        pixel(o.modulation == Modulation::pixel) {}

  // Nothing of the batch is needed and nothing is kept.
  bool evaluates() const { return o.norm != Norm::batch && !o.state_batch && !o.save; }

  struct Workspace {
    double *means, *partial, *parts;
    A* saved;
  };
  Workspace workspace(Carver& carve) const {
    Workspace at{};
    const int64_t per_group = images_per_group(pr.N, stats_groups), groups = quotient_up(pr.N, per_group), CP = pr.channels();
    if (o.norm == Norm::batch) at.means = carve.take<double>(pr.N * CP), at.partial = carve.take<double>(2 * groups * CP);
    if (o.state_batch) at.parts = carve.take<double>(2 * pr.N * pr.pt);
    at.saved = o.save ? f.saved : carve.take<A>(MiddleSaved<A>::size(pr, false));
    return at;
  }

  StateNormArgs<A> state_norm(const double* parts, A* keep) const {
    return {o.state_batch, o.state_eps, parts, w.state_mean, w.state_var, f.state_mean, f.state_var, keep};
  }
  ModulatorWeights<A> modulator() const { return {w.scale_weight, w.shift_weight, w.scale_bias, w.shift_bias}; }
  SampleArgs_<T> sample_args() const {
    SampleArgs_<T> a{};
    a.problem = pr, a.sampler = o.sampler, a.y = f.y, a.last = last;
    a.norm = {o.norm,        o.norm_eps,  nullptr, nullptr, 1,       w.norm_mean, w.norm_var,
              w.norm_weight, w.norm_bias, nullptr, nullptr, nullptr, f.norm_mean, f.norm_var};
    a.weights = {w.value, w.query, w.key, w.logit};
    return a;
  }

  // The one-read kernel, if an image's tiles fit on chip.
  bool plan_evaluation(const Device& device, typename MiddleEvaluate<T>::Args& a) const {
    a = {sample_args(), f.out, pixel, o.edges, 1, nullptr, state_norm(nullptr, nullptr), w.edge, w.state_weight, w.state_bias, modulator()};
    a.sample.resident = true;
    const auto fits = [&](int64_t concepts) {
      a.sample.concepts = int(concepts);
      a.sample.block = int(least(pr.S, device.positions));
      for (;; a.sample.block = (a.sample.block + 1) / 2) {
        if (shared_bytes<MiddleEvaluate<T>>(a) <= device.shared) return true;
        if (a.sample.block <= warp_size) return false;
      }
    };
    if (pr.S > int64_t(1) << 24) return false;
    if (o.edges == Edges::none) {
      const int concepts = block_shape(device, pr, sizeof(T), last).concepts;
      return fits(concepts) || fits(1);
    }
    const ClusterSizes sizes = cluster_sizes(device, pr, sizeof(T), last);
    for (int i = 0; i < 9 && sizes.size[i] != 0; ++i) {
      a.cluster = sizes.size[i];
      if (fits(quotient_up(pr.C, a.cluster))) return true;
    }
    return false;
  }

  // For a few images: a block for each concept, as far as there are multiprocessors. `block` is that of the plan for many, for it decides in
  // which order sums go.
  bool plan_few(const Device& device, int block, A* exchanged, typename MiddleEvaluate<T>::Args& a) const {
    if (device.l2 == 0 || pr.N > device.multiprocessors / pr.C || pr.S > int64_t(1) << 24) return false;
    typename MiddleEvaluate<T>::Args few = a;
    few.sample.concepts = 1, few.sample.block = block, few.cluster = 1;
    few.exchanged = o.edges == Edges::none ? nullptr : exchanged;
    if (shared_bytes<MiddleEvaluate<T>>(few) > device.shared) return false;
    a = few;
    return true;
  }

  template <class Runner>
  Status run(Runner& runner, void* memory) const {
    const Device& device = runner.device;
    if (pr.N == 0) {
      for (A* to : std::initializer_list<A*>{f.norm_mean, f.norm_var})
        if (o.norm == Norm::batch) runner.zero(to, pr.channels() * sizeof(A));
      for (A* to : std::initializer_list<A*>{f.state_mean, f.state_var})
        if (o.state_batch) runner.zero(to, pr.pt * sizeof(A));
      return runner.status;
    }
    Carver carve{static_cast<char*>(memory)};
    const Workspace at = workspace(carve);
    const MiddleSaved<A> saved(pr, at.saved);
    const BlockShape shape = block_shape(device, pr, sizeof(T), last);
    // All plans come before the first launch.
    typename ChannelStats<T>::Args stats{pr,       f.y,       last, shape.concepts, shape.block, images_per_group(pr.N, stats_groups),
                                         at.means, at.partial};
    SampleArgs_<T> sample = plan_sample(device, shape, at, saved);
    typename ConceptModulate<T>::Args modulate = plan_modulate(device, shape, at, saved);
    if (!fit<ChannelStats<T>>(device, stats, stats.concepts, stats.block) ||
        !fit<ConceptSample<T>>(device, sample, sample.concepts, sample.block) ||
        !fit<ConceptModulate<T>>(device, modulate, modulate.concepts, modulate.block))
      return {0, true};
    if (evaluates()) {
      typename MiddleEvaluate<T>::Args evaluate;
      bool on_chip = plan_evaluation(device, evaluate);
      on_chip = plan_few(device, on_chip ? evaluate.sample.block : sample.block, saved.h, evaluate) || on_chip;
      if (on_chip && evaluate.exchanged != nullptr)
        runner.template launch_together<MiddleEvaluate<T>>(evaluate);
      else if (on_chip)
        runner.template launch<MiddleEvaluate<T>>(evaluate, evaluate.cluster);
      if (on_chip) return runner.status;
    }
    const typename ConceptReason<A>::Args reason{
        pr.N, pr.C, pr.pt, o.edges, saved.h, w.edge, saved.g, o.save ? saved.edges : nullptr, o.state_batch ? at.parts : nullptr};
    const Passes<ChannelStats<T>, ConceptSample<T>, ConceptReason<A>, ConceptModulate<T>> passes{
        stats,
        o.norm == Norm::batch ? ChannelStats<T>::units(stats) : 0,
        {sample,
         ConceptSample<T>::units(sample),
         {reason, modulate.reasoned ? ConceptReason<A>::units(reason) : 0, {modulate, ConceptModulate<T>::units(modulate), {}}}}};
    launch_passes<A>(runner, passes, 2 * map_bytes(pr, sizeof(T)));
    return runner.status;
  }

  SampleArgs_<T> plan_sample(const Device& device, const BlockShape& shape, const Workspace& at, const MiddleSaved<A>& saved) const {
    SampleArgs_<T> a = sample_args();
    a.norm.means = at.means, a.norm.partial = at.partial, a.norm.per_group = images_per_group(pr.N, stats_groups);
    a.norm.mu = saved.mu, a.norm.rstd = saved.rstd, a.norm.s = saved.s;
    a.to = {saved.m, saved.u, saved.r, saved.q, saved.h, saved.softmax, o.save ? saved.R : nullptr};
    a.concepts = shape.concepts, a.block = shape.block;
    choose_memory(device, a);
    return a;
  }
  // What stays in shared memory besides a block of positions.
  static void choose_memory(const Device& device, SampleArgs_<T>& a) {
    a.resident = a.norm.norm != Norm::batch && a.problem.S < int64_t(1) << 24;
    a.shared_R = true;
    if (a.resident && shared_bytes<ConceptSample<T>>(a) > device.shared / 2) a.resident = false;
    if (shared_bytes<ConceptSample<T>>(a) > device.shared / 2) a.shared_R = false;
  }
  typename ConceptModulate<T>::Args plan_modulate(const Device& device, const BlockShape& shape, const Workspace& at,
                                                  const MiddleSaved<A>& saved) const {
    typename ConceptModulate<T>::Args a{};
    a.problem = pr, a.y = f.y, a.out = f.out, a.last = last, a.pixel = pixel, a.concepts = shape.concepts, a.block = shape.block;
    a.chunk = chunk_of(device, pr, shape, 2);
    a.edges = o.edges, a.reasoned = o.state_batch || o.save;
    a.norm = {o.norm == Norm::none, saved.mu, saved.s, w.norm_bias, saved.m};
    a.state_norm = state_norm(at.parts, o.save ? saved.state_norm : nullptr);
    a.edge = w.edge, a.state_weight = w.state_weight, a.state_bias = w.state_bias, a.weights = modulator();
    a.u = saved.u, a.h = saved.h, a.g = saved.g, a.softmax = saved.softmax;
    if (o.save) a.state = saved.state, a.abar = saved.abar, a.bbar = saved.bbar;
    return a;
  }
};

template <class T>
struct MiddleBackwardLaunch {
  using A = acc_t<T>;
  const MiddleBackward<T>& f;
  const Problem& pr;
  const MiddleOptions& o;
  const MiddleParams<A>& w;
  const bool last, pixel;

  explicit MiddleBackwardLaunch(const MiddleBackward<T>& args)
      : f(args), pr(f.problem), o(f.options), w(f.params), last(f.y.layout() == Layout::channels_last),
        pixel(o.modulation == Modulation::pixel) {}

  struct Workspace {
    ModulatorSums_<A> sums;
    A *dstate, *dg, *partial;
    double* parts;
    ImageGradients<A> image;
  };
  int64_t per_group() const { return images_per_group(pr.N, gradient_groups); }
  Workspace workspace(Carver& carve) const {
    const int64_t map = pr.N * pr.channels(), states = pr.N * pr.C * pr.pt, NC = pr.N * pr.C;
    Workspace at{};
    at.sums.E0 = carve.take<A>(map), at.sums.E1 = carve.take<A>(map);
    at.sums.F0 = pixel ? carve.take<A>(map) : at.sums.E0, at.sums.F1 = pixel ? carve.take<A>(map) : at.sums.E1;
    at.sums.K1 = carve.take<A>(pixel ? map : 0), at.sums.K0 = carve.take<A>(pixel ? NC : 0);
    at.dstate = carve.take<A>(states), at.dg = carve.take<A>(states);
    at.partial = carve.take<A>(quotient_up(pr.N, per_group()) * partial_row(pr, o.edges).size());
    at.parts = carve.take<double>(2 * pr.N * pr.pt);
    at.image = image_gradients<A>(carve, pr);
    return at;
  }

  template <class Runner>
  Status run(Runner& runner, void* memory) const {
    const Device& device = runner.device;
    if (pr.N == 0) {
      zero_gradients(runner);
      return runner.status;
    }
    Carver carve{static_cast<char*>(memory)};
    const Workspace at = workspace(carve);
    const MiddleSaved<A> saved(pr, f.saved);
    const BlockShape shape = block_shape(device, pr, sizeof(T), last);
    const NormSeen<A> norm{o.norm == Norm::none, saved.mu, saved.s, w.norm_bias, saved.m};
    const BackwardView<T> view{pr,      f.y,        f.grad_out, last,          pixel,        norm,
                               saved.u, saved.abar, saved.bbar, saved.softmax, w.scale_bias, w.shift_bias};
    typename ModulateBackwardSums<T>::Args sums{view, shape.concepts, shape.block, at.sums};
    typename MiddleInputGrad<T, true>::Args grad{};
    grad.view = view, grad.dy = f.dy, grad.concepts = shape.concepts, grad.block = shape.block, grad.chunk = chunk_of(device, pr, shape, 4);
    grad.sampler = o.sampler, grad.u = saved.u, grad.dr = at.image.dr, grad.constant = at.image.constant, grad.rdr = at.image.rdr;
    grad.K0 = at.sums.K0, grad.batch = o.norm == Norm::batch;
    grad.gradients = {partial_row(pr, o.edges), at.partial, quotient_up(pr.N, per_group()), saved.rstd, f.grads};
    if (o.norm == Norm::none) grad.gradients.to.norm_weight = grad.gradients.to.norm_bias = nullptr;
    if (o.sampler != Sampler::dynamic_query) grad.gradients.to.query = grad.gradients.to.key = nullptr;
    if (o.sampler != Sampler::static_query) grad.gradients.to.logit = nullptr;
    const typename StateNormBackward<A>::Args states{pr.N,
                                                     pr.C,
                                                     pr.pt,
                                                     o.state_batch,
                                                     at.dstate,
                                                     saved.g,
                                                     at.parts,
                                                     w.state_weight,
                                                     saved.state_norm,
                                                     at.dg,
                                                     f.grads.state_weight,
                                                     f.grads.state_bias};
    if (!fit<ModulateBackwardSums<T>>(device, sums, sums.concepts, sums.block) ||
        !fit<MiddleInputGrad<T, true>>(device, grad, grad.concepts, grad.block) ||
        shared_bytes<StateNormBackward<A>>(states) > device.shared)
      return {0, true};
    const typename StateGradients<A>::Args modulated{
        pr, norm, at.sums.F0, at.sums.F1, saved.state, saved.g, saved.state_norm, w.scale_weight, w.shift_weight, at.dstate, at.parts};
    const SampleState<A> state{saved.m, saved.u, saved.r, saved.q, saved.h, saved.softmax, saved.R};
    const SamplerBackward<A> sampler{pr,      o.sampler, norm, {w.value, w.query, w.key, w.logit}, state, pixel ? at.sums.K1 : nullptr,
                                     at.image};
    const typename SmallGradients<A>::Args small{sampler,     o.edges, per_group(), at.dg,       saved.h,      w.edge,
                                                 saved.edges, at.sums, saved.abar,  saved.state, w.scale_bias, at.partial};
    const Passes<ModulateBackwardSums<T>, StateGradients<A>, StateNormBackward<A>, SmallGradients<A>> passes{
        sums,
        ModulateBackwardSums<T>::units(sums),
        {modulated,
         StateGradients<A>::units(modulated),
         {states, StateNormBackward<A>::units(states), {small, SmallGradients<A>::units(small), {}}}}};
    launch_passes<A>(runner, passes, 3 * map_bytes(pr, sizeof(T)));
    runner.template launch<MiddleInputGrad<T, true>>(grad);  // which needs all registers for itself
    return runner.status;
  }

  template <class Runner>
  void zero_gradients(Runner& runner) const {
    const int64_t weights = pr.channels() * pr.pt, channels = pr.channels();
    const int64_t edge = partial_row(pr, o.edges).edges;
    const MiddleGrads<A>& g = f.grads;
    for (A* to : std::initializer_list<A*>{g.value, g.query, g.key, g.scale_weight, g.shift_weight}) runner.zero(to, weights * sizeof(A));
    for (A* to : std::initializer_list<A*>{g.logit, g.scale_bias, g.shift_bias, g.norm_weight, g.norm_bias})
      runner.zero(to, channels * sizeof(A));
    for (A* to : std::initializer_list<A*>{g.state_weight, g.state_bias}) runner.zero(to, pr.pt * sizeof(A));
    runner.zero(g.edge, edge * sizeof(A));
  }
};

}  // namespace vcr::cuda
