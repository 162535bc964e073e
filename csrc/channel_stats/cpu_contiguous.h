// Mean and centred sum of squares of one channel of one image (passes: forward pass 1). 1R; the second sweep is over a block in L1.
#pragma once
#include "../cpu/tile.h"

namespace vcr {
namespace {

constexpr int64_t stats_block = 4096;  // positions: a block of float32 stays in L1, and no float sum runs longer than this

template <class T>
VCR_INLINE acc_t<T> block_sum(const T* y, int64_t S) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  vec<A> a0 = zeros<A>(), a1 = a0, a2 = a0, a3 = a0;
  int64_t i = 0;
  for (; i + 4 * W <= S; i += 4 * W) {
    a0 += load(y + i);
    a1 += load(y + i + W);
    a2 += load(y + i + 2 * W);
    a3 += load(y + i + 3 * W);
  }
  for (; i + W <= S; i += W) a0 += load(y + i);
  if (i < S) a1 += load_partial(y + i, int(S - i));
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

template <class T>
VCR_INLINE acc_t<T> row_mean(const T* y, int64_t S) {
  double sum = 0;
  for (int64_t i = 0; i < S; i += stats_block) sum += double(block_sum(y + i, min(stats_block, S - i)));
  return acc_t<T>(sum / double(S));
}

// Blocks are merged by Chan's formula; the sum of squares minus S mean^2 would lose every digit where |mean| >> sigma.
template <class T>
VCR_INLINE void row_stats(const T* y, int64_t S, acc_t<T>& mean, acc_t<T>& squares) {
  if (S <= stats_block) {
    mean = block_sum(y, S) / acc_t<T>(S);
    squares = block_squares(y, S, mean);
    return;
  }
  double sum = 0, m2 = 0;
  for (int64_t i = 0; i < S; i += stats_block) {
    const int64_t count = min(stats_block, S - i);
    const double block = double(block_sum(y + i, count)), block_mean = block / double(count);
    const double delta = i ? block_mean - sum / double(i) : 0.0;
    m2 += double(block_squares(y + i, count, acc_t<T>(block_mean))) + delta * delta * double(i) * double(count) / double(i + count);
    sum += block;
  }
  mean = acc_t<T>(sum / double(S));
  squares = acc_t<T>(m2);
}

// Short rows cost more in adding up lanes than in reading: as many rows as a vector has lanes are reduced together.
constexpr int64_t short_row = 512;

// The means of lanes<A> rows, and their centred sums of squares where `squares` is not null.
template <class T>
VCR_INLINE void short_rows_stats(const T* y, int64_t row, int64_t S, acc_t<T>* mean, acc_t<T>* squares) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  vec<A> sums[W] = {};
  const int64_t whole = S / W * W;
  const int tail = int(S - whole);
  unroll<W>([&](auto J) {
    const T* from = y + J * row;
    vec<A> a = zeros<A>(), b = a;
    int64_t i = 0;
    for (; i + 2 * W <= whole; i += 2 * W) {
      a += load(from + i);
      b += load(from + i + W);
    }
    if (i < whole) a += load(from + i);
    if (tail) b += load_partial(from + whole, tail);
    sums[J] = a + b;
  });
  const vec<A> means = sum_rows<A>(sums) / splat(A(S));
  store(mean, means);
  if (squares == nullptr) return;
  unroll<W>([&](auto J) {
    const T* from = y + J * row;
    const vec<A> m = splat(mean[J]);
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

// Means, and sums of squares where not null, of `count` rows. A row's result doesn't depend on which rows are reduced with it.
template <class T>
VCR_INLINE void rows_stats(const T* y, int64_t row, int64_t count, int64_t S, acc_t<T>* mean, acc_t<T>* squares) {
  constexpr int W = lanes<acc_t<T>>;
  int64_t j = 0;
  if (S <= short_row && count % W == 0)
    for (; j < count; j += W) short_rows_stats(y + j * row, row, S, mean + j, offset(squares, j));
  for (; j < count; ++j) {
    if (squares == nullptr)
      mean[j] = row_mean(y + j * row, S);
    else
      row_stats(y + j * row, S, mean[j], squares[j]);
  }
}

}  // namespace
}  // namespace vcr
