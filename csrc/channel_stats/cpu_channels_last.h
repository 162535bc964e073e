// Mean and centred sum of squares of channels [begin, end) of one image whose rows hold all channels of a position. 1R.
#pragma once
#include "cpu_contiguous.h"

namespace vcr {
namespace {

// Rows are taken eight at a time into registers, where their mean and squares are exact in the two-sweep way; such blocks are merged by
// Chan's formula, in float over 256 rows and in double beyond. Within eight rows the sweep goes along the channels, as memory does:
// rows are often a power of two apart, and a column of them would share one cache set.
constexpr int64_t together_rows = 8, merged_rows = 256;

template <int rows, class A, class Fetch>
VCR_INLINE void merge_rows(A* running_sum, A* running_squares, int64_t before, Fetch fetch) {
  vec<A> x[rows], sum = zeros<A>(), squares = zeros<A>();
  unroll<rows>([&](auto R) { x[R] = fetch(R()); });
  unroll<rows>([&](auto R) { sum += x[R]; });
  const vec<A> mean = sum * splat(A(1) / A(rows));
  unroll<rows>([&](auto R) {
    const vec<A> d = x[R] - mean;
    squares = fma(d, d, squares);
  });
  if (before != 0) {
    const vec<A> delta = fma(load(running_sum), splat(-A(1) / A(before)), mean);
    squares = fma(delta * delta, splat(A(double(before) * rows / double(before + rows))), squares) + load(running_squares);
    sum += load(running_sum);
  }
  store(running_sum, sum);
  store(running_squares, squares);
}

// Channels [0, count) of one image; pivot, mean (less the pivot), squares [count].
template <class T>
void channel_stats_rows(const T* y, int64_t stride, int64_t S, int64_t count, const acc_t<T>* pivot, acc_t<T>* mean, acc_t<T>* squares) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  const int64_t padded = round_up(count, W);
  Scratch<A> running(2 * padded);
  Scratch<double> totals(2 * count);
  A *run_sum = running.get(), *run_squares = run_sum + padded;
  double *sum = totals.get(), *m2 = sum + count;
  for (int64_t i = 0; i < S; i += merged_rows) {
    const int64_t rows = min(merged_rows, S - i);
    int64_t r = 0;
    const auto block = [&](auto height) {
      const T* from = y + (i + r) * stride;
      for_vectors<A>(count, [&](int64_t j, auto whole, int some) {
        if (j * sizeof(T) % 64 == 0)
          for (int k = 0; k < height(); ++k) prefetch(from + (k + height()) * stride + j);
        const vec<A> m = load_some<whole()>(pivot + j, some);
        merge_rows<height()>(run_sum + j, run_squares + j, r, [&](int k) { return load_some<whole()>(from + k * stride + j, some) - m; });
      });
      r += height();
    };
    while (r + together_rows <= rows) block(std::integral_constant<int, together_rows>{});
    while (r < rows) block(std::integral_constant<int, 1>{});
    const double merged = double(i) * double(rows) / double(i + rows), per_block = 1.0 / double(rows),
                 per_before = i ? 1.0 / double(i) : 0.0;
    for (int64_t j = 0; j < count; ++j) {
      const double block_sum = double(run_sum[j]), before = i ? sum[j] : 0.0, delta = block_sum * per_block - before * per_before;
      m2[j] = double(run_squares[j]) + (i ? m2[j] + delta * delta * merged : 0.0);
      sum[j] = before + block_sum;
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    mean[j] = A(sum[j] / double(S));
    squares[j] = A(m2[j]);
  }
}

}  // namespace
}  // namespace vcr
