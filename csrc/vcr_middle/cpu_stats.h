// Pass 1 of the middle, 1R: of every channel the sum and the centred sum of squares, image by image; and what the batch makes of them.
#pragma once
#include "../channel_stats/cpu_channels_last.h"
#include "../channel_stats/cpu_contiguous.h"
#include "args.h"

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

// The batch's own part of statistics over several batches: images are merged in order, by Chan's formula.
template <class T>
void channel_moments(const MiddleStats<T>& f) {
  using A = acc_t<T>;
  const Problem& pr = f.problem;
  const int64_t CP = pr.channels();
  const double size = double(pr.S), count = double(pr.N) * size;
  Scratch<Total> totals(pr.N * CP);
  Scratch<double> squares(pr.N * CP);
  channel_totals(pr, f.y, f.pool, totals.get(), squares.get());
  for_each(f.pool, CP, [&](int64_t j) {
    Total sum;
    for (int64_t n = 0; n < pr.N; ++n) add<A>(sum, totals.get()[n * CP + j]);
    const double mean = count > 0 ? (sum.sum + sum.error) / count : 0, off = count > 0 ? mean_less<A>(sum, count, mean) : 0;
    double m2 = 0;
    for (int64_t n = 0; n < pr.N; ++n) {
      const double d = mean_less<A>(totals.get()[n * CP + j], size, mean) - off;
      m2 += squares.get()[n * CP + j] + size * d * d;
    }
    f.moments[j] = mean;
    f.moments[CP + j] = m2;
  });
}

}  // namespace
}  // namespace vcr
