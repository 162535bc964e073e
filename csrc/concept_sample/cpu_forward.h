// The concept sampler over a map: the stage that the fused middle shares, and the op alone.
#pragma once
#include "cpu_natural.h"
#include "cpu_tile.h"

namespace vcr {
namespace {

VCR_INLINE int64_t concept_groups(const Problem& pr) { return (pr.C + concepts_per_gather(pr) - 1) / concepts_per_gather(pr); }
VCR_INLINE int64_t sample_concept_scratch(const Problem& pr) { return sample_scratch(pr) + round_up(pr.p, 16); }

// What a sampler leaves behind besides the states.
enum class Keep {
  nothing,  // and no softmax
  softmax,  // pixel modulation's, or the returned attention's
  ties      // and at how many positions its maximum stands
};

// One (image, concept); with `means`, the tile's means are taken here, while it is in cache. attention: [S] or null.
template <int P, int PT, class A, class AnyTile>
void sample_concept(const Problem& pr, Sampler sampler, const NormView<A>& view, const SampleWeights<A>& w, const SampleState<A>& to,
                    bool means, Keep keep, int64_t n, int64_t c, AnyTile tile, A* attention, A* scratch) {
  const int64_t at = n * pr.channels() + c * pr.p, k = (n * pr.C + c) * pr.pt, weights = c * pr.p * pr.pt;
  const A* pivot = view.mhat_stride != 0 ? view.mu + c * pr.p : nullptr;
  if (means) rows_means(tile.data, tile.row, pr.p, pr.S, pivot, to.m + at);
  if (means && view.mhat_stride == 0 && sampler == Sampler::static_query)  // the mean is a centre and nothing else
    for (int64_t j = at; j < at + pr.p; ++j) to.m[j] = to.m[j] - to.m[j] == 0 ? to.m[j] : A(0);
  A *v = scratch, *r = to.r + at, *e = scratch + round_up(pr.p, 16);
  const SampleArgs<A> a = view.concept_args(pr, n, c, v);
  sample_prologue<P, PT>(pr, sampler, a, offset(w.query, weights), offset(w.key, weights), offset(w.logit, c * pr.p), to.q + k, to.u + at,
                         v);
  if (sampler == Sampler::pool) {
    for (int64_t j = 0; j < pr.p; ++j) r[j] = a.mhat[j];
  } else if (keep == Keep::nothing) {
    for (int64_t j = 0; j < pr.p; ++j) v[j] *= A(log2_e);
    attend_tile<P>(tile, pr.S, pr.p, a.mu, v, e, r);
  } else {
    to.softmax[n * pr.C + c] =
        sample_tile<P, PT>(pr, tile, a, w.value + weights, keep == Keep::ties, e, r, to.R ? to.R + at * pr.pt : nullptr);
  }
  sample_epilogue<P, PT>(pr, a, r, w.value + weights, to.h + k, v);
  if (attention != nullptr) {
    const bool pool = sampler == Sampler::pool;
    const A scale = A(1) / (pool ? A(pr.S) : to.softmax[n * pr.C + c].sum);
    for (int64_t i = 0; i < pr.S; ++i) attention[i] = pool ? scale : e[i] * scale;
  }
}

template <int P>
VCR_INLINE int64_t sample_natural_scratch(int64_t concepts) {
  const int64_t channels = concepts * P;
  return round_up(channels, 16) + P + max(3 * channels, NaturalAttention<P>::scratch(channels));
}
// The same for concepts [c0, c1) of a channels_last image, where no backward pass will follow and no attention is asked for.
template <int P, int PT, class T>
void sample_natural(const Problem& pr, Sampler sampler, const NormView<float>& view, const SampleWeights<float>& w,
                    const SampleState<float>& to, bool means, const Map<const T>& y, int64_t n, int64_t c0, int64_t c1, float* scratch) {
  const int64_t channels = (c1 - c0) * P, first = n * pr.channels() + c0 * P;
  const T* from = y.at(n, c0 * P, 0);
  float *v = scratch, *bar = v + round_up(channels, 16), *memory = bar + P;
  if (means) {
    const float* pivot = view.mhat_stride != 0 ? view.mu + c0 * P : nullptr;
    double* total = reinterpret_cast<double*>(memory);
    natural_means(from, y.position, pr.S, channels, pivot, memory + 2 * channels, total, to.m + first);
  }
  for (int64_t c = c0; c < c1; ++c) {
    const int64_t at = n * pr.channels() + c * P, weights = c * P * PT;
    sample_prologue<P, PT>(pr, sampler, view.concept_args(pr, n, c, nullptr), offset(w.query, weights), offset(w.key, weights),
                           offset(w.logit, c * P), to.q + (n * pr.C + c) * PT, to.u + at, v + (c - c0) * P);
  }
  if (sampler == Sampler::pool) {
    const float* mhat = view.concept_args(pr, n, c0, nullptr).mhat;
    for (int64_t j = 0; j < channels; ++j) to.r[first + j] = mhat[j];
  } else {
    for (int64_t j = 0; j < channels; ++j) v[j] *= float(log2_e);
    NaturalAttention<P>(channels, view.concept_args(pr, n, c0, nullptr).mu, v, memory).run(from, y.position, pr.S, to.r + first);
  }
  for (int64_t c = c0; c < c1; ++c)
    sample_epilogue<P, PT>(pr, view.concept_args(pr, n, c, nullptr), to.r + n * pr.channels() + c * P, w.value + c * P * PT,
                           to.h + (n * pr.C + c) * PT, bar);
}

template <class T, int P, int PT>
struct SampleForwardCpu {
  using A = acc_t<T>;
  const SampleForward<T>& f;
  explicit SampleForwardCpu(const SampleForward<T>& args) : f(args) {}

  void run() const {
    const Problem& pr = f.problem;
    const int64_t groups = concept_groups(pr), size = concepts_per_gather(pr);
    const SampleState<A> state = sample_state(pr, f.saved, f.h, f.save);
    const Keep keep = f.save || f.attention != nullptr ? Keep::softmax : Keep::nothing;
    Scratch<A> constants(2 * pr.channels());
    A *ones = constants.get(), *zero = ones + pr.channels();
    for (int64_t j = 0; j < pr.channels(); ++j) ones[j] = 1, zero[j] = 0;
    const NormView<A> view{state.m, ones, state.m, pr.channels(), zero, 0};
    for_ranges(f.pool, pr.N * groups, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(sample_concept_scratch(pr)), buffer(visit_scratch(pr, f.z));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / groups, c0 = i % groups * size, c1 = min(pr.C, c0 + size);
        visit_tiles(pr, f.z, n, c0, c1, buffer.get(), [&](int64_t c, auto tile) {
          sample_concept<P, PT>(pr, f.sampler, view, f.weights, state, true, keep, n, c, tile, offset(f.attention, (n * pr.C + c) * pr.S),
                                scratch.get());
        });
      }
    });
  }
};

}  // namespace
}  // namespace vcr
