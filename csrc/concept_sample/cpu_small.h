// The sampler's algebra on numbers of size (p, pt): query, key and value of one (image, concept). Contract stage 2, Eq. 1 and 2.
#pragma once
#include "../common/variants.h"
#include "../cpu/parallel.h"
#include "args.h"

namespace vcr {
namespace {

// p and pt as constants where they are compiled in (P, PT > 0), as the problem has them otherwise.
template <int P, int PT>
struct Width {
  const int64_t p_, pt_;
  explicit Width(const Problem& pr) : p_(pr.p), pt_(pr.pt) {}
  VCR_INLINE int64_t constant(int fixed, int64_t given) { return fixed > 0 ? fixed : given; }
  __attribute__((always_inline)) int64_t p() const { return constant(P, p_); }
  __attribute__((always_inline)) int64_t pt() const { return constant(PT, pt_); }
};

// zbar = s * (m - mu) + b, q = zbar Wq, u = Wk q / sqrt(pt); static: u is the learned vector. Writes q [pt], u [p], v = s * u [p].
template <int P, int PT, class A>
VCR_INLINE void sample_prologue(const Problem& pr, Sampler sampler, const SampleArgs<A>& a, const A* m, const A* query, const A* key,
                                const A* logit, A* q, A* u, A* v) {
  const Width<P, PT> w(pr);
  if (sampler == Sampler::dynamic_query) {
    for (int64_t k = 0; k < w.pt(); ++k) q[k] = 0;
    for (int64_t j = 0; j < w.p(); ++j) {
      const A z = a.s[j] * (m[j] - a.mu[j]) + a.b[j];
      for (int64_t k = 0; k < w.pt(); ++k) q[k] += z * query[j * w.pt() + k];
    }
    const A scale = A(1) / vcr::sqrt(A(w.pt()));
    for (int64_t j = 0; j < w.p(); ++j) {
      A x = 0;
      for (int64_t k = 0; k < w.pt(); ++k) x += key[j * w.pt() + k] * q[k];
      u[j] = x * scale;
    }
  } else {
    for (int64_t j = 0; j < w.p(); ++j) u[j] = sampler == Sampler::static_query ? logit[j] : A(0);
  }
  for (int64_t j = 0; j < w.p(); ++j) v[j] = a.s[j] * u[j];
}

// h = (s * r + b) Wv, r the centred weighted mean.
template <int P, int PT, class A>
VCR_INLINE void sample_epilogue(const Problem& pr, const SampleArgs<A>& a, const A* r, const A* value, A* h) {
  const Width<P, PT> w(pr);
  for (int64_t k = 0; k < w.pt(); ++k) h[k] = 0;
  for (int64_t j = 0; j < w.p(); ++j) {
    const A z = a.s[j] * r[j] + a.b[j];
    for (int64_t k = 0; k < w.pt(); ++k) h[k] += z * value[j * w.pt() + k];
  }
}

}  // namespace
}  // namespace vcr
