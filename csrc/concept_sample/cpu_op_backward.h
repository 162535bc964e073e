// The op concept_sample backward, alone: 1R + 1W, and one more read where the returned attention has a gradient.
#pragma once
#include "../vcr_middle/cpu_input_grad.h"
#include "cpu_backward.h"
#include "cpu_forward.h"

namespace vcr {
namespace {

template <class T, int P, int PT>
struct SampleBackwardCpu {
  using A = acc_t<T>;
  const SampleBackward<T>& f;
  explicit SampleBackwardCpu(const SampleBackward<T>& args) : f(args) {}

  // extra_i = a_i (dM_i - sum a dM), what the attention's gradient adds to the logits', and K1 = sum extra_i yhat_i.
  template <class AnyTile>
  void attention_gradient(const Problem& pr, AnyTile tile, const SampleArgs<A>& a, const Softmax<A>& softmax, const A* dattention, A* extra,
                          A* K1, A* e) const {
    for (int64_t i = 0; i < pr.S; i += sample_block) logits<P>(tile, i, min(sample_block, pr.S - i), pr.p, a.mu, a.v, e + i);
    const vec<A> top = splat(softmax.maximum);
    const A inverse = A(1) / softmax.sum;
    double total = 0;
    for (int64_t i = 0; i < pr.S; i += lanes<A>) store(e + i, exp_nonpositive(load(e + i) - top) * inverse);
    for (int64_t i = 0; i < pr.S; ++i) total += double(e[i]) * double(dattention[i]);
    for (int64_t i = 0; i < pr.S; ++i) e[i] = extra[i] = e[i] * (dattention[i] - A(total));
    for (int64_t i = pr.S; i < round_up(pr.S, lanes<A>); ++i) e[i] = 0;
    for (int64_t j = 0; j < pr.p; ++j) K1[j] = 0;
    for (int64_t i = 0; i < pr.S; i += moment_block<A>) add_first_moment<P>(tile, i, min(moment_block<A>, pr.S - i), pr.p, a.mu, e + i, K1);
  }

  void run() const {
    const Problem& pr = f.problem;
    const int64_t CP = pr.channels(), NC = pr.N * pr.C, groups = concept_groups(pr), per_group = concepts_per_gather(pr);
    const bool extra_wanted = f.dattention != nullptr && f.sampler != Sampler::pool;
    const SampleState<A> state = sample_state(pr, f.saved, static_cast<A*>(nullptr), true);
    Scratch<A> constants(3 * CP), memory(4 * pr.N * CP + NC + (extra_wanted ? NC * pr.S : 0));
    A *ones = constants.get(), *unused = ones + CP, *zero = unused + CP;  // without a batch norm nobody asks for ds and db
    A *v = memory.get(), *dr = v + pr.N * CP, *constant = dr + pr.N * CP, *K1 = constant + pr.N * CP, *rdr = K1 + pr.N * CP,
      *extra = rdr + NC;
    for (int64_t j = 0; j < CP; ++j) ones[j] = 1, zero[j] = 0;
    const NormView<A> view{state.m, ones, state.m, CP, zero, 0};
    const auto for_groups = [&](int64_t scratch_size, auto body) {
      for_ranges(f.pool, pr.N * groups, [&](int64_t begin, int64_t end) {
        Scratch<A> scratch(scratch_size), buffer(visit_scratch(pr, f.z));
        for (int64_t i = begin; i < end; ++i)
          body(i / groups, i % groups * per_group, min(pr.C, (i % groups + 1) * per_group), scratch.get(), buffer.get());
      });
    };
    if (extra_wanted) {
      for_groups(round_up(pr.S, 16) + sample_block, [&](int64_t n, int64_t c0, int64_t c1, A* scratch, A* buffer) {
        visit_tiles(pr, f.z, n, c0, c1, buffer, [&](int64_t c, auto tile) {
          const int64_t at = n * CP + c * pr.p, i = n * pr.C + c;
          attention_gradient(pr, tile, view.concept_args(pr, n, c, state.u + at), state.softmax[i], f.dattention + i * pr.S,
                             extra + i * pr.S, K1 + at, scratch);
        });
      });
    }
    for (A* to : {f.dvalue, f.dquery, f.dkey}) fill_zero(to, CP * pr.pt);
    fill_zero(f.dlogit, CP);
    for_ranges(f.pool, pr.C, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(sample_backward_scratch(pr) + 2 * pr.p);
      for (int64_t c = begin; c < end; ++c) {
        const int64_t weights = c * pr.p * pr.pt;
        A* sums = scratch.get() + sample_backward_scratch(pr);
        fill_zero(sums, 2 * pr.p);
        const SampleGrads<A> g{f.dvalue + weights, offset(f.dquery, weights), offset(f.dkey, weights), offset(f.dlogit, c * pr.p), sums,
                               sums + pr.p};
        for (int64_t n = 0; n < pr.N; ++n) {
          const int64_t at = n * CP + c * pr.p, k = (n * pr.C + c) * pr.pt;
          sample_backward<P, PT>(pr, f.sampler, view.concept_args(pr, n, c, nullptr), f.weights.value + weights,
                                 offset(f.weights.query, weights), offset(f.weights.key, weights), f.dh + k, state.u + at, state.r + at,
                                 state.q + k, state.R + at * pr.pt, extra_wanted ? K1 + at : nullptr, g, dr + at, v + at, constant + at,
                                 rdr[n * pr.C + c], scratch.get());
        }
      }
    });
    const bool contiguous = f.z.layout() == Layout::contiguous;
    for_groups(input_grad_scratch() + per_group * pr.p * grad_row, [&](int64_t n, int64_t c0, int64_t c1, A* scratch, A*) {
      A* block = scratch + input_grad_scratch();
      for (int64_t begin = 0, step = block_of(f.z); begin < pr.S; begin += step) {
        const int64_t count = min(step, pr.S - begin);
        if (!contiguous) gather(f.z.at(n, c0 * pr.p, begin), f.z.position, count, (c1 - c0) * pr.p, block, grad_row);
        for (int64_t c = c0; c < c1; ++c) {
          const int64_t at = n * CP + c * pr.p, i = n * pr.C + c;
          const ModulateArgs<A> unmodulated{state.m + at, nullptr, nullptr, nullptr, nullptr};
          const InputGradArgs<A> g{unmodulated,
                                   v + at,
                                   dr + at,
                                   constant + at,
                                   zero,
                                   extra_wanted ? extra + i * pr.S : nullptr,
                                   state.softmax[i],
                                   rdr[i],
                                   A(0),
                                   f.sampler != Sampler::pool,
                                   false};
          if (contiguous) {
            const Tile<T> none{nullptr, 0};
            input_grad_block<P, false, false>(Tile<T>{f.z.at(n, c * pr.p, begin), f.z.channel}, none, f.dz.at(n, c * pr.p, begin),
                                              f.dz.channel, begin, count, pr.S, pr.p, g, scratch);
          } else {
            A* tile = block + (c - c0) * pr.p * grad_row;
            input_grad_block<P, false, false>(Tile<A>{tile, grad_row}, Tile<A>{nullptr, 0}, tile, grad_row, begin, count, pr.S, pr.p, g,
                                              scratch);
          }
        }
        if (!contiguous) scatter(block, grad_row, count, (c1 - c0) * pr.p, f.dz.at(n, c0 * pr.p, begin), f.dz.position);
      }
    });
  }
};

}  // namespace
}  // namespace vcr
