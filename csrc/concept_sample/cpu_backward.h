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
                     const A* u, const A* r, const A* q, const A* R, const A* K1, const SampleGrads<A>& g, A* dr, A* v, A* constant, A& rdr,
                     A* scratch) {
  const Width<P, PT> size(pr);
  const int64_t p = size.p();
  A *x = scratch, *dv = x + round_up(p, 16), *du = dv + round_up(p, 16), *bar = du + round_up(p, 16), *dq = bar + round_up(p, 16);
  project_back(size, value, dh, x);  // drbar
  double dot = 0;
  for (int64_t j = 0; j < p; ++j) {
    bar[j] = a.s[j] * r[j] + a.b[j];
    dr[j] = a.s[j] * x[j];
    v[j] = a.s[j] * u[j];
    constant[j] = 0;
    g.ds[j] += r[j] * x[j];
    g.db[j] += x[j];
  }
  for (int64_t j = 0; j < p; ++j) dot += double(r[j]) * double(dr[j]);
  rdr = A(dot);
  add_outer(size, bar, dh, g.value);
  if (sampler == Sampler::pool) return;
  project_back(size, R, dh, dv);
  if (K1 != nullptr)
    for (int64_t j = 0; j < p; ++j) dv[j] += K1[j];
  for (int64_t j = 0; j < p; ++j) {
    du[j] = a.s[j] * dv[j];
    g.ds[j] += u[j] * dv[j];
  }
  if (sampler == Sampler::static_query) {
    for (int64_t j = 0; j < p; ++j) g.logit[j] += du[j];
    return;
  }
  const A inverse_S = A(1) / A(pr.S), scale = A(1) / vcr::sqrt(A(size.pt()));
  for (int64_t j = 0; j < p; ++j) du[j] *= scale;
  project(size, du, key, dq);
  add_outer(size, du, q, g.key);
  project_back(size, query, dq, x);  // dzbar
  for (int64_t j = 0; j < p; ++j) {
    const A centred = a.mhat[j];
    bar[j] = a.s[j] * centred + a.b[j];
    constant[j] = a.s[j] * x[j] * inverse_S;
    g.ds[j] += centred * x[j];
    g.db[j] += x[j];
  }
  add_outer(size, bar, dq, g.query);
}

}  // namespace
}  // namespace vcr
