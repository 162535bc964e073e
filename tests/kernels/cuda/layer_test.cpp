// The execution layer itself: small kernels that use all of it, right and with a seeded fault each, which must be caught.
//   layer_test                 the right ones, in all orders of threads and blocks; and that a removed barrier gives wrong values
//   layer_test --fault NAME    one fault: ends with a message, or under a sanitizer with its report
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "simt.h"

namespace {

using simt::Fault;
using simt::HostThread;
using simt::Order;

enum class Seeded { none, index, tail, stride, guard, divergent, deadlock, warp, blocks };

// out[r, i] = in[r, S - 1 - i] - mean of row r. A row is staged in shared memory, every thread reads what another wrote.
void reverse_rows(const HostThread& t, const float* in, float* out, int64_t S, Seeded seeded) {
  float* sums = reinterpret_cast<float*>(t.shared());
  float* row = sums + t.count() / simt::warp_size;
  const float* from = in + t.block() * S;
  float sum = 0;
  for (int64_t i = t.index(); i < S; i += t.count()) {
    row[seeded == Seeded::index ? i + 1 : i] = from[i];
    sum += from[i];
  }
  sum = t.reduce(sum, [](float a, float b) { return a + b; });
  if (t.lane() == 0) sums[t.index() / simt::warp_size] = sum;
  t.sync();
  float total = 0;
  for (int w = 0; w < t.count() / simt::warp_size; ++w) total += sums[w];
  const int64_t end = seeded == Seeded::tail ? (S + t.count() - 1) / t.count() * t.count() : S;
  for (int64_t i = t.index(); i < end; i += t.count()) out[t.block() * S + i] = row[S - 1 - i] - total / float(S);
}
// out[i, j] = in[j, i]; R rows of C.
void transpose(const HostThread& t, const float* in, float* out, int R, int C, Seeded seeded) {
  float* tile = reinterpret_cast<float*>(t.shared());
  for (int i = t.index(); i < R * C; i += t.count()) tile[i] = in[i];
  t.sync();
  for (int i = t.index(); i < R * C; i += t.count())
    out[i] = seeded == Seeded::stride ? tile[i / R % R * C + i % R % C] : tile[i % R * C + i / R];
}
// out[block, i] = the sum over the cluster's blocks of in[block, i].
void cluster_sum(const HostThread& t, const float* in, float* out) {
  float* mine = reinterpret_cast<float*>(t.shared());
  mine[t.index()] = in[t.block() * t.count() + t.index()];
  t.cluster_sync();
  float sum = 0;
  for (int rank = 0; rank < t.cluster_size(); ++rank) sum += t.peer(mine, (rank + t.cluster_rank()) % t.cluster_size())[t.index()];
  t.cluster_sync();
  out[t.block() * t.count() + t.index()] = sum;
}
// Block b begins with its own number and takes its neighbour's, b + 1's, round by round.
constexpr int rounds = 3;
void pass_on(const HostThread& t, int* even, int* odd) {
  const int64_t b = t.block(), next = (b + 1) % t.blocks();
  if (t.index() == 0) even[b] = int(b);
  for (int i = 0; i < rounds; ++i) {
    t.grid_sync();
    if (t.index() == t.count() - 1) (i % 2 ? even : odd)[b] = (i % 2 ? odd : even)[next];
  }
}
// out[i] = the number of set bits of the warp's ballot, plus lane 3's index, plus what the next lane wrote.
void warp_work(const HostThread& t, int* out, Seeded seeded) {
  int* written = reinterpret_cast<int*>(t.shared());
  written[t.index()] = t.index();
  if (seeded != Seeded::warp) t.sync_warp();
  const int next = written[t.index() / simt::warp_size * simt::warp_size + (t.lane() + 1) % simt::warp_size];
  out[t.index()] = __builtin_popcount(t.ballot(t.lane() % 3 == 0)) + t.shuffle(t.index(), 3) + next;
}

constexpr int rows = 4, width = 77, threads = 64;
constexpr int64_t shared = (width + threads / simt::warp_size) * int64_t(sizeof(float));

std::vector<float> numbers(int count) {
  std::vector<float> x;
  for (int i = 0; i < count; ++i) x.push_back(float(i * 7919 % 101) - 40);
  return x;
}

bool rows_are_right(const simt::Settings& settings, Seeded seeded) {
  const std::vector<float> in = numbers(rows * width);
  std::vector<float> out(in.size() + threads, -1);
  simt::launch(rows, threads, shared, 1, settings, [&] { reverse_rows({}, in.data(), out.data(), width, seeded); });
  for (int r = 0; r < rows; ++r) {
    double mean = 0;
    for (int i = 0; i < width; ++i) mean += in[size_t(r * width + i)] / double(width);
    for (int i = 0; i < width; ++i) {
      const double error = out[size_t(r * width + i)] - (in[size_t(r * width + width - 1 - i)] - mean);
      if (!(error < 1e-4 && error > -1e-4)) return false;
    }
  }
  for (size_t i = in.size(); i < out.size(); ++i)
    if (out[i] != -1) return false;
  return true;
}
bool transpose_is_right(const simt::Settings& settings, Seeded seeded) {
  constexpr int R = 5, C = 7;
  const std::vector<float> in = numbers(R * C);
  std::vector<float> out(in.size());
  simt::launch(1, 32, R * C * sizeof(float), 1, settings, [&] { transpose({}, in.data(), out.data(), R, C, seeded); });
  for (int i = 0; i < C; ++i)
    for (int j = 0; j < R; ++j)
      if (out[size_t(i * R + j)] != in[size_t(j * C + i)]) return false;
  return true;
}
bool cluster_is_right(const simt::Settings& settings) {
  constexpr int size = 4, clusters = 3;
  const std::vector<float> in = numbers(size * clusters * threads);
  std::vector<float> out(in.size());
  simt::launch(size * clusters, threads, threads * sizeof(float), size, settings, [&] { cluster_sum({}, in.data(), out.data()); });
  for (size_t i = 0; i < in.size(); ++i) {
    float sum = 0;
    for (size_t rank = 0; rank < size; ++rank) sum += in[i / (size * threads) * (size * threads) + rank * threads + i % threads];
    if (!(out[i] == sum)) return false;
  }
  return true;
}
bool grid_is_right(const simt::Settings& settings) {
  constexpr int blocks = 5;
  std::vector<int> even(blocks, -1), odd(blocks, -1);
  simt::launch(blocks, threads, 0, 1, settings, [&] { pass_on({}, even.data(), odd.data()); }, simt::Grid::together);
  for (int b = 0; b < blocks; ++b)
    if (odd[size_t(b)] != (b + rounds) % blocks) return false;
  return true;
}
bool warps_are_right(const simt::Settings& settings, Seeded seeded) {
  std::vector<int> out(threads);
  simt::launch(1, threads, threads * sizeof(int), 1, settings, [&] { warp_work({}, out.data(), seeded); });
  for (int i = 0; i < threads; ++i) {
    const int first = i / simt::warp_size * simt::warp_size;
    if (out[size_t(i)] != 11 + first + 3 + first + (i + 1) % simt::warp_size) return false;
  }
  return true;
}

std::vector<simt::Settings> all_settings() {
  std::vector<simt::Settings> all;
  for (const Order order : {Order::forward, Order::backward, Order::shuffled, Order::by_block})
    for (const Order blocks : {Order::forward, Order::backward, Order::shuffled}) all.push_back({order, blocks, all.size() + 1});
  return all;
}

simt::Settings without(simt::Settings settings, Fault fault) {
  settings.fault = fault;
  return settings;
}

// Some order makes it visible.
template <class Check>
int must_be_wrong(const char* what, Check right) {
  for (const simt::Settings& settings : all_settings())
    if (!right(settings)) {
      std::printf("wrong values (%s)\n", what);
      return 1;
    }
  std::printf("nothing noticed: %s\n", what);
  return 0;
}

int run_fault(const std::string& name) {
  const auto rows_with = [](Seeded seeded) { return [seeded](const simt::Settings& s) { return rows_are_right(s, seeded); }; };
  if (name == "sync")
    return must_be_wrong("no block barrier", [](const simt::Settings& s) { return rows_are_right(without(s, Fault::sync), Seeded::none); });
  if (name == "cluster_sync")
    return must_be_wrong("no cluster barrier", [](const simt::Settings& s) { return cluster_is_right(without(s, Fault::cluster_sync)); });
  if (name == "grid_sync")
    return must_be_wrong("no grid barrier", [](const simt::Settings& s) { return grid_is_right(without(s, Fault::grid_sync)); });
  if (name == "index") return must_be_wrong("an index off by one", rows_with(Seeded::index));
  if (name == "tail") return must_be_wrong("no tail mask", rows_with(Seeded::tail));
  if (name == "stride")
    return must_be_wrong("strides swapped", [](const simt::Settings& s) { return transpose_is_right(s, Seeded::stride); });
  if (name == "warp") return must_be_wrong("no warp barrier", [](const simt::Settings& s) { return warps_are_right(s, Seeded::warp); });
  const std::vector<float> in = numbers(threads);
  int value = 0;
  if (name == "guard")
    simt::launch(1, threads, threads * 4, 1, {}, [&] {
      const HostThread t;
      reinterpret_cast<volatile float*>(t.shared())[t.index() + 1] = in[size_t(t.index())];
    });
  else if (name == "divergent")
    simt::launch(1, threads, 0, 1, {}, [&] {
      const HostThread t;
      if (t.index() < 32)
        t.sync();
      else
        t.sync();
    });
  else if (name == "deadlock")
    simt::launch(1, threads, 0, 1, {}, [&] {
      const HostThread t;
      if (t.index() < 32)
        t.sync();
      else
        t.cluster_sync();
    });
  else if (name == "grid")  // blocks that aren't all there at once
    simt::launch(2, threads, 0, 1, {}, [] { HostThread().grid_sync(); });
  else if (name == "ended")  // a block reads what another may have taken with it
    simt::launch(2, threads, threads * 4, 2, {Order::by_block, Order::forward, 1}, [&] {
      const HostThread t;
      int* mine = reinterpret_cast<int*>(t.shared());
      mine[t.index()] = t.index();
      t.cluster_sync();
      if (t.index() == 0) value += t.peer(mine, 0)[threads - 1];
    });
  else if (name == "blocks")  // a sum over blocks that nothing orders
    simt::launch(2, threads, 0, 1, {}, [&] {
      const HostThread t;
      if (t.index() == t.block()) value += 1;
    });
  else
    return 2;
  std::printf("nothing stopped the fault '%s'\n", name.c_str());
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::strcmp(arguments[1], "--fault") == 0) return run_fault(arguments[2]);
  int checks = 0;
  for (const simt::Settings& settings : all_settings()) {
    if (!rows_are_right(settings, Seeded::none) || !transpose_is_right(settings, Seeded::none) || !cluster_is_right(settings) ||
        !grid_is_right(settings) || !warps_are_right(settings, Seeded::none)) {
      std::printf("FAILED: the layer computes wrong values in order %d, %d\n", int(settings.threads), int(settings.blocks));
      return 1;
    }
    checks += 5;
  }
  std::printf("  layer             %d checks passed\n", checks);
  return 0;
}
