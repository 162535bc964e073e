// Mean and centred sum of squares of one channel of one image (passes: forward pass 1). 1R; the second sweep is over a block in L1.
#pragma once
#include "../cpu/tile.h"

namespace vcr {
namespace {

// Means are taken relative to a pivot near the data (0 where none is given), so that |mean| >> sigma costs no digits.
constexpr int64_t stats_block = 1024;  // positions: a block stays in L1, and no float sum runs longer than this

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

template <class T>
VCR_INLINE acc_t<T> block_squares(const T* y, int64_t S, acc_t<T> mean) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  const vec<A> m = splat(mean);
  vec<A> a0 = zeros<A>(), a1 = a0, a2 = a0, a3 = a0;
  int64_t i = 0;
  for (; i + 4 * W <= S; i += 4 * W) {
    const vec<A> x0 = load(y + i) - m, x1 = load(y + i + W) - m, x2 = load(y + i + 2 * W) - m, x3 = load(y + i + 3 * W) - m;
    a0 = fma(x0, x0, a0);
    a1 = fma(x1, x1, a1);
    a2 = fma(x2, x2, a2);
    a3 = fma(x3, x3, a3);
  }
  for (; i + W <= S; i += W) {
    const vec<A> x = load(y + i) - m;
    a0 = fma(x, x, a0);
  }
  if (i < S) {
    const vec<A> x = keep_first<A>(load_partial(y + i, int(S - i)) - m, int(S - i));
    a1 = fma(x, x, a1);
  }
  return hsum<A>((a0 + a1) + (a2 + a3));
}

// The mean less the pivot.
template <class T>
VCR_INLINE acc_t<T> row_mean(const T* y, int64_t S, acc_t<T> pivot) {
  double sum = 0;
  for (int64_t i = 0; i < S; i += stats_block) sum += double(block_sum(y + i, min(stats_block, S - i), pivot));
  return acc_t<T>(sum / double(S));
}

// The mean less the pivot, and the centred sum of squares. Blocks are merged by Chan's formula; the sum of squares minus S mean^2 would
// lose every digit where |mean| >> sigma.
template <class T>
VCR_INLINE void row_stats(const T* y, int64_t S, acc_t<T> pivot, acc_t<T>& mean, acc_t<T>& squares) {
  double sum = 0, m2 = 0;
  for (int64_t i = 0; i < S; i += stats_block) {
    const int64_t count = min(stats_block, S - i);
    const double block = double(block_sum(y + i, count, pivot)), block_mean = block / double(count);
    const double delta = i ? block_mean - sum / double(i) : 0.0;
    m2 += double(block_squares(y + i, count, acc_t<T>(block_mean + double(pivot)))) +
          delta * delta * double(i) * double(count) / double(i + count);
    sum += block;
  }
  mean = acc_t<T>(sum / double(S));
  squares = acc_t<T>(m2);
}

// Short rows cost more in adding up lanes than in reading: as many rows as a vector has lanes are reduced together.
constexpr int64_t short_row = 512;

// The means of lanes<A> rows less their pivots, and their centred sums of squares where `squares` is not null.
template <class T>
VCR_INLINE void short_rows_stats(const T* y, int64_t row, int64_t S, const acc_t<T>* pivot, acc_t<T>* mean, acc_t<T>* squares) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  vec<A> sums[W] = {};
  const int64_t whole = S / W * W;
  const int tail = int(S - whole);
  const vec<A> pivots = pivot ? load(pivot) : zeros<A>();
  unroll<W>([&](auto J) {
    const T* from = y + J * row;
    const vec<A> m = splat(A(pivots[J()]));
    vec<A> a = zeros<A>(), b = a;
    int64_t i = 0;
    for (; i + 2 * W <= whole; i += 2 * W) {
      a += load(from + i) - m;
      b += load(from + i + W) - m;
    }
    if (i < whole) a += load(from + i) - m;
    if (tail) b += keep_first<A>(load_partial(from + whole, tail) - m, tail);
    sums[J] = a + b;
  });
  const vec<A> means = sum_rows<A>(sums) / splat(A(S));
  store(mean, means);
  if (squares == nullptr) return;
  unroll<W>([&](auto J) {
    const T* from = y + J * row;
    const vec<A> m = splat(A(means[J()] + pivots[J()]));
    vec<A> a = zeros<A>(), b = a;
    int64_t i = 0;
    for (; i + 2 * W <= whole; i += 2 * W) {
      const vec<A> x0 = load(from + i) - m, x1 = load(from + i + W) - m;
      a = fma(x0, x0, a);
      b = fma(x1, x1, b);
    }
    if (i < whole) {
      const vec<A> x = load(from + i) - m;
      a = fma(x, x, a);
    }
    if (tail) {
      const vec<A> x = keep_first<A>(load_partial(from + whole, tail) - m, tail);
      b = fma(x, x, b);
    }
    sums[J] = a + b;
  });
  store(squares, sum_rows<A>(sums));
}

// Means less their pivots (null: 0), and sums of squares where not null, of `count` rows. A row's result doesn't depend on the others'.
template <class T>
VCR_INLINE void rows_stats(const T* y, int64_t row, int64_t count, int64_t S, const acc_t<T>* pivot, acc_t<T>* mean, acc_t<T>* squares) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  int64_t j = 0;
  if (S <= short_row && count % W == 0)
    for (; j < count; j += W) short_rows_stats(y + j * row, row, S, offset(pivot, j), mean + j, offset(squares, j));
  for (; j < count; ++j) {
    const A from = pivot ? pivot[j] : A(0);
    if (squares == nullptr)
      mean[j] = row_mean(y + j * row, S, from);
    else
      row_stats(y + j * row, S, from, mean[j], squares[j]);
  }
}

}  // namespace
}  // namespace vcr
