// Mean and centred sum of squares of channels [begin, end) of one image whose rows hold all channels of a position. 1R.
#pragma once
#include "cpu_contiguous.h"

namespace vcr {
namespace {

constexpr int64_t stats_rows = 64;  // positions swept twice while they are in cache

// mean, squares: [end - begin]; squares null: the mean alone. Blocks of rows are merged by Chan's formula in order.
template <class T>
void channel_stats_rows(const T* y, int64_t stride, int64_t S, int64_t begin, int64_t end, acc_t<T>* mean, acc_t<T>* squares) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>, group = 64;  // channels swept together: their block of rows fits L1
  Scratch<double> totals(2 * group);
  for (int64_t c0 = begin; c0 < end; c0 += group) {
    const int64_t count = min(group, end - c0);
    double* sum = totals.get();
    double* m2 = sum + group;
    for (int64_t j = 0; j < count; ++j) sum[j] = m2[j] = 0;
    for (int64_t i = 0; i < S; i += stats_rows) {
      const int64_t rows = min(stats_rows, S - i);
      const double merged = double(i) * double(rows) / double(i + rows);
      for (int64_t j = 0; j < count; j += W) {
        const int width = int(min(W, count - j));
        const T* from = y + i * stride + c0 + j;
        vec<A> a0 = zeros<A>(), a1 = a0, a2 = a0, a3 = a0;
        const auto sweep = [&](auto fetch) {
          int64_t r = 0;
          for (; r + 4 <= rows; r += 4) {
            for (int k = 0; k < 4; ++k) prefetch(from + (r + k + stats_rows) * stride);
            a0 += fetch(from + r * stride);
            a1 += fetch(from + (r + 1) * stride);
            a2 += fetch(from + (r + 2) * stride);
            a3 += fetch(from + (r + 3) * stride);
          }
          for (; r < rows; ++r) a0 += fetch(from + r * stride);
          const vec<A> total = (a0 + a1) + (a2 + a3);
          const vec<A> m = total / splat(A(rows));
          a0 = a1 = a2 = a3 = zeros<A>();
          if (squares != nullptr) {
            for (r = 0; r + 4 <= rows; r += 4) {
              const vec<A> x0 = fetch(from + r * stride) - m, x1 = fetch(from + (r + 1) * stride) - m;
              const vec<A> x2 = fetch(from + (r + 2) * stride) - m, x3 = fetch(from + (r + 3) * stride) - m;
              a0 = fma(x0, x0, a0);
              a1 = fma(x1, x1, a1);
              a2 = fma(x2, x2, a2);
              a3 = fma(x3, x3, a3);
            }
            for (; r < rows; ++r) {
              const vec<A> x = fetch(from + r * stride) - m;
              a0 = fma(x, x, a0);
            }
          }
          const vec<A> sq = (a0 + a1) + (a2 + a3);
          alignas(VCR_VECTOR_BYTES) A t[W], q[W];
          store(t, total);
          store(q, sq);
          for (int k = 0; k < width; ++k) {
            const double block = double(t[k]);
            const double delta = i ? block / double(rows) - sum[j + k] / double(i) : 0.0;
            m2[j + k] += double(q[k]) + delta * delta * merged;
            sum[j + k] += block;
          }
        };
        if (width == W)
          sweep([](const T* p) { return load(p); });
        else
          sweep([width](const T* p) { return load_partial(p, width); });
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      mean[c0 - begin + j] = A(sum[j] / double(S));
      if (squares != nullptr) squares[c0 - begin + j] = A(m2[j]);
    }
  }
}

}  // namespace
}  // namespace vcr
