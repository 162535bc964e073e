// How kernels are divided among blocks: plain arithmetic, no CUDA. A kernel is a struct: threads of a block at most, `resident` blocks that a
// multiprocessor should hold, Args, Shared (its arrays, cut by a SharedCarver), units(args), run(thread, args, unit). What an image's evaluation computes never depends on the batch.
#pragma once
#include "status.h"
#include "thread.h"

namespace vcr::cuda {

// What the arithmetic asks of a device, and the sizes that it aims at (tests make them small).
struct Device {
  int64_t shared = 99 << 10;  // bytes of shared memory that a block may have
  int multiprocessors = 1;
  bool clusters = false;    // distributed shared memory
  int threads = 1024;       // of a block, at most
  int64_t tile = 16 << 10;  // bytes of a map that are staged at a time
  int positions = 512;      // that are worked on at a time, at most
};

struct BlockShape {
  int concepts, block;  // concepts of a block of threads, positions that are staged at a time
};
// Enough channels for a warp each, and in channels_last for whole sectors of memory; then as many positions as the tile has room for.
inline BlockShape block_shape(const Device& device, const Problem& pr, int64_t bytes, bool last) {
  const int64_t concepts = least(pr.C, last ? quotient_up(64, pr.p * bytes) : quotient_up(8, pr.p));
  const int64_t fit = device.tile / (concepts * pr.p * bytes) / warp_size * warp_size;
  const int64_t block = least(pr.S, least(most(warp_size, fit), device.positions));
  return {int(concepts), int(block)};
}
// Positions of a block where blocks divide an image: whole stages, few enough that the machine is busy.
inline int chunk_of(const Device& device, const Problem& pr, const BlockShape& shape, int stages) {
  const int64_t others = pr.N * quotient_up(pr.C, shape.concepts), all = quotient_up(pr.S, shape.block);
  const int64_t wanted = quotient_up(8 * int64_t(device.multiprocessors), most(1, others));  // chunks of an image
  return int(least(pr.S, most(1, least(stages, all / most(1, wanted))) * shape.block));
}

// Groups of images whose partial results the next kernel merges.
inline int64_t images_per_group(int64_t N, int64_t groups) { return most(1, quotient_up(N, groups)); }
constexpr int64_t stats_groups = 64, gradient_groups = 32;

// Sizes of a cluster to try, best first: many blocks, so that memory is busy; but a channels_last position's channels in whole sectors
// first. 0 ends the list.
struct ClusterSizes {
  int size[9];
};
inline ClusterSizes cluster_sizes(const Device& device, const Problem& pr, int64_t bytes, bool last) {
  ClusterSizes list{};
  int count = 0;
  for (int narrow = 0; narrow < 2; ++narrow)
    for (int size = device.clusters ? 8 : 1; size >= 1; size /= 2) {
      const bool is_narrow = last && size > 1 && quotient_up(pr.C, size) * pr.p * bytes < 64;
      if (size <= pr.C && is_narrow == (narrow == 1)) list.size[count++] = size;
    }
  return list;
}

template <class K>
int64_t shared_bytes(const typename K::Args& args) {
  SharedCarver carve{nullptr};
  const typename K::Shared shared(carve, args);
  static_cast<void>(shared);
  return carve.used;
}
// Fewer positions at a time, then fewer concepts, until the shared memory suffices. False: not even one of each fits.
template <class K>
bool fit(const Device& device, typename K::Args& args, int& concepts, int& block) {
  while (shared_bytes<K>(args) > device.shared) {
    if (block > 1)
      block = (block + 1) / 2;
    else if (concepts > 1)
      concepts = (concepts + 1) / 2;
    else
      return false;
  }
  return true;
}

struct Grid {
  int64_t units;  // of work; a block takes every blocks-th
  int64_t blocks;
  int threads;
  int64_t shared;
  int cluster;
};
template <class K>
Grid grid_of(const Device& device, const typename K::Args& args, int cluster) {
  const int64_t units = K::units(args), most_blocks = (int64_t(1) << 30) / cluster * cluster;
  return {units, least(units, most_blocks), int(least(K::threads, device.threads)), shared_bytes<K>(args), cluster};
}
// A block's units. Blocks of a cluster stay together: `blocks` and `units` are multiples of its size.
template <class K, class Thread>
VCR_DEVICE void run_units(Thread& t, const typename K::Args& args, int64_t units) {
  for (int64_t unit = t.block(); unit < units; unit += t.blocks()) {
    K::run(t, args, unit);
    t.sync();
  }
}

}  // namespace vcr::cuda
