// Sums and centred sums of squares of channels [begin, end) of one image whose rows hold all channels of a position. 1R.
#pragma once
#include "cpu_contiguous.h"

namespace vcr {
namespace {

// Rows are taken eight at a time into registers, where their sum is taken in double and their squares in the two-sweep way; such blocks
// are merged by Chan's formula, in double. Within eight rows the sweep goes along the channels, as memory does: rows are often a power
// of two apart, and a column of them would share one cache set.
constexpr int64_t together_rows = 8, merged_rows = 256;

template <class A>
struct RunningStats {
  WideSum<A> sum;
  Wide<A> squares;
};

// With n rows before and h rows here, of sums R and s: squares += sum (x - s / h)^2 + (n s - h R)^2 / (n h (n + h)). The rows are centred
// on their mean as it was rounded, which is made up for.
// n and weight: splats of n and of 1 / (n h (n + h)), or 0.
// exactly: that so many rows add up in A as they would in double.
template <int rows, bool exactly, class A, class Fetch, class FetchWide>
VCR_INLINE void merge_rows(RunningStats<A>& running, vec<double> n, vec<double> weight, Fetch fetch, FetchWide fetch_wide) {
  constexpr int chains = rows > 1 ? 2 : 1;
  vec<A> x[rows], around[chains] = {};
  WideSum<A> sums[chains];
  unroll<rows>([&](auto R) {
    x[R] = fetch(R());
    if constexpr (!exactly) sums[R % chains].add(fetch_wide(R()));
  });
  if constexpr (exactly)
    sums[0].add(sum_of<rows>([&](auto R) { return x[R]; }));
  else if constexpr (chains > 1)
    sums[0].add(sums[1]);
  const WideSum<A>& sum = sums[0];
  Wide<A> mean;
  unroll<Wide<A>::count>([&](auto K) { mean.part[K] = sum.sum.part[K] * splat(1.0 / rows); });
  const vec<A> centre = narrow_lanes<A>(mean);
  unroll<rows>([&](auto R) {
    const vec<A> d = x[R] - centre;
    around[R % chains] = fma(d, d, around[R % chains]);
  });
  if constexpr (chains > 1) around[0] += around[1];
  const Wide<A> squares = widen_lanes<A>(around[0]), from = widen_lanes<A>(centre);
  unroll<Wide<A>::count>([&](auto K) {
    const vec<double> off = mean.part[K] - from.part[K];
    vec<double> apart = fma(n, sum.sum.part[K], running.sum.sum.part[K] * splat(-double(rows)));
    if constexpr (sizeof(A) == 8) apart += fma(n, sum.error, running.sum.error * splat(-double(rows)));
    running.squares.part[K] += fma(apart * weight, apart, fma(off * splat(-double(rows)), off, squares.part[K]));
  });
  running.sum.add(sum);
}

// Channels [0, count) of one image.
template <class T>
VCR_KERNEL void channel_stats_rows(const T* y, int64_t stride, int64_t S, int64_t count, Total* total, double* squares) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  const int64_t vectors = (count + W - 1) / W;
  Scratch<RunningStats<A>> scratch(vectors);
  RunningStats<A>* running = scratch.get();
  for (int64_t j = 0; j < vectors; ++j) running[j] = {};
  int64_t i = 0;
  const auto block = [&](auto height) {
    const T* from = y + i * stride;
    const double before = double(i);
    const vec<double> n = splat(before), weight = splat(i ? 1 / (height() * before * (before + height())) : 0.0);
    for_vectors<A>(count, [&](int64_t j, auto whole, int some) {
      if (j * sizeof(T) % 64 == 0)
        for (int k = 0; k < height(); ++k) prefetch(from + (k + height()) * stride + j);
      merge_rows<height(), (height() <= sums_exactly<T>)>(
          running[j / W], n, weight, [&](int k) { return load_some<whole()>(from + k * stride + j, some); },
          [&](int k) {
            if constexpr (whole())
              return load_wide<A>(from + k * stride + j);
            else
              return widen_lanes<A>(load_partial(from + k * stride + j, some));
          });
    });
    i += height();
  };
  while (i + together_rows <= S) block(std::integral_constant<int, together_rows>{});
  while (i < S) block(std::integral_constant<int, 1>{});
  for (int64_t j = 0; j < count; ++j) {
    constexpr int WD = lanes<double>;
    const RunningStats<A>& at = running[j / W];
    const int part = int(j % W) / WD, lane = int(j % W) % WD;
    total[j] = {at.sum.sum.part[part][lane], sizeof(A) == 8 ? at.sum.error[lane] : 0.0};
    squares[j] = at.squares.part[part][lane];
  }
}

}  // namespace
}  // namespace vcr
