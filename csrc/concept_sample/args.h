// What the sampler's kernels share: sizes known at compile time where they are the paper's, and one (image, concept)'s softmax.
#pragma once
#include "../common/dtypes.h"
#include "../common/problem.h"

namespace vcr {

// The maximum of the logits, the sum of exp(logit - maximum), and at how many positions the maximum stands
// (pixel modulation divides by it, and its gradient is shared among ties as torch.amax does).
template <class A>
struct Softmax {
  A maximum, sum, ties;
};

// How one (image, concept) is normalised and scored. Everything is centred: yhat = y - mu, z = s * yhat + b.
template <class A>
struct SampleArgs {
  const A* mu;  // [p]
  const A* s;   // [p]
  const A* b;   // [p]
  const A* v;   // [p] logits are yhat . v
};

}  // namespace vcr
