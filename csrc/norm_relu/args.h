// What norm_relu's kernel takes. T: features, A: what they are accumulated in.
#pragma once
#include "../common/dtypes.h"
#include "../common/problem.h"

namespace vcr {

// A batch norm with given statistics, [channels] each; without `mean` it leaves things as they are. weight, bias: null for 1 and 0.
template <class A>
struct ChannelNorm {
  const A *mean = nullptr, *var = nullptr, *weight = nullptr, *bias = nullptr;
  double eps = 0;
};

// out = relu(norm(y) + shortcut_norm(shortcut)); all maps lie in the same layout. shortcut: null for none.
template <class T>
struct NormRelu {
  int64_t N, channels, S;
  Map<const T> y, shortcut;
  Map<T> out;
  ChannelNorm<acc_t<T>> norm, shortcut_norm;
  Parallel pool;
};

}  // namespace vcr
