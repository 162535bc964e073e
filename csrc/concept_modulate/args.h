// What the modulator's kernels take. z is used as it is; attention is the softmax M, which is divided by its maximum here.
#pragma once
#include "../common/dtypes.h"
#include "../common/problem.h"

namespace vcr {

template <class A>
struct ModulatorWeights {
  const A *scale_weight, *shift_weight;  // [C, pt, p], null where affine leaves one out
  const A *scale_bias, *shift_bias;      // [C, p]
};

template <class T>
struct ModulateForward {
  using A = acc_t<T>;
  Problem problem;
  ModulatorWeights<A> weights;
  Map<const T> z;
  Map<T> out;
  const A* state;      // [N, C, pt]
  const A* attention;  // [N, C, S]; null: channel modulation
  Parallel pool;
};

template <class T>
struct ModulateBackward {
  using A = acc_t<T>;
  Problem problem;
  ModulatorWeights<A> weights;
  Map<const T> z, grad_out;
  Map<T> dz;
  const A* state;
  const A* attention;
  A *dstate, *dscale_weight, *dshift_weight, *dscale_bias, *dshift_bias, *dattention;  // dattention null for channel modulation
  Parallel pool;
};

}  // namespace vcr
