// How kernels are divided among blocks: plain arithmetic, no CUDA. A kernel is a struct: threads of a block at most, `resident` blocks that a
// multiprocessor should hold, Args, Shared (its arrays, cut by a SharedCarver), units(args), run(thread, args, unit). What an image's evaluation computes never depends on the batch.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "status.h"
#include "thread.h"

namespace vcr::cuda {

// What the arithmetic asks of a device, and the sizes that it aims at (tests make them small).
struct Device {
  int64_t shared = 99 << 10;  // bytes of shared memory that a block may have
  int multiprocessors = 1;
  bool clusters = false;    // distributed shared memory
  int64_t l2 = 0;           // bytes of the cache that all multiprocessors share; 0: blocks of a grid can't wait for each other
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
  bool together;  // all blocks are there at once and may wait for each other
};
// Blocks that a device holds at once: registers are bounded by the kernel's own promise, and each block takes 1 KiB of shared memory of the
// system's besides, of which a multiprocessor has one more than a block may have.
template <class K>
int64_t blocks_at_once(const Device& device, int64_t shared) {
  constexpr int64_t reserved = 1 << 10;
  return device.multiprocessors * most(1, least(K::resident, (device.shared + reserved) / (shared + reserved)));
}
template <class K>
Grid grid_of(const Device& device, const typename K::Args& args, int cluster) {
  const int64_t units = K::units(args), most_blocks = (int64_t(1) << 30) / cluster * cluster;
  return {units, least(units, most_blocks), int(least(K::threads, device.threads)), shared_bytes<K>(args), cluster, false};
}
template <class K>
Grid grid_together(const Device& device, const typename K::Args& args) {
  const int64_t shared = shared_bytes<K>(args), blocks = least(K::units(args), blocks_at_once<K>(device, shared));
  return {blocks, blocks, int(least(K::threads, device.threads)), shared, 1, true};
}
// A block's units. Blocks of a cluster stay together: `blocks` and `units` are multiples of its size.
template <class K, class Thread>
VCR_DEVICE void run_units(Thread& t, const typename K::Args& args, int64_t units) {
  for (int64_t unit = t.block(); unit < units; unit += t.blocks()) {
    K::run(t, args, unit);
    t.sync();
  }
}

template <class... X>
constexpr int largest_of(int first, X... rest) {
  for (const int x : {first, rest...}) first = x > first ? x : first;
  return first;
}
template <class... X>
constexpr int least_of(int first, X... rest) {
  for (const int x : {first, rest...}) first = x < first ? x : first;
  return first;
}

// Kernels one after the other, with their arguments. units: of work; 0 leaves one out.
template <class... Ks>
struct Passes {};
template <class K, class... Rest>
struct Passes<K, Rest...> {
  typename K::Args args;
  int64_t units;
  Passes<Rest...> rest;
};
// As one persistent kernel, whose blocks wait for each other between two passes. It saves the launches, each of which ends with a machine
// half idle, and reads from the L2 cache what a pass has read before, as long as the maps fit in there. Same units, same bits.
template <class... Ks>
struct Together {
  static constexpr int threads = largest_of(Ks::threads...), resident = least_of(Ks::resident...);
  using Args = Passes<Ks...>;
  static_assert(sizeof(Args) <= 4096, "a kernel's arguments");
  struct Shared {
    VCR_BOTH Shared(SharedCarver& carve, const Args& a) { carve.used = largest(a); }
    template <class P>
    static VCR_BOTH int64_t largest(const P& passes) {
      if constexpr (std::is_same_v<P, Passes<>>) {
        return 0;
      } else {
        return most(passes.units > 0 ? bytes(passes) : 0, largest(passes.rest));
      }
    }
    template <class K, class... Rest>
    static VCR_BOTH int64_t bytes(const Passes<K, Rest...>& passes) {
      SharedCarver carve{nullptr};
      const typename K::Shared shared(carve, passes.args);
      static_cast<void>(shared);
      return carve.used;
    }
  };
  template <class P>
  static int64_t units_of(const P& passes) {
    if constexpr (std::is_same_v<P, Passes<>>)
      return 0;
    else
      return most(passes.units, units_of(passes.rest));
  }
  static int64_t units(const Args& a) { return units_of(a); }  // blocks that have something to do

  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t) {
    pass(t, a);
  }
  template <class Thread, class K, class... Rest>
  VCR_DEVICE static void pass(Thread& t, const Passes<K, Rest...>& passes) {
    if (passes.units > 0) {
      run_units<K>(t, passes.args, passes.units);
      if constexpr (sizeof...(Rest) > 0) t.grid_sync();
    }
    if constexpr (sizeof...(Rest) > 0) pass(t, passes.rest);
  }
};
template <class Runner>
void launch_apart(Runner&, const Passes<>&) {}
template <class Runner, class K, class... Rest>
void launch_apart(Runner& runner, const Passes<K, Rest...>& passes) {
  if (passes.units > 0) runner.template launch<K>(passes.args);
  launch_apart(runner, passes.rest);
}
// `bytes` are those of all maps that are read or written. In float64, which is for checks, kernels are always apart: a third of the compiler's
// work for nobody.
template <class A, class... Ks, class Runner>
void launch_passes(Runner& runner, const Passes<Ks...>& passes, int64_t bytes) {
  if constexpr (sizeof(A) == 4) {
    if (bytes <= runner.device.l2) return runner.template launch_together<Together<Ks...>>(passes);
  }
  launch_apart(runner, passes);
}

}  // namespace vcr::cuda
