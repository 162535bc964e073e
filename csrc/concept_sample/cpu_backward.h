// The small gradients of the sampler (passes: backward, "small gradients, in order"), for one concept over the images in order.
#pragma once
#include "cpu_tile.h"

namespace vcr {
namespace {

// Per (image, concept) in: dh [pt], the forward's m, u, r, q, R; what else reaches v (pixel modulation), K1 [p] or null.
// Out: dr [p], v [p], s dzbar / S [p], rdr; adds to the gradients. All pointers are this concept's.
template <class A>
struct SampleGrads {
  A *value, *query, *key, *logit;  // [p, pt]; logit [p]; null where the sampler has none
  A *ds, *db;                      // [p]: the sampler's share of the batch norm's gradients
};

VCR_INLINE int64_t sample_backward_scratch(const Problem& pr) { return 4 * round_up(pr.p, 16) + round_up(pr.pt, 16); }

template <int P, int PT, class A>
void sample_backward(const Problem& pr, Sampler sampler, const SampleArgs<A>& a, const A* value, const A* query, const A* key, const A* dh,
                     const A* m, const A* u, const A* r, const A* q, const A* R, const A* K1, const SampleGrads<A>& g, A* dr, A* v,
                     A* constant, A& rdr, A* scratch) {
  const Width<P, PT> size(pr);
  const int64_t p = size.p(), pt = size.pt();
  const A inverse_S = A(1) / A(pr.S), scale = A(1) / vcr::sqrt(A(pt));
  A *drbar = scratch, *dv = drbar + round_up(p, 16), *du = dv + round_up(p, 16), *dz = du + round_up(p, 16), *dq = dz + round_up(p, 16);
  double dot = 0;
  for (int64_t j = 0; j < p; ++j) {
    const A rbar = a.s[j] * r[j] + a.b[j];
    A x = 0;
    for (int64_t k = 0; k < pt; ++k) {
      x += value[j * pt + k] * dh[k];
      g.value[j * pt + k] += rbar * dh[k];
    }
    drbar[j] = x;
    dr[j] = a.s[j] * x;
    v[j] = a.s[j] * u[j];
    constant[j] = 0;
    dot += double(r[j]) * double(dr[j]);
    g.ds[j] += r[j] * x;
    g.db[j] += x;
  }
  rdr = A(dot);
  if (sampler == Sampler::pool) return;
  for (int64_t j = 0; j < p; ++j) {
    A x = K1 == nullptr ? A(0) : K1[j];
    for (int64_t k = 0; k < pt; ++k) x += R[j * pt + k] * dh[k];
    dv[j] = x;
    du[j] = a.s[j] * x;
    g.ds[j] += u[j] * x;
  }
  if (sampler == Sampler::static_query) {
    for (int64_t j = 0; j < p; ++j) g.logit[j] += du[j];
    return;
  }
  for (int64_t k = 0; k < pt; ++k) dq[k] = 0;
  for (int64_t j = 0; j < p; ++j) {
    const A x = du[j] * scale;
    for (int64_t k = 0; k < pt; ++k) {
      dq[k] += key[j * pt + k] * x;
      g.key[j * pt + k] += x * q[k];
    }
  }
  for (int64_t j = 0; j < p; ++j) {
    const A centred = m[j] - a.mu[j], zbar = a.s[j] * centred + a.b[j];
    A x = 0;
    for (int64_t k = 0; k < pt; ++k) {
      x += query[j * pt + k] * dq[k];
      g.query[j * pt + k] += zbar * dq[k];
    }
    constant[j] = a.s[j] * x * inverse_S;
    g.ds[j] += centred * x;
    g.db[j] += x;
  }
}

}  // namespace
}  // namespace vcr
