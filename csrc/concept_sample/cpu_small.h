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

// Where no backward pass will follow, logits are in units of log2 and a softmax is summed in one sweep: weights are relative to the
// largest logit of the first block of positions, and what was summed is scaled only where a later logit is larger by more than this, so
// that hardly a block has to be.
constexpr float softmax_slack = 6;
constexpr double log2_e = 1.44269504088896341;

// Whether (p, pt) products can go by four states at a time, which every level has registers for.
template <class A, int P, int PT>
inline constexpr bool by_quads = sizeof(A) == 4 && P > 0 && P % 4 == 0 && PT > 0 && PT % 4 == 0;

// out[j] = sum_k w[j, k] x[k]
template <int P, int PT, class A>
VCR_INLINE void project_back(const Width<P, PT>& size, const A* w, const A* x, A* out) {
  if constexpr (by_quads<A, P, PT>) {
    quad xs[PT / 4];
    unroll<PT / 4>([&](auto K) { xs[K] = load_quad(x + 4 * K); });
    for (int j = 0; j < P; j += 4) {
      quad rows[4];
      unroll<4>([&](auto J) {
        rows[J] = load_quad(w + (j + J) * PT) * xs[0];
        unroll<PT / 4 - 1>([&](auto K) { rows[J] = fma(load_quad(w + (j + J) * PT + 4 * (K + 1)), xs[K + 1], rows[J]); });
      });
      store_quad(out + j, sum_quads(rows));
    }
  } else {
    for (int64_t j = 0; j < size.p(); ++j) {
      A sum = 0;
      for (int64_t k = 0; k < size.pt(); ++k) sum += w[j * size.pt() + k] * x[k];
      out[j] = sum;
    }
  }
}
// out[k] = sum_j x[j] w[j, k]
template <int P, int PT, class A>
VCR_INLINE void project(const Width<P, PT>& size, const A* x, const A* w, A* out) {
  if constexpr (by_quads<A, P, PT>) {
    quad acc[4][PT / 4] = {};  // four chains
    for (int j = 0; j < P; j += 4)
      unroll<4>([&](auto J) {
        unroll<PT / 4>([&](auto K) { acc[J][K] = fma(splat_quad(x[j + J]), load_quad(w + (j + J) * PT + 4 * K), acc[J][K]); });
      });
    unroll<PT / 4>([&](auto K) { store_quad(out + 4 * K, (acc[0][K] + acc[1][K]) + (acc[2][K] + acc[3][K])); });
  } else {
    for (int64_t k = 0; k < size.pt(); ++k) out[k] = 0;
    for (int64_t j = 0; j < size.p(); ++j)
      for (int64_t k = 0; k < size.pt(); ++k) out[k] += x[j] * w[j * size.pt() + k];
  }
}
// w[j, k] += x[j] y[k]
template <int P, int PT, class A>
VCR_INLINE void add_outer(const Width<P, PT>& size, const A* x, const A* y, A* w) {
  if constexpr (by_quads<A, P, PT>) {
    quad ys[PT / 4];
    unroll<PT / 4>([&](auto K) { ys[K] = load_quad(y + 4 * K); });
    for (int j = 0; j < P; ++j)
      unroll<PT / 4>([&](auto K) { store_quad(w + j * PT + 4 * K, fma(splat_quad(x[j]), ys[K], load_quad(w + j * PT + 4 * K))); });
  } else {
    for (int64_t j = 0; j < size.p(); ++j)
      for (int64_t k = 0; k < size.pt(); ++k) w[j * size.pt() + k] += x[j] * y[k];
  }
}

// zbar = s * mhat + b, q = zbar Wq, u = Wk q / sqrt(pt); static: u is the learned vector. Writes q [pt], u [p], v = s * u [p].
template <int P, int PT, class A>
VCR_INLINE void sample_prologue(const Problem& pr, Sampler sampler, const SampleArgs<A>& a, const A* query, const A* key, const A* logit,
                                A* q, A* u, A* v) {
  const Width<P, PT> size(pr);
  if (sampler == Sampler::dynamic_query) {
    for (int64_t j = 0; j < size.p(); ++j) v[j] = a.s[j] * a.mhat[j] + a.b[j];
    project(size, v, query, q);
    project_back(size, key, q, u);
    const A scale = A(1) / vcr::sqrt(A(size.pt()));
    for (int64_t j = 0; j < size.p(); ++j) u[j] *= scale;
  } else {
    for (int64_t j = 0; j < size.p(); ++j) u[j] = sampler == Sampler::static_query ? logit[j] : A(0);
  }
  for (int64_t j = 0; j < size.p(); ++j) v[j] = a.s[j] * u[j];
}

// h = (s * r + b) Wv, r the centred weighted mean. scratch [p].
template <int P, int PT, class A>
VCR_INLINE void sample_epilogue(const Problem& pr, const SampleArgs<A>& a, const A* r, const A* value, A* h, A* scratch) {
  const Width<P, PT> size(pr);
  for (int64_t j = 0; j < size.p(); ++j) scratch[j] = a.s[j] * r[j] + a.b[j];
  project(size, scratch, value, h);
}

}  // namespace
}  // namespace vcr
