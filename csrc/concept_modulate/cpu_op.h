// The op concept_modulate, alone: forward 1R + 1W, backward 2R + 1W (a block's sums and its gradient while it is in cache).
#pragma once
#include "../concept_sample/cpu_forward.h"
#include "args.h"
#include "cpu_backward.h"

namespace vcr {
namespace {

// Coefficients of every (image, channel) with s = 1 and mu = b = 0, and blocks of the map with their normalised attention.
template <class T, int P, int PT>
struct ModulateStage {
  using A = acc_t<T>;
  const Problem& pr;
  const int64_t CP, groups, per_group;
  const bool pixel;
  Scratch<A> coefficients, constants;

  template <class Args>
  explicit ModulateStage(const Args& f)
      : pr(f.problem), CP(pr.channels()), groups(concept_groups(pr)), per_group(concepts_per_gather(pr)), pixel(f.attention != nullptr),
        coefficients(4 * pr.N * CP), constants(2 * CP) {
    for (int64_t j = 0; j < CP; ++j) constants.get()[j] = 0, constants.get()[CP + j] = 1;
    for_ranges(f.pool, pr.N * pr.C, [&](int64_t begin, int64_t end) {
      Scratch<A> bar(2 * pr.p);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = i % pr.C, weights = c * pr.p * pr.pt;
        A *abar = bar.get(), *bbar = abar + pr.p;
        project_state<P, PT>(pr, f.state + i * pr.pt, offset(f.weights.scale_weight, weights), abar);
        project_state<P, PT>(pr, f.state + i * pr.pt, offset(f.weights.shift_weight, weights), bbar);
        const SampleArgs<A> a = concept_args(c);
        modulate_coefficients<P>(pr.p, pixel, a, abar, bbar, f.weights.scale_bias + c * pr.p, f.weights.shift_bias + c * pr.p, pr.N * CP,
                                 coefficients.get() + i * pr.p);
      }
    });
  }
  SampleArgs<A> concept_args(int64_t c) const {
    const A *zero = constants.get() + c * pr.p, *one = zero + CP;
    return {zero, one, zero, nullptr, nullptr};
  }
  ModulateArgs<A> args(int64_t n, int64_t c) const {
    const A* at = coefficients.get() + n * CP + c * pr.p;
    const int64_t stride = pr.N * CP;
    return {constants.get() + c * pr.p, at, at + stride, at + 2 * stride, at + 3 * stride};
  }
  // M / max M over a block, padded with zeros; NaN anywhere makes the maximum, and so everything, NaN as torch.amax does.
  static A maximum_of(const A* attention, int64_t S) {
    A top = attention[0];
    for (int64_t i = 1; i < S; ++i) top = attention[i] > top || attention[i] != attention[i] ? attention[i] : top;
    return top;
  }
  static void normalised(const A* attention, int64_t count, A top, A* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = attention[i] / top;
    for (int64_t i = count; i < round_up(count, lanes<A>); ++i) to[i] = 0;
  }
  template <class F>
  void for_groups(const Parallel& pool, int64_t scratch_size, F body) const {
    for_ranges(pool, pr.N * groups, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(scratch_size);
      for (int64_t i = begin; i < end; ++i)
        body(i / groups, i % groups * per_group, min(pr.C, (i % groups + 1) * per_group), scratch.get());
    });
  }
};

template <class T, int P, int PT>
struct ModulateForwardCpu {
  using A = acc_t<T>;
  const ModulateForward<T>& f;
  explicit ModulateForwardCpu(const ModulateForward<T>& args) : f(args) {}

  void run() const {
    const Problem& pr = f.problem;
    const ModulateStage<T, P, PT> stage(f);
    const bool contiguous = f.z.layout() == Layout::contiguous;
    if (!stage.pixel) {
      if (contiguous)
        for_each(f.pool, pr.N * stage.CP, [&](int64_t i) {
          const int64_t n = i / stage.CP, j = i % stage.CP;
          const ModulateArgs<A> m = stage.args(n, 0);
          modulate_row(f.z.at(n, j, 0), f.out.at(n, j, 0), pr.S, m.mu[j], m.A0[j], m.B0[j], false);
        });
      else
        for_each(f.pool, pr.N * pr.S, [&](int64_t i) {
          const ModulateArgs<A> m = stage.args(i / pr.S, 0);
          modulate_position(f.z.at(i / pr.S, 0, i % pr.S), f.out.at(i / pr.S, 0, i % pr.S), stage.CP, m.mu, m.A0, m.B0, false);
        });
      return;
    }
    stage.for_groups(f.pool, sample_block + stage.per_group * pr.p * sample_block, [&](int64_t n, int64_t c0, int64_t c1, A* scratch) {
      A *weights = scratch, *block = scratch + sample_block;
      for (int64_t begin = 0; begin < pr.S; begin += sample_block) {
        const int64_t count = min(sample_block, pr.S - begin);
        if (!contiguous) gather(f.z.at(n, c0 * pr.p, begin), f.z.position, count, (c1 - c0) * pr.p, block, sample_block);
        for (int64_t c = c0; c < c1; ++c) {
          const A* attention = f.attention + (n * pr.C + c) * pr.S;
          stage.normalised(attention + begin, count, stage.maximum_of(attention, pr.S), weights);
          A* tile = block + (c - c0) * pr.p * sample_block;
          if (contiguous)
            modulate_pixel_block(Tile<T>{f.z.at(n, c * pr.p, begin), f.z.channel}, f.out.at(n, c * pr.p, begin), f.out.channel, count, pr.p,
                                 stage.args(n, c), weights);
          else
            modulate_pixel_block(Tile<A>{tile, sample_block}, tile, sample_block, count, pr.p, stage.args(n, c), weights);
        }
        if (!contiguous) scatter(block, sample_block, count, (c1 - c0) * pr.p, f.out.at(n, c0 * pr.p, begin), f.out.position);
      }
    });
  }
};

template <class T, int P, int PT>
struct ModulateBackwardCpu {
  using A = acc_t<T>;
  const ModulateBackward<T>& f;
  explicit ModulateBackwardCpu(const ModulateBackward<T>& args) : f(args) {}

  // One block of a concept: adds to the four sums [p] and writes dz; k, [count], is sum_ch e (A1 z + B1), dL/dM~.
  template <bool pixel, class AnyTile, class O>
  static void block_gradient(AnyTile z, AnyTile d, O* dz, int64_t dz_row, int64_t count, int64_t p, const ModulateArgs<A>& m,
                             const A* weights, double* E0, double* E1, double* F0, double* F1, A* k) {
    if constexpr (pixel) {
      backward_sums_pixel_block(z, d, count, p, m, weights, E0, E1, F0, F1, k);
    } else {
      for (int64_t j = 0; j < p; ++j) {
        A e0, e1;
        backward_sums_row(z.data + j * z.row, d.data + j * d.row, count, m.mu[j], m.A0[j], m.B0[j], e0, e1);
        E0[j] += double(e0);
        E1[j] += double(e1);
      }
    }
    for (int64_t j = 0; j < p; ++j) {
      const vec<A> A0 = splat(m.A0[j]), B0 = splat(m.B0[j]);
      vec<A> A1 = zeros<A>(), B1 = A1;
      if constexpr (pixel) A1 = splat(m.A1[j]), B1 = splat(m.B1[j]);
      for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
        const vec<A> x = load_some<whole()>(z.data + j * z.row + i, some), grad = load_some<whole()>(d.data + j * d.row + i, some);
        vec<A> out;
        if constexpr (pixel) {
          const vec<A> M = load(weights + i);
          const vec<A> slope = slope_at<A>(M, A0, A1);
          out = slope * where_active<A>(pre_activation<A>(M, slope, x, B0, B1), grad);
        } else {
          out = A0 * where_active<A>(fma(A0, x, B0), grad);
        }
        store_some<whole()>(dz + j * dz_row + i, out, some);
      });
    }
  }

  // dM = dM~ / max M, less the share of the maximum that every tie has.
  static void attention_gradient(const A* attention, int64_t S, A top, A* dattention) {
    double through = 0;
    int64_t ties = 0;
    for (int64_t i = 0; i < S; ++i) {
      through += double(dattention[i]) * double(attention[i]);
      ties += attention[i] == top;
    }
    const A share = A(through / (double(top) * double(top) * double(max(ties, 1))));
    for (int64_t i = 0; i < S; ++i) dattention[i] = dattention[i] / top - (attention[i] == top ? share : A(0));
  }

  template <bool pixel>
  void map_pass(const ModulateStage<T, P, PT>& stage, A* sums) const {
    const Problem& pr = f.problem;
    const bool contiguous = f.z.layout() == Layout::contiguous;
    const int64_t rows = stage.per_group * pr.p, map = pr.N * stage.CP;
    stage.for_groups(f.pool, 2 * sample_block + 2 * rows * sample_block, [&](int64_t n, int64_t c0, int64_t c1, A* scratch) {
      A *weights = scratch, *k = scratch + sample_block, *block = k + sample_block, *grads = block + rows * sample_block;
      Scratch<double> totals(4 * rows);
      double *e0 = totals.get(), *e1 = e0 + rows, *f0 = e1 + rows, *f1 = f0 + rows;
      fill_zero(e0, 4 * rows);
      for (int64_t begin = 0; begin < pr.S; begin += sample_block) {
        const int64_t count = min(sample_block, pr.S - begin);
        if (!contiguous) {
          gather(f.z.at(n, c0 * pr.p, begin), f.z.position, count, (c1 - c0) * pr.p, block, sample_block);
          gather(f.grad_out.at(n, c0 * pr.p, begin), f.grad_out.position, count, (c1 - c0) * pr.p, grads, sample_block);
        }
        for (int64_t c = c0; c < c1; ++c) {
          const int64_t at = (c - c0) * pr.p, i = n * pr.C + c;
          if constexpr (pixel) {
            const A* attention = f.attention + i * pr.S;
            stage.normalised(attention + begin, count, stage.maximum_of(attention, pr.S), weights);
          }
          const ModulateArgs<A> m = stage.args(n, c);
          if (contiguous)
            block_gradient<pixel>(Tile<T>{f.z.at(n, c * pr.p, begin), f.z.channel},
                                  Tile<T>{f.grad_out.at(n, c * pr.p, begin), f.grad_out.channel}, f.dz.at(n, c * pr.p, begin), f.dz.channel,
                                  count, pr.p, m, weights, e0 + at, e1 + at, f0 + at, f1 + at, k);
          else
            block_gradient<pixel>(Tile<A>{block + at * sample_block, sample_block}, Tile<A>{grads + at * sample_block, sample_block},
                                  grads + at * sample_block, sample_block, count, pr.p, m, weights, e0 + at, e1 + at, f0 + at, f1 + at, k);
          if constexpr (pixel)
            for (int64_t x = 0; x < count; ++x) f.dattention[i * pr.S + begin + x] = k[x];
        }
        if (!contiguous) scatter(grads, sample_block, count, (c1 - c0) * pr.p, f.dz.at(n, c0 * pr.p, begin), f.dz.position);
      }
      for (int64_t j = 0; j < (c1 - c0) * pr.p; ++j) {
        A* to = sums + n * stage.CP + c0 * pr.p + j;
        to[0] = A(e0[j]), to[map] = A(e1[j]);
        to[2 * map] = pixel ? A(f0[j]) : A(e0[j]), to[3 * map] = pixel ? A(f1[j]) : A(e1[j]);
      }
      if constexpr (pixel)
        for (int64_t c = c0; c < c1; ++c) {
          const int64_t i = n * pr.C + c;
          const A* attention = f.attention + i * pr.S;
          attention_gradient(attention, pr.S, stage.maximum_of(attention, pr.S), f.dattention + i * pr.S);
        }
    });
  }

  void run() const {
    const Problem& pr = f.problem;
    const ModulateStage<T, P, PT> stage(f);
    const int64_t map = pr.N * stage.CP;
    Scratch<A> sums(4 * map);
    if (stage.pixel)
      map_pass<true>(stage, sums.get());
    else
      map_pass<false>(stage, sums.get());
    for (A* to : {f.dscale_weight, f.dshift_weight}) fill_zero(to, stage.CP * pr.pt);
    for (A* to : {f.dscale_bias, f.dshift_bias}) fill_zero(to, stage.CP);
    for_each(f.pool, pr.C, [&](int64_t c) {
      const int64_t weights = c * pr.p * pr.pt;
      const ModulatorGrads<A> g{offset(f.dscale_weight, weights), offset(f.dshift_weight, weights), f.dscale_bias + c * pr.p,
                                f.dshift_bias + c * pr.p};
      for (int64_t n = 0; n < pr.N; ++n) {
        const A* at = sums.get() + n * stage.CP + c * pr.p;
        const int64_t k = (n * pr.C + c) * pr.pt;
        modulator_backward<P, PT>(pr, stage.concept_args(c), ModulatorSums<A>{at, at + map, at + 2 * map, at + 3 * map}, f.state + k,
                                  offset(f.weights.scale_weight, weights), offset(f.weights.shift_weight, weights), g,
                                  ModulatorNormGrads<A>{}, f.dstate + k);
      }
    });
  }
};

}  // namespace
}  // namespace vcr
