// The fused middle forward: order of passes and who owns what. Training 3R + 1W; evaluation 2R + 1W at most, of which the second
// read finds the map in cache where an image fits it.
#pragma once
#include "../channel_stats/cpu_batch.h"
#include "../concept_reason/cpu.h"
#include "../concept_sample/cpu_forward.h"
#include "cpu_view.h"

namespace vcr {
namespace {

template <class T, int P, int PT>
struct MiddleForwardCpu {
  using A = acc_t<T>;
  const MiddleForward<T>& f;
  const Problem& pr;
  const MiddleOptions& o;
  const MiddleParams<A>& w;
  MiddleSaved<A> saved;
  Scratch<A> constants, coefficients;
  Scratch<double> state_memory;
  const StateNorm state_norm;
  NormView<A> view;
  const int64_t CP, NC, groups, per_group;
  const bool pixel, natural;

  explicit MiddleForwardCpu(const MiddleForward<T>& args)
      : f(args), pr(f.problem), o(f.options), w(f.params), saved(pr, f.saved, f.late), constants(2 * pr.channels()),
        coefficients(4 * pr.N * pr.channels()), state_memory(2 * pr.pt), state_norm{state_memory.get(), state_memory.get() + pr.pt},
        CP(pr.channels()), NC(pr.N * pr.C), groups(concept_groups(pr)), per_group(concepts_per_gather(pr)),
        pixel(o.modulation == Modulation::pixel), natural(samples_naturally()) {
    view = norm_view(pr, o.norm, saved, w, constants.get());
  }

  void tick(Pass pass) const {
    if (f.clock != nullptr) f.clock(pass);
  }

  // Images are merged in order, in double: Chan's formula. saved.m becomes the mean of yhat = y - mu, with mu as it is rounded.
  void merge_stats(const Total* totals, const double* squares) const {
    const double size = double(pr.S), count = double(pr.N) * size;
    for_each(f.pool, (CP + 127) / 128, [&](int64_t chunk) {
      const int64_t first = chunk * 128, end = min(CP, first + 128);
      Total sums[128];
      double off[128], m2[128];  // of the batch's mean from mu
      for (int64_t n = 0; n < pr.N; ++n)
        for (int64_t j = first; j < end; ++j) add<A>(sums[j - first], totals[n * CP + j]);
      for (int64_t j = first; j < end; ++j) {
        const Total& sum = sums[j - first];
        saved.mu[j] = A((sum.sum + sum.error) / count);
        off[j - first] = mean_less<A>(sum, count, double(saved.mu[j]));
        m2[j - first] = 0;
      }
      for (int64_t n = 0; n < pr.N; ++n)
        for (int64_t j = first; j < end; ++j) {
          const double m = mean_less<A>(totals[n * CP + j], size, double(saved.mu[j])), d = m - off[j - first];
          saved.m[n * CP + j] = A(m);
          m2[j - first] += squares[n * CP + j] + size * d * d;
        }
      for (int64_t j = first; j < end; ++j) {
        const double sum = m2[j - first];
        saved.rstd[j] = count > 0 ? A(1.0 / __builtin_sqrt(sum / count + o.norm_eps)) : A(0);  // no image: gradients of 0, not NaN
        f.norm_mean[j] = saved.mu[j];
        f.norm_var[j] = A(sum / (count - 1));
      }
    });
  }
  void given_stats() const {
    for (int64_t j = 0; j < CP; ++j) {
      saved.mu[j] = w.norm_mean[j];
      saved.rstd[j] = A(1.0 / __builtin_sqrt(double(w.norm_var[j]) + o.norm_eps));
    }
  }
  void scale_channels() const {
    for (int64_t j = 0; j < CP; ++j) saved.s[j] = saved.rstd[j] * (w.norm_weight ? w.norm_weight[j] : A(1));
  }

  // Pass 2 for concepts [c0, c1) of image n.
  void sample(int64_t n, int64_t c0, int64_t c1, A* buffer, A* scratch) const {
    const SampleWeights<A> weights{w.value, w.query, w.key, w.logit};
    const SampleState<A> state{saved.m, saved.u, saved.r, saved.q, saved.h, saved.softmax, o.save ? saved.R : nullptr};
    if constexpr (natural_channels_last<A, P>)
      if (natural) return sample_natural<P, PT>(pr, o.sampler, view, weights, state, o.norm != Norm::batch, f.y, n, c0, c1, scratch);
    const Keep keep = !pixel && !o.save ? Keep::nothing : pixel && o.save ? Keep::ties : Keep::softmax;
    visit_tiles(pr, f.y, n, c0, c1, buffer, [&](int64_t c, auto tile) {
      sample_concept<P, PT>(pr, o.sampler, view, weights, state, o.norm != Norm::batch, keep, n, c, tile, static_cast<A*>(nullptr),
                            scratch);
    });
  }
  int64_t sample_memory(int64_t concepts) const {
    if constexpr (natural_channels_last<A, P>)
      if (natural) return sample_natural_scratch<P>(concepts);
    return sample_concept_scratch(pr);
  }
  int64_t sample_buffer() const { return natural ? 0 : visit_scratch(pr, f.y); }
  // Whether the map is sampled as it lies. Pixel modulation computes the logits anew and takes the order of sums that tiles have.
  bool samples_naturally() const {
    if constexpr (natural_channels_last<A, P>)
      return f.y.layout() == Layout::channels_last && !o.save && !pixel && NaturalAttention<P>::fits(CP);
    return false;
  }

  // G of image n; its edges are kept for the backward pass, or else in `edges`.
  void reason(int64_t n, A* scratch, A* edges) const {
    const int64_t states = n * pr.C * pr.pt;
    reason_image(pr.C, pr.pt, o.edges, saved.h + states, w.edge, o.save ? saved.edges + n * pr.C * pr.C : edges, saved.g + states, scratch);
  }
  // From G to the modulator's coefficients of image n.
  void finish_states(int64_t n) const {
    const int64_t states = n * pr.C * pr.pt;
    normalise_states(pr.C, pr.pt, saved.g + states, state_norm, w.state_weight, w.state_bias, saved.state + states);
    for (int64_t c = 0; c < pr.C; ++c) modulation(n, c);
  }
  void modulation(int64_t n, int64_t c) const {
    const int64_t at = n * CP + c * pr.p, weights = c * pr.p * pr.pt;
    const A* state = saved.state + (n * pr.C + c) * pr.pt;
    project_state<P, PT>(pr, state, offset(w.scale_weight, weights), saved.abar + at);
    project_state<P, PT>(pr, state, offset(w.shift_weight, weights), saved.bbar + at);
    const SampleArgs<A> a = view.concept_args(pr, n, c, nullptr);
    modulate_coefficients<P>(pr.p, pixel, a, saved.abar + at, saved.bbar + at, w.scale_bias + c * pr.p, w.shift_bias + c * pr.p, pr.N * CP,
                             coefficients.get() + at);
  }
  ModulateArgs<A> modulate_args(int64_t n, int64_t c) const {
    const A* at = coefficients.get() + n * CP + c * pr.p;
    const int64_t stride = pr.N * CP;
    return {pixel ? view.mu + n * view.image_stride + c * pr.p : at + 2 * stride, at, at + stride, at + 2 * stride, at + 3 * stride};
  }

  // Pass 3, channel modulation: rows [begin, end) of the contiguous image, or positions of the channels_last one.
  VCR_KERNEL void modulate_rows(int64_t n, int64_t begin, int64_t end) const {
    const ModulateArgs<A> m = modulate_args(n, 0);
    const bool stream = streams<T>(pr);
    if (f.y.layout() == Layout::contiguous)
      for (int64_t j = begin; j < end; ++j) modulate_row(f.y.at(n, j, 0), f.out.at(n, j, 0), pr.S, m.mu[j], m.A0[j], m.B0[j], stream);
    else
      for (int64_t i = begin; i < end; ++i) modulate_position(f.y.at(n, 0, i), f.out.at(n, 0, i), CP, m.mu, m.A0, m.B0, stream);
    if (stream) finish_stream();
  }
  int64_t rows_of_image() const { return f.y.layout() == Layout::contiguous ? CP : pr.S; }

  // Pass 3, pixel modulation: attention is recomputed block by block.
  void modulate_pixel(int64_t n, int64_t c0, int64_t c1, A* scratch) const {
    A *attention = scratch, *v = scratch + in_place_block, *in = v + round_up(pr.p, 16);
    for (int64_t begin = 0, step = block_of(f.y); begin < pr.S; begin += step) {
      const int64_t count = min(step, pr.S - begin);
      for_block(f.y, n, c0, c1, begin, count, in, [&](int64_t c, auto tile) {
        const ModulateArgs<A> m = modulate_args(n, c);
        const A* u = saved.u + n * CP + c * pr.p;
        for (int64_t j = 0; j < pr.p; ++j) v[j] = view.s[c * pr.p + j] * u[j];
        logits<P>(tile, 0, count, pr.p, m.mu, v, attention);
        const vec<A> top = splat(saved.softmax[n * pr.C + c].maximum);
        for (int64_t i = 0; i < count; i += lanes<A>) store(attention + i, exp_nonpositive(load(attention + i) - top));
        if (f.y.layout() == Layout::contiguous)
          modulate_pixel_block(tile, f.out.at(n, c * pr.p, begin), f.out.channel, count, pr.p, m, attention);
        else
          modulate_pixel_block(tile, in + (c - c0) * pr.p * grad_row, grad_row, count, pr.p, m, attention);
      });
      if (f.y.layout() != Layout::contiguous) scatter(in, grad_row, count, (c1 - c0) * pr.p, f.out.at(n, c0 * pr.p, begin), f.out.position);
    }
  }
  // f(c, tile) over positions [begin, begin + count) of concepts [c0, c1); buffer rows are grad_row apart.
  template <class F>
  void for_block(const Map<const T>& y, int64_t n, int64_t c0, int64_t c1, int64_t begin, int64_t count, A* buffer, F visit) const {
    if (y.layout() == Layout::contiguous) {
      for (int64_t c = c0; c < c1; ++c) visit(c, Tile<T>{y.at(n, c * pr.p, begin), y.channel});
    } else {
      gather(y.at(n, c0 * pr.p, begin), y.position, count, (c1 - c0) * pr.p, buffer, grad_row);
      for (int64_t c = c0; c < c1; ++c) visit(c, Tile<A>{buffer + (c - c0) * pr.p * grad_row, grad_row});
    }
  }
  int64_t pixel_memory() const { return in_place_block + round_up(pr.p, 16) + per_group * pr.p * grad_row; }

  void modulate_all() const {
    if (pixel) {
      for_ranges(f.pool, pr.N * groups, [&](int64_t begin, int64_t end) {
        Scratch<A> scratch(pixel_memory());
        for (int64_t i = begin; i < end; ++i)
          modulate_pixel(i / groups, i % groups * per_group, min(pr.C, (i % groups + 1) * per_group), scratch.get());
      });
    } else {
      // Chunks small and equal enough for threads to have the same.
      const int64_t rows = rows_of_image(), most = max(1, 8192 / (f.y.layout() == Layout::contiguous ? pr.S : CP));
      const int64_t chunks = (rows + most - 1) / most, size = (rows + chunks - 1) / chunks;
      for_each(f.pool, pr.N * chunks, [&](int64_t i) { modulate_rows(i / chunks, i % chunks * size, min(rows, (i % chunks + 1) * size)); });
    }
  }

  void sample_all() const {
    const int64_t size = natural ? max(1, 64 / pr.p) : per_group, units = (pr.C + size - 1) / size;
    for_ranges(f.pool, pr.N * units, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(sample_memory(size)), buffer(sample_buffer());
      for (int64_t i = begin; i < end; ++i)
        sample(i / units, i % units * size, min(pr.C, (i % units + 1) * size), buffer.get(), scratch.get());
    });
  }

  // Every pass over the whole batch before the next: the batch's statistics, or the states', are a barrier.
  void run_in_passes() const {
    if (o.norm == Norm::batch) {
      Scratch<Total> totals(pr.N * CP);
      Scratch<double> squares(pr.N * CP);
      channel_totals(pr, f.y, f.pool, totals.get(), squares.get());
      merge_stats(totals.get(), squares.get());
      scale_channels();
      tick(Pass::channel_stats);
    }
    sample_all();
    tick(Pass::concept_sample);
    for_ranges(f.pool, pr.N, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(reason_scratch(pr.C, pr.pt)), edges(o.save ? 0 : pr.C * pr.C);
      for (int64_t n = begin; n < end; ++n) {
        reason(n, scratch.get(), edges.get());
        if (!o.state_batch) finish_states(n);
      }
    });
    if (o.state_batch) {
      batch_state_norm(NC, pr.pt, o.state_eps, saved.g, state_norm, f.state_mean, f.state_var, saved.state_norm);
      for_each(f.pool, pr.N, [&](int64_t n) { finish_states(n); });
    }
    tick(Pass::reason);
    modulate_all();
    tick(Pass::concept_modulate);
  }

  // Evaluation with images for every thread: an image goes through all stages while it is in cache.
  void run_by_image() const {
    for_ranges(f.pool, pr.N, [&](int64_t begin, int64_t end) {
      const int64_t size = natural ? pr.C : per_group;
      Scratch<A> scratch(max(sample_memory(size), max(reason_scratch(pr.C, pr.pt), pixel_memory()))), buffer(sample_buffer());
      Scratch<A> edges(o.save ? 0 : pr.C * pr.C);
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t c = 0; c < pr.C; c += size) sample(n, c, min(pr.C, c + size), buffer.get(), scratch.get());
        reason(n, scratch.get(), edges.get());
        finish_states(n);
        if (pixel)
          for (int64_t g = 0; g < groups; ++g) modulate_pixel(n, g * per_group, min(pr.C, (g + 1) * per_group), scratch.get());
        else
          modulate_rows(n, 0, rows_of_image());
      }
    });
    tick(Pass::concept_sample);
  }

  // Of several ops: the sampler's pass, the states before their norm, and this batch's part of their statistics.
  void run_states() const {
    sample_all();
    tick(Pass::concept_sample);
    for_ranges(f.pool, pr.N, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(reason_scratch(pr.C, pr.pt));
      for (int64_t n = begin; n < end; ++n) reason(n, scratch.get(), nullptr);
    });
    if (NC > 0)
      state_moments(NC, pr.pt, saved.g, f.moments, f.moments + pr.pt);
    else
      fill_zero(f.moments, 2 * pr.pt);
    tick(Pass::reason);
  }
  // And the rest, with the states' statistics.
  void run_modulate() const {
    for (int64_t k = 0; k < pr.pt; ++k) state_norm.mean[k] = f.state_norm[k], state_norm.rstd[k] = f.state_norm[pr.pt + k];
    for_each(f.pool, pr.N, [&](int64_t n) { finish_states(n); });
    tick(Pass::reason);
    modulate_all();
    tick(Pass::concept_modulate);
  }

  void run() const {
    if (f.step == ForwardStep::modulate) return run_modulate();
    if (o.norm == Norm::given) {
      given_stats();
      scale_channels();
    }
    if (f.step == ForwardStep::states) return run_states();
    if (!o.state_batch) given_state_norm(pr.pt, o.state_eps, w.state_mean, w.state_var, state_norm, saved.state_norm);
    const bool shared_evenly = pr.N >= 2 * f.pool.threads || pr.N % f.pool.threads == 0;
    if (o.norm != Norm::batch && !o.state_batch && shared_evenly)
      run_by_image();
    else
      run_in_passes();
  }
};

}  // namespace
}  // namespace vcr
