// Kernel bodies executed on the host: the threads of a block, of a cluster's blocks, or of a whole grid that is launched together, are fibers
// of one system thread. Barriers of warps, blocks, clusters and grids, reductions, ballots and distributed shared memory are real; shared
// memory lies between guard zones and starts as NaN.
// Threads run in several orders, and so do blocks. Under AddressSanitizer the guards can't be touched; under ThreadSanitizer fibers are
// threads whose only order is what the barriers make, so that a missing one is a race, and so are two blocks that touch the same memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace simt {

constexpr int warp_size = 32;

// Of threads that can go on. by_block: the first block of those that are there at once runs as far as it can, then the next.
enum class Order { forward, backward, shuffled, by_block };
// A barrier that is left out, to see that it is missed.
enum class Fault { none, sync, cluster_sync, grid_sync };
struct Settings {
  Order threads = Order::forward, blocks = Order::forward;
  uint64_t seed = 1;
  Fault fault = Fault::none;
};
// What the layer ends the process with when a kernel is wrong in a way that only it can see.
constexpr int exit_status = 3;

// `blocks` blocks of `threads` threads with `shared` bytes each, `cluster` adjacent blocks at once, or all of them. body runs in every thread.
enum class Grid { apart, together };
void launch(int64_t blocks, int threads, int64_t shared, int cluster, const Settings& settings, const std::function<void()>& body,
            Grid grid = Grid::apart);

// For the Thread below; of the thread that calls.
int thread_index();
int threads_of_block();
int64_t block_index();
int64_t blocks_of_grid();
int rank_in_cluster();
int blocks_of_cluster();
Fault fault_of_launch();
unsigned char* shared_memory();
unsigned char* peer_of(const void* shared, int rank);
void wait_for_block(const char* file, int line);
void wait_for_warp(const char* file, int line);
void wait_for_cluster(const char* file, int line);
void wait_for_grid(const char* file, int line);
// A warp's exchange: every lane puts its value, then may get any lane's.
void put(const void* value, size_t bytes);
unsigned end_of_turn(const char* file, int line);
void get(void* value, size_t bytes, int lane, unsigned turn);

[[noreturn]] void fail(const std::string& why);

// The Thread that kernel bodies take.
struct HostThread {
  int index() const { return thread_index(); }
  int count() const { return threads_of_block(); }
  int lane() const { return thread_index() % warp_size; }
  int64_t block() const { return block_index(); }
  int64_t blocks() const { return blocks_of_grid(); }
  char* shared() const { return reinterpret_cast<char*>(shared_memory()); }
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    if (fault_of_launch() != Fault::sync) wait_for_block(file, line);
  }
  void sync_warp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const { wait_for_warp(file, line); }
  // op over the warp's lanes in a tree; op must be commutative, so that all lanes get the same bits. As on a GPU, this and what follows
  // don't order memory.
  template <class V, class Op>
  V reduce(V x, Op op, const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    put(&x, sizeof x);
    const unsigned turn = end_of_turn(file, line);
    V all[warp_size];
    for (int i = 0; i < warp_size; ++i) get(&all[i], sizeof x, i, turn);
    for (int distance = warp_size / 2; distance > 0; distance /= 2)
      for (int i = 0; i < distance; ++i) all[i] = op(all[i], all[i + distance]);
    return all[0];
  }
  template <class V>
  V shuffle(V x, int from, const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    put(&x, sizeof x);
    const unsigned turn = end_of_turn(file, line);
    get(&x, sizeof x, from % warp_size, turn);
    return x;
  }
  unsigned ballot(bool x, const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    put(&x, sizeof x);
    const unsigned turn = end_of_turn(file, line);
    unsigned bits = 0;
    for (int i = 0; i < warp_size; ++i) {
      bool b;
      get(&b, sizeof b, i, turn);
      bits |= unsigned(b) << i;
    }
    return bits;
  }
  int cluster_rank() const { return rank_in_cluster(); }
  int cluster_size() const { return blocks_of_cluster(); }
  void cluster_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    if (fault_of_launch() != Fault::cluster_sync) wait_for_cluster(file, line);
  }
  void grid_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    if (fault_of_launch() != Fault::grid_sync) wait_for_grid(file, line);
  }
  // The same place in the shared memory of the cluster's block `rank`.
  template <class X>
  X* peer(X* shared, int rank) const {
    return reinterpret_cast<X*>(peer_of(shared, rank));
  }
};

}  // namespace simt
