// How image n sees the first batch norm, z = s (y - mu) + b: per-channel arrays, or, without a batch norm, s = 1 and each image
// centred on its own mean (mu = b = m), so that no variant is computed uncentred.
#pragma once
#include "args.h"
#include "cpu_input_grad.h"

namespace vcr {
namespace {

template <class A>
struct NormView {
  const A *mu, *s, *b;
  int64_t image_stride;  // of mu and b
  SampleArgs<A> concept_args(const Problem& pr, int64_t n, int64_t c, const A* v) const {
    return {mu + n * image_stride + c * pr.p, s + c * pr.p, b + n * image_stride + c * pr.p, v};
  }
};

// constants: [2 CP] that this function fills with ones and zeros where the norm has no such parameter.
template <class A>
NormView<A> norm_view(const Problem& pr, Norm norm, const MiddleSaved<A>& saved, const MiddleParams<A>& params, A* constants) {
  const int64_t CP = pr.channels();
  A *ones = constants, *zero = constants + CP;
  for (int64_t j = 0; j < CP; ++j) ones[j] = 1, zero[j] = 0;
  if (norm == Norm::none) return {saved.m, ones, saved.m, CP};
  return {saved.mu, saved.s, params.norm_bias ? params.norm_bias : zero, 0};
}

}  // namespace
}  // namespace vcr
