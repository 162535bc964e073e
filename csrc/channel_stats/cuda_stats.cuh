// Pass channel_stats: mean and centred sum of squares of every channel; 1R.
//   A block takes some concepts of a group of whole images. Sums are wide; squares are about a pivot, the channel's first value in that
//   image, which is one of what is summed: however far off, it costs no more digits than there are positions. Images and groups are merged
//   by Chan's formula, in order.
#pragma once
#include "../cuda/tile.h"

namespace vcr::cuda {

template <class T>
struct ChannelStats {
  using A = acc_t<T>;
  static constexpr int threads = 256, resident = sizeof(A) == 4 ? 3 : 2;
  struct Args {
    Problem problem;
    Map<const T> y;
    bool last;
    int concepts, block;  // concepts of a block, positions that are staged at a time
    int64_t per_group;    // images
    double* means;        // [N, C p]
    double* partial;      // [groups, 2, C p]: mean and squares of a group
  };
  struct Shared {
    SharedArray<T> tile;
    SharedArray<WideSum<A>> sum;
    SharedArray<double> squares, mean, merged;
    SharedArray<A> pivot;
    VCR_BOTH Shared(SharedCarver& carve, const Args& a) {
      const int rows = a.concepts * int(a.problem.p);
      tile = carve.take<T>(tile_elements<T>(a.last, rows, a.block));
      sum = carve.take<WideSum<A>>(rows);
      squares = carve.take<double>(rows), mean = carve.take<double>(rows), merged = carve.take<double>(rows);
      pivot = carve.take<A>(rows);
    }
  };
  VCR_BOTH static int64_t units(const Args& a) { return quotient_up(a.problem.N, a.per_group) * quotient_up(a.problem.C, a.concepts); }

  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t unit) {
    const Problem& pr = a.problem;
    SharedCarver carve{t.shared()};
    const Shared s(carve, a);
    const int64_t CP = pr.C * pr.p, blocks = quotient_up(pr.C, a.concepts), group = unit / blocks,
                  first = unit % blocks * a.concepts * pr.p;
    const int rows = int(least(a.concepts * pr.p, CP - first));
    const int64_t n0 = group * a.per_group, n1 = least(pr.N, n0 + a.per_group);
    for (int64_t n = n0; n < n1; ++n) {
      for_threads(t, rows, [&](int j) {
        const Part<const T> row = part_of(a.y, a.last, n, first + j, 1, 0, 1);
        const A x = widen(*row.data);
        s.pivot[j] = x - x == 0 ? x : A(0);
        s.sum[j] = {};
        s.squares[j] = 0;
      });
      for (int64_t begin = 0; begin < pr.S; begin += a.block) {
        const int count = int(least(a.block, pr.S - begin));
        const Part<const T> part = part_of(a.y, a.last, n, first, rows, begin, count);
        const Tile<T> tile = tile_of(s.tile.get(), part, a.block);
        stage(t, part, tile);
        t.sync();
        for_warps(t, rows, [&](int j) {
          WideSum<A> sum;
          double squares = 0;
          for (int i = t.lane(); i < count; i += warp_size) {
            const A x = tile.at(int(j), i);
            sum.add(x);
            const double d = double(x) - double(s.pivot[j]);
            squares = multiply_add(d, d, squares);
          }
          sum = t.reduce(sum, Merge{});
          squares = t.reduce(squares, Sum{});
          if (t.lane() == 0) {
            s.sum[j].add(sum);
            s.squares[j] += squares;
          }
        });
        t.sync();
      }
      const double size = double(pr.S), before = double(n - n0);
      for_threads(t, rows, [&](int j) {
        const double mean = (s.sum[j].sum + s.sum[j].lost) / size, off = s.sum[j].less(size, double(s.pivot[j])) / size;
        const double squares = s.squares[j] - size * off * off;
        a.means[n * CP + first + j] = mean;
        if (before == 0) {
          s.mean[j] = mean;
          s.merged[j] = squares;
        } else {
          const double apart = mean - s.mean[j];
          s.mean[j] += apart / (before + 1);
          s.merged[j] += squares + apart * apart * (size * before / (before + 1));
        }
      });
    }
    for_threads(t, rows, [&](int j) {
      double* to = a.partial + 2 * group * CP + first + j;
      to[0] = s.mean[j];
      to[CP] = s.merged[j];
    });
  }
};

// What the groups' rows come to.
struct MergedStats {
  double mean, squares, count;
};
// By one warp: channel j of ChannelStats' partial results.
template <class Thread>
VCR_DEVICE MergedStats merge_stats(Thread& t, const double* partial, const Problem& pr, int64_t per_group, int64_t j) {
  const int64_t groups = quotient_up(pr.N, per_group), CP = pr.C * pr.p;
  const double S = double(pr.S), count = double(pr.N) * S;
  const auto size = [&](int g) { return double(least(per_group, pr.N - g * per_group)) * S; };
  const double mean = warp_sum<double>(t, groups, [&](int g) { return size(g) * partial[2 * g * CP + j]; }) / count;
  const double squares = warp_sum<double>(t, groups, [&](int g) {
    const double apart = partial[2 * g * CP + j] - mean;
    return partial[(2 * g + 1) * CP + j] + size(g) * apart * apart;
  });
  return {mean, squares, count};
}

}  // namespace vcr::cuda
