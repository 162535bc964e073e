// Sum and centred sum of squares of one channel of one image (passes: forward pass 1). 1R; the second sweep is over a block in L1.
#pragma once
#include "../cpu/tile.h"
#include "../cpu/wide_sum.h"

namespace vcr {
namespace {

constexpr int64_t stats_block = 1024;  // positions: a block stays in L1, and no float sum runs longer than this

// For statistics, sums are taken in twice the precision: a mean is often far smaller than the values.
template <class T>
VCR_INLINE WideSum<acc_t<T>> wide_sum(const T* y, int64_t S) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>, exactly = sums_exactly<T>;
  WideSum<A> a[4];
  int64_t i = 0;
  if constexpr (exactly > 1) {
    for (; i + exactly * W <= S; i += exactly * W) a[0].add(sum_of<exactly>([&](auto J) { return load(y + i + J * W); }));
    vec<A> rest = zeros<A>();
    for_vectors<A>(S - i, [&](int64_t at, auto whole, int some) { rest += load_some<whole()>(y + i + at, some); });
    a[1].add(rest);
  } else {
    for (; i + 4 * W <= S; i += 4 * W) unroll<4>([&](auto K) { a[K].add(load_wide<A>(y + i + K * W)); });
    for (; i + W <= S; i += W) a[0].add(load_wide<A>(y + i));
    if (i < S) a[1].add(load_partial(y + i, int(S - i)));
    a[2].add(a[3]);
  }
  a[0].add(a[1]);
  a[0].add(a[2]);
  return a[0];
}

// For a mean that is only a number among others, float sums of a block do. They are taken relative to a pivot near the data (0 where
// none is given), so that |mean| >> sigma costs no digits.
template <class T>
VCR_INLINE acc_t<T> block_sum(const T* y, int64_t S, acc_t<T> pivot) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  const vec<A> m = splat(pivot);
  vec<A> a0 = zeros<A>(), a1 = a0, a2 = a0, a3 = a0;
  int64_t i = 0;
  for (; i + 4 * W <= S; i += 4 * W) {
    a0 += load(y + i) - m;
    a1 += load(y + i + W) - m;
    a2 += load(y + i + 2 * W) - m;
    a3 += load(y + i + 3 * W) - m;
  }
  for (; i + W <= S; i += W) a0 += load(y + i) - m;
  if (i < S) a1 += keep_first<A>(load_partial(y + i, int(S - i)) - m, int(S - i));
  return hsum<A>((a0 + a1) + (a2 + a3));
}

// The sum of (y - mean)^2. Only eight squares are added up in the values' own type: many more would be enough for their rounding errors,
// but these needn't be random. Values that are multiples of a large ulp make sums that end half way between two floats, and then ties are
// rounded the same way each time.
template <class T>
VCR_INLINE WideSum<acc_t<T>> squares_about(const T* y, int64_t S, acc_t<T> mean) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  const vec<A> m = splat(mean);
  WideSum<A> total;
  int64_t i = 0;
  for (; i + 8 * W <= S; i += 8 * W) {
    vec<A> a[2] = {};
    unroll<8>([&](auto K) {
      const vec<A> x = load(y + i + K * W) - m;
      a[K % 2] = fma(x, x, a[K % 2]);
    });
    total.add(a[0] + a[1]);
  }
  vec<A> a[2] = {};
  for (; i + 2 * W <= S; i += 2 * W)
    unroll<2>([&](auto K) {
      const vec<A> x = load(y + i + K * W) - m;
      a[K] = fma(x, x, a[K]);
    });
  for_vectors<A>(S - i, [&](int64_t at, auto whole, int some) {
    const vec<A> x = only<whole(), A>(load_some<whole()>(y + i + at, some) - m, some);
    a[whole() ? 0 : 1] = fma(x, x, a[whole() ? 0 : 1]);
  });
  total.add(a[0] + a[1]);
  return total;
}

// The mean less the pivot.
template <class T>
VCR_INLINE acc_t<T> row_mean(const T* y, int64_t S, acc_t<T> pivot) {
  double sum = 0;
  for (int64_t i = 0; i < S; i += stats_block) sum += double(block_sum(y + i, min(stats_block, S - i), pivot));
  return acc_t<T>(sum / double(S));
}

// The sum, and the centred sum of squares. Blocks are centred on their means as these were rounded, which is made up for, and merged by
// Chan's formula; the sum of squares minus S mean^2 would lose every digit where |mean| >> sigma.
template <class T>
VCR_INLINE void row_stats(const T* y, int64_t S, Total& total, double& squares) {
  using A = acc_t<T>;
  double pivot = 0;
  total = {};
  squares = 0;
  for (int64_t i = 0; i < S; i += stats_block) {
    const double before = double(i), count = double(min(stats_block, S - i));
    const Total block = wide_sum(y + i, int64_t(count)).total();
    const A centre = A(block.sum / count);
    const double off = mean_less<A>(block, count, double(centre));
    if (i == 0) pivot = double(centre);
    const double delta = i ? mean_less<A>(block, count, pivot) - mean_less<A>(total, before, pivot) : 0.0;
    const Total about = squares_about(y + i, int64_t(count), centre).total();
    squares += about.sum + about.error - count * off * off + delta * delta * before * count / (before + count);
    add<A>(total, block);
  }
}

// Short rows cost more in adding up lanes than in reading: as many rows as a vector has lanes are reduced together.
template <class A>
constexpr int64_t short_row = 64 * lanes<A>;

// add(K, from, whole, count) for each vector of a short row, K = 0, 1 being the sum that it goes to.
template <class T, class Add>
VCR_INLINE void for_short_row(const T* from, int64_t S, Add add) {
  constexpr int W = lanes<acc_t<T>>;
  int64_t i = 0;
  for (; i + 2 * W <= S; i += 2 * W) unroll<2>([&](auto K) { add(K, from + i + K * W, std::integral_constant<bool, true>{}, W); });
  if (i + W <= S) {
    add(std::integral_constant<int, 0>{}, from + i, std::integral_constant<bool, true>{}, W);
    i += W;
  }
  if (i < S) add(std::integral_constant<int, 1>{}, from + i, std::integral_constant<bool, false>{}, int(S - i));
}

// The means of lanes<A> rows less their pivots.
template <class T>
VCR_INLINE void short_rows_means(const T* y, int64_t row, int64_t S, const acc_t<T>* pivot, acc_t<T>* mean) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  vec<A> sums[W];
  const vec<A> pivots = pivot ? load(pivot) : zeros<A>();
  unroll<W>([&](auto J) {
    const vec<A> m = splat(A(pivots[J()]));
    vec<A> a[2] = {};
    for_short_row(y + J * row, S,
                  [&](auto K, const T* from, auto whole, int some) { a[K] += only<whole(), A>(load_some<whole()>(from, some) - m, some); });
    sums[J] = a[0] + a[1];
  });
  store(mean, sum_rows<A>(sums) / splat(A(S)));
}

// The sums of lanes<A> rows, and their centred sums of squares. Floats.
template <class T>
VCR_INLINE void short_rows_stats(const T* y, int64_t row, int64_t S, Total* total, double* squares) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>, WD = lanes<double>;
  alignas(VCR_VECTOR_BYTES) double sum[W];
  for (int half = 0; half < W; half += WD) {
    vec<double> sums[WD];
    unroll<WD>([&](auto J) {
      const Wide<A> s = wide_sum(y + (half + J) * row, S).sum;
      sums[J] = s.part[0] + s.part[1];
    });
    store(sum + half, sum_rows<double>(sums));
  }
  A centre[W];
  alignas(VCR_VECTOR_BYTES) double about[W];
  const double per_position = 1.0 / double(S);
  for (int j = 0; j < W; ++j) centre[j] = A(sum[j] * per_position);
  for (int half = 0; half < W; half += WD) {
    vec<double> sums[WD];
    unroll<WD>([&](auto J) {
      const Wide<A> s = squares_about(y + (half + J) * row, S, centre[half + J]).sum;
      sums[J] = s.part[0] + s.part[1];
    });
    store(about + half, sum_rows<double>(sums));
  }
  for (int j = 0; j < W; ++j) {
    const double off = sum[j] * per_position - double(centre[j]);
    total[j] = {sum[j], 0};
    squares[j] = about[j] - double(S) * off * off;
  }
}

// A row's result doesn't depend on the others'. Means of `count` rows less their pivots (null: 0).
template <class T>
VCR_KERNEL void rows_means(const T* y, int64_t row, int64_t count, int64_t S, const acc_t<T>* pivot, acc_t<T>* mean) {
  constexpr int W = lanes<acc_t<T>>;
  int64_t j = 0;
  if (S <= short_row<acc_t<T>> && count % W == 0)
    for (; j < count; j += W) short_rows_means(y + j * row, row, S, offset(pivot, j), mean + j);
  for (; j < count; ++j) mean[j] = row_mean(y + j * row, S, pivot ? pivot[j] : acc_t<T>(0));
}
// Sums and centred sums of squares of `count` rows.
template <class T>
VCR_KERNEL void rows_stats(const T* y, int64_t row, int64_t count, int64_t S, Total* total, double* squares) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  int64_t j = 0;
  if constexpr (sizeof(A) == 4)
    if (S <= short_row<A> && count % W == 0)
      for (; j < count; j += W) short_rows_stats(y + j * row, row, S, total + j, squares + j);
  for (; j < count; ++j) row_stats(y + j * row, S, total[j], squares[j]);
}

}  // namespace
}  // namespace vcr
