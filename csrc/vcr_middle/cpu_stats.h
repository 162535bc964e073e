// Pass 1 of the middle as an op of its own: the batch's own part of statistics over several batches.
#pragma once
#include "../channel_stats/cpu_batch.h"
#include "args.h"

namespace vcr {
namespace {

template <class T>
void channel_moments(const MiddleStats<T>& f) {
  const Problem& pr = f.problem;
  const int64_t CP = pr.channels();
  Scratch<Total> totals(pr.N * CP);
  Scratch<double> squares(pr.N * CP);
  channel_totals(pr, f.y, f.pool, totals.get(), squares.get());
  for_each(f.pool, CP, [&](int64_t j) {
    const Moments moments = merge_images<acc_t<T>>(pr.N, pr.S, CP, totals.get() + j, squares.get() + j);
    f.moments[j] = moments.mean;
    f.moments[CP + j] = moments.squares;
  });
}

}  // namespace
}  // namespace vcr
