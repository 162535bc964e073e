// The sampler's algebra on numbers of size (p, pt): query, key and value of one (image, concept). Contract stage 2, Eq. 1 and 2.
#pragma once
#include "../common/variants.h"
#include "../cpu/small_algebra.h"
#include "args.h"

namespace vcr {
namespace {

// Where no backward pass will follow, logits are in units of log2 and a softmax is summed in one sweep: weights are relative to the
// largest logit of the first block of positions, and what was summed is scaled only where a later logit is larger by more than this, so
// that hardly a block has to be.
constexpr float softmax_slack = 6;
constexpr double log2_e = 1.44269504088896341;

// zbar = s * mhat + b, q = zbar Wq, u = Wk q / sqrt(pt); static: u is the learned vector. Writes q [pt], u [p], v = s * u [p].
template <int P, int PT, class A>
VCR_INLINE void sample_prologue(const Problem& pr, Sampler sampler, const SampleArgs<A>& a, const A* query, const A* key, const A* logit,
                                A* q, A* u, A* v) {
  const Width<P, PT> size(pr);
  if (sampler == Sampler::dynamic_query) {
    for_channels<A, P>(pr.p, [&](int64_t j, auto by) { by.store(v + j, fma(by.load(a.s + j), by.load(a.mhat + j), by.load(a.b + j))); });
    project(size, v, query, q);
    project_back(size, key, q, u);
    const A scale = A(1) / vcr::sqrt(A(size.pt()));
    for_channels<A, P>(pr.p, [&](int64_t j, auto by) {
      const auto x = by.load(u + j) * by.splat(scale);
      by.store(u + j, x);
      by.store(v + j, by.load(a.s + j) * x);
    });
  } else {
    for (int64_t j = 0; j < size.p(); ++j) {
      u[j] = sampler == Sampler::static_query ? logit[j] : A(0);
      v[j] = a.s[j] * u[j];
    }
  }
}

// h = (s * r + b) Wv, r the centred weighted mean. scratch [p].
template <int P, int PT, class A>
VCR_INLINE void sample_epilogue(const Problem& pr, const SampleArgs<A>& a, const A* r, const A* value, A* h, A* scratch) {
  const Width<P, PT> size(pr);
  for_channels<A, P>(pr.p, [&](int64_t j, auto by) { by.store(scratch + j, fma(by.load(a.s + j), by.load(r + j), by.load(a.b + j))); });
  project(size, scratch, value, h);
}

}  // namespace
}  // namespace vcr
