// The pass over a batch, 1R: of every channel the sum and the centred sum of squares, image by image; and what the images make together.
#pragma once
#include "cpu_channels_last.h"
#include "cpu_contiguous.h"

namespace vcr {
namespace {

// totals, squares: [N, C p].
template <class T>
void channel_totals(const Problem& pr, const Map<const T>& y, const Parallel& pool, Total* totals, double* squares) {
  const int64_t CP = pr.channels();
  if (y.layout() == Layout::contiguous) {
    for_each(pool, pr.N * pr.C, [&](int64_t i) {
      const int64_t n = i / pr.C, j = i % pr.C * pr.p, at = n * CP + j;
      rows_stats(y.at(n, j, 0), y.channel, pr.p, pr.S, totals + at, squares + at);
    });
  } else {
    const int64_t width = 256, chunks = (CP + width - 1) / width;  // never by the number of threads
    for_each(pool, pr.N * chunks, [&](int64_t i) {
      const int64_t n = i / chunks, j = i % chunks * width, at = n * CP + j;
      channel_stats_rows(y.at(n, j, 0), y.position, pr.S, min(width, CP - j), totals + at, squares + at);
    });
  }
}

// A channel's mean over the batch, and its sum of squares about it.
struct Moments {
  double mean, squares;
};
// N images of S positions are merged in order, by Chan's formula; one image's numbers are `stride` from the next's.
template <class A>
VCR_INLINE Moments merge_images(int64_t N, int64_t S, int64_t stride, const Total* totals, const double* squares) {
  const double size = double(S), count = double(N) * size;
  Total sum;
  for (int64_t n = 0; n < N; ++n) add<A>(sum, totals[n * stride]);
  const double mean = count > 0 ? (sum.sum + sum.error) / count : 0, off = count > 0 ? mean_less<A>(sum, count, mean) : 0;
  double m2 = 0;
  for (int64_t n = 0; n < N; ++n) {
    const double d = mean_less<A>(totals[n * stride], size, mean) - off;
    m2 += squares[n * stride] + size * d * d;
  }
  return {mean, m2};
}

}  // namespace
}  // namespace vcr
