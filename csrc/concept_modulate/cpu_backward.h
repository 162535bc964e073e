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

template <class A>
VCR_INLINE A dot(const A* x, const A* y, int64_t count) {
  vec<A> acc = zeros<A>();
  for_vectors<A>(
      count, [&](int64_t i, auto whole, int some) { acc = fma(load_some<whole()>(x + i, some), load_some<whole()>(y + i, some), acc); });
  return hsum<A>(acc);
}

// Adds to the gradients; writes dstate [pt]. scratch [p].
template <int P, int PT, class A>
void modulator_backward(const Problem& pr, const SampleArgs<A>& a, const ModulatorSums<A>& sums, const A* state, const A* scale_weight,
                        const A* shift_weight, const ModulatorGrads<A>& g, A* dstate, A* scratch) {
  const Width<P, PT> size(pr);
  const int64_t p = size.p(), pt = size.pt();
  A* dabar = scratch;
  for (int64_t j = 0; j < p; ++j) {
    dabar[j] = a.s[j] * sums.F1[j] + a.b[j] * sums.F0[j];
    g.scale_bias[j] += a.s[j] * sums.E1[j] + a.b[j] * sums.E0[j];
    g.shift_bias[j] += sums.E0[j];
  }
  for (int64_t k = 0; k < pt; ++k) {
    A x = 0;
    if (scale_weight != nullptr) {
      x += dot(dabar, scale_weight + k * p, p);
      for (int64_t j = 0; j < p; ++j) g.scale_weight[k * p + j] += state[k] * dabar[j];
    }
    if (shift_weight != nullptr) {
      x += dot(sums.F0, shift_weight + k * p, p);
      for (int64_t j = 0; j < p; ++j) g.shift_weight[k * p + j] += state[k] * sums.F0[j];
    }
    dstate[k] = x;
  }
}

}  // namespace
}  // namespace vcr
