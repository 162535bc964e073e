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
  for_channels<A, P>(p, [&](int64_t j, auto by) {
    const auto s = by.load(a.s + j), rj = by.load(r + j), xj = by.load(x + j);
    by.store(bar + j, fma(s, rj, by.load(a.b + j)));
    by.store(dr + j, s * xj);
    by.store(v + j, s * by.load(u + j));
    by.store(constant + j, by.splat(0));
    by.store(g.ds + j, fma(rj, xj, by.load(g.ds + j)));
    by.store(g.db + j, by.load(g.db + j) + xj);
  });
  rdr = A(wide_dot<A, P>(p, r, dr));
  add_outer(size, bar, dh, g.value);
  if (sampler == Sampler::pool) return;
  project_back(size, R, dh, dv);
  const A scale = sampler == Sampler::static_query ? A(1) : A(1) / vcr::sqrt(A(size.pt()));
  for_channels<A, P>(p, [&](int64_t j, auto by) {
    auto dvj = by.load(dv + j);
    if (K1 != nullptr) dvj += by.load(K1 + j);
    by.store(g.ds + j, fma(by.load(u + j), dvj, by.load(g.ds + j)));
    by.store(du + j, by.load(a.s + j) * dvj * by.splat(scale));
  });
  if (sampler == Sampler::static_query) {
    for (int64_t j = 0; j < p; ++j) g.logit[j] += du[j];
    return;
  }
  project(size, du, key, dq);
  add_outer(size, du, q, g.key);
  project_back(size, query, dq, x);  // dzbar
  const A inverse_S = A(1) / A(pr.S);
  for_channels<A, P>(p, [&](int64_t j, auto by) {
    const auto s = by.load(a.s + j), centred = by.load(a.mhat + j), xj = by.load(x + j);
    by.store(bar + j, fma(s, centred, by.load(a.b + j)));
    by.store(constant + j, s * xj * by.splat(inverse_S));
    by.store(g.ds + j, fma(centred, xj, by.load(g.ds + j)));
    by.store(g.db + j, by.load(g.db + j) + xj);
  });
  add_outer(size, bar, dq, g.query);
}

}  // namespace
}  // namespace vcr
