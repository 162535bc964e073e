// The small gradients of the modulator, for one (image, concept).
#pragma once
#include "cpu.h"

namespace vcr {
namespace {

// [p] each: sums over the positions of e, e yhat, M~ e, M~ e yhat.
template <class A>
struct ModulatorSums {
  const A *E0, *E1, *F0, *F1;
};
template <class A>
struct ModulatorGrads {
  A *scale_weight, *shift_weight, *scale_bias, *shift_bias;  // [pt, p]; [p]
};

// The batch norm's share: what reaches s and b past the modulator's weights; all [p], null where there is no norm.
template <class A>
struct ModulatorNormGrads {
  const A *abar, *scale_bias;
  A *ds, *db;
};

// Adds to the gradients; writes dstate [pt].
template <int P, int PT, class A>
void modulator_backward(const Problem& pr, const SampleArgs<A>& a, const ModulatorSums<A>& sums, const A* state, const A* scale_weight,
                        const A* shift_weight, const ModulatorGrads<A>& g, const ModulatorNormGrads<A>& norm, A* dstate) {
  const Width<P, PT> size(pr);
  const int64_t p = size.p(), pt = size.pt();
  using Step = Steps<A, P>;
  using Sum = std::conditional_t<Step::width == 1, double, typename Step::type>;  // few lanes, few roundings: or else in double
  constexpr int K = by_quads<A, P, PT> ? PT : 1;                                  // states whose sums over the channels run side by side
  for (int64_t k0 = 0; k0 < pt; k0 += K) {
    Sum total[K] = {};
    for_channels<A, P>(p, [&](int64_t j, auto by) {
      const auto s = by.load(a.s + j), b = by.load(a.b + j), F0 = by.load(sums.F0 + j), F1 = by.load(sums.F1 + j);
      const auto dabar = fma(s, F1, b * F0);
      if (k0 == 0) {
        const auto E0 = by.load(sums.E0 + j), E1 = by.load(sums.E1 + j);
        by.store(g.scale_bias + j, by.load(g.scale_bias + j) + fma(s, E1, b * E0));
        by.store(g.shift_bias + j, by.load(g.shift_bias + j) + E0);
        if (norm.ds != nullptr) {
          const auto abar = by.load(norm.abar + j), bias = by.load(norm.scale_bias + j);
          by.store(norm.ds + j, by.load(norm.ds + j) + fma(abar, F1, bias * E1));
          by.store(norm.db + j, by.load(norm.db + j) + fma(abar, F0, bias * E0));
        }
      }
      const auto into = [&](const A* w, A* dw, auto upstream) {
        if (w == nullptr) return;
        unroll<K>([&](auto I) {
          const int64_t at = (k0 + I) * p + j;
          total[I] = fma(Sum(upstream), Sum(by.load(w + at)), total[I]);
          by.store(dw + at, fma(by.splat(state[k0 + I]), upstream, by.load(dw + at)));
        });
      };
      into(scale_weight, g.scale_weight, dabar);
      into(shift_weight, g.shift_weight, F0);
    });
    if constexpr (by_quads<A, P, PT>)
      unroll<PT / 4>([&](auto I) { store_quad(dstate + 4 * I, sum_four(total + 4 * I)); });
    else if constexpr (Step::width == 1)
      dstate[k0] = A(total[0]);
    else
      dstate[k0] = Step::sum(total[0]);
  }
}

}  // namespace
}  // namespace vcr
