// The first batch norm as the stages see it.
#pragma once
#include "args.h"
#include "cpu_input_grad.h"

namespace vcr {
namespace {

// constants: [2 CP] that this function fills with ones and zeros where the norm has no such parameter.
template <class A>
NormView<A> norm_view(const Problem& pr, Norm norm, const MiddleSaved<A>& saved, const MiddleParams<A>& params, A* constants) {
  const int64_t CP = pr.channels();
  A *ones = constants, *zero = constants + CP;
  for (int64_t j = 0; j < CP; ++j) ones[j] = 1, zero[j] = 0;
  if (norm == Norm::none) return {saved.m, ones, saved.m, CP, zero, 0};
  return {saved.mu, saved.s, params.norm_bias ? params.norm_bias : zero, 0, saved.m, CP};
}

}  // namespace
}  // namespace vcr
