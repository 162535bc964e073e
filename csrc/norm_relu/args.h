// What norm_relu's kernels take. T: features, A: what they are accumulated in.
#pragma once
#include "../common/dtypes.h"
#include "../common/problem.h"

namespace vcr {

// A batch norm with known statistics, [channels] each; without `mean` it leaves things as they are. weight, bias: null for 1 and 0.
template <class A>
struct ChannelNorm {
  const A *mean = nullptr, *var = nullptr, *weight = nullptr, *bias = nullptr;
  double eps = 0;
};

// out = relu(norm(y) + shortcut_norm(shortcut)); all maps lie in the same layout, and with given statistics `out` may be y's own memory.
// shortcut: null for none.
template <class T>
struct NormRelu {
  using A = acc_t<T>;
  int64_t N, channels, S;
  Map<const T> y, shortcut;
  Map<T> out;
  ChannelNorm<A> norm, shortcut_norm;
  // With the batch's statistics: they are written to `mean` and `var` (biased), which are then norm's, and with Bessel's correction to
  // `unbiased`. Null: the statistics are given.
  A *mean = nullptr, *var = nullptr, *unbiased = nullptr;
  Parallel pool;
};

// Its gradients where the statistics are the batch's; norm.mean and norm.var as the forward pass wrote them.
template <class T>
struct NormReluBackward {
  using A = acc_t<T>;
  int64_t N, channels, S;
  Map<const T> grad_out, y, out;  // out: where there is a shortcut, else not read
  Map<T> dy, dshortcut;           // dshortcut: null for no shortcut
  ChannelNorm<A> norm;
  A *dweight, *dbias;
  Parallel pool;
};

}  // namespace vcr
