// The launch arithmetic: how work is divided, and how much memory that takes, for maps of more than 2^31 elements, too.
//   launch_test             the checks
//   launch_test --shared    what is launched for the paper's stages: blocks, threads, shared memory
#include <cstdio>
#include <cstring>
#include <string>
#include <typeinfo>

#include "cuda/convert.cuh"
#include "vcr_middle/cuda_launch.h"

namespace {

using namespace vcr;
using namespace vcr::cuda;

int checks = 0, failures = 0;
void check(bool right, const char* what, long long number = 0) {
  ++checks;
  if (!right) ++failures, std::printf("FAILED %s (%lld)\n", what, number);
}

Device h100() {
  Device d;
  d.shared = 227 << 10, d.multiprocessors = 132, d.clusters = true, d.l2 = 50 << 20;
  return d;
}
Device a100() {
  Device d;
  d.shared = 163 << 10, d.multiprocessors = 108, d.l2 = 40 << 20;
  return d;
}
const Problem paper[] = {{16, 32, 4, 4, 56 * 56}, {16, 32, 8, 4, 28 * 28}, {16, 32, 16, 4, 14 * 14}, {16, 32, 32, 8, 7 * 7}};
const Problem huge = {1 << 20, 32, 4, 4, 56 * 56};  // 4.2e11 elements
const Problem wide = {2, 3, 700, 175, 50};
const Problem tall = {1, 1, 1, 4, (int64_t(1) << 31) + 5};

template <class T>
MiddleForward<T> forward(const Problem& pr, bool last, Norm norm, bool state_batch, bool save, Edges edges) {
  MiddleForward<T> f{};
  f.problem = pr;
  f.options.norm = norm, f.options.state_batch = state_batch, f.options.save = save, f.options.edges = edges;
  const int64_t CP = pr.channels();
  f.y.image = f.out.image = CP * pr.S;
  f.y.channel = f.out.channel = last ? 1 : pr.S;
  f.y.position = f.out.position = last ? CP : 1;
  return f;
}

// Remembers what would be launched.
struct Recorder {
  Device device;
  Status status{};
  int launches = 0;
  Grid grid{};
  bool print = false;
  template <class K>
  void launch(const typename K::Args& args, int cluster = 1) {
    ++launches;
    note<K>(grid_of<K>(device, args, cluster));
    check(grid.units >= grid.blocks && !grid.together, "units", grid.units);
  }
  template <class K>
  void launch_together(const typename K::Args& args) {
    ++launches;
    note<K>(grid_together<K>(device, args));
    check(grid.units == grid.blocks && grid.together, "a unit for each block", grid.units);
    // registers: K::resident of a multiprocessor; shared memory: of which each block takes 1 KiB more
    const int64_t of_each = quotient_up(grid.blocks, device.multiprocessors);
    check(of_each <= K::resident && of_each * (grid.shared + 1024) <= device.shared + 1024, "blocks that are there at once", grid.blocks);
  }
  template <class K>
  void note(const Grid& of) {
    grid = of;
    const int cluster = grid.cluster;
    if (print) print_row(typeid(K).name());
    check(grid.shared <= device.shared, "shared memory of a block", grid.shared);
    check(grid.blocks > 0 && grid.blocks <= int64_t(1) << 30 && grid.blocks % cluster == 0, "blocks", grid.blocks);
    check(grid.units % cluster == 0, "units", grid.units);
    check(grid.threads % warp_size == 0 && grid.threads <= 1024, "threads", grid.threads);
  }
  void zero(void*, int64_t) {}
  void print_row(const std::string& mangled) const {  // N3vcr4cuda12ChannelStatsIfEE
    const size_t digits = mangled.find_first_not_of("0123456789", 10);
    const std::string name = mangled.substr(digits, size_t(std::stoi(mangled.substr(10))));
    std::printf("    %-22s %6lld blocks of %3d threads, %6lld bytes, clusters of %d\n", name.c_str(), static_cast<long long>(grid.blocks),
                grid.threads, static_cast<long long>(grid.shared), grid.cluster);
  }
};

template <class T>
void check_plans(const Device& device) {
  for (const bool last : {false, true})
    for (const Problem& pr : {paper[0], paper[1], paper[2], paper[3], huge, tall}) {
      const BlockShape shape = block_shape(device, pr, sizeof(T), last);
      check(shape.concepts >= 1 && shape.concepts <= pr.C && shape.block >= 1 && shape.block <= pr.S, "block_shape");
      for (const int stages : {1, 2, 4}) {
        const int64_t chunk = chunk_of(device, pr, shape, stages);
        check(chunk >= 1 && chunk <= pr.S && (chunk % shape.block == 0 || chunk == pr.S), "chunk_of", chunk);
      }
      Recorder recorder{device};
      char unused = 0;
      const MiddleForward<T> training = forward<T>(pr, last, Norm::batch, true, true, Edges::dynamic_edges);
      const int64_t l2 = sizeof(acc_t<T>) == 4 ? device.l2 : 0, bytes = map_bytes(pr, sizeof(T));
      check(MiddleForwardLaunch<T>(training).run(recorder, &unused).ok() && recorder.launches == (l2 >= 2 * bytes ? 1 : 4),
            "a training step's forward: 4 launches, or 1", recorder.launches);
      MiddleBackward<T> backward{};
      backward.problem = pr, backward.options = training.options, backward.y = training.y;
      backward.grad_out = training.y, backward.dy = training.out;
      recorder.launches = 0;
      check(MiddleBackwardLaunch<T>(backward).run(recorder, &unused).ok() && recorder.launches == (l2 >= 3 * bytes ? 2 : 5),
            "backward: 5 launches, or 2", recorder.launches);
      Carver carve{nullptr};
      MiddleForwardLaunch<T>(training).workspace(carve);
      check(carve.used >= 8 * pr.N * (pr.channels() + 2 * pr.pt), "forward workspace", carve.used);
      Carver more{nullptr};
      MiddleBackwardLaunch<T>(backward).workspace(more);
      check(more.used >= int64_t(sizeof(acc_t<T>)) * 7 * pr.N * pr.channels(), "backward workspace", more.used);
    }
}

void check_evaluation() {
  char unused = 0;
  for (const bool last : {false, true})
    for (const Problem& pr : paper) {
      Recorder on_h100{h100()}, on_a100{a100()};
      on_a100.device.l2 = 0;  // as for maps that are larger
      const MiddleForward<float> f = forward<float>(pr, last, Norm::given, false, false, Edges::dynamic_edges);
      check(MiddleForwardLaunch<float>(f).run(on_h100, &unused).ok() && on_h100.launches == 1, "one launch on sm_90", pr.S);
      check(on_h100.grid.cluster == 8, "a cluster of 8 for float", on_h100.grid.cluster);
      check(MiddleForwardLaunch<float>(f).run(on_a100, &unused).ok() && on_a100.launches == 2, "two launches on sm_80", pr.S);
      const MiddleForward<bf16> g = forward<bf16>(pr, last, Norm::given, false, false, Edges::dynamic_edges);
      on_h100.launches = 0;
      check(MiddleForwardLaunch<bf16>(g).run(on_h100, &unused).ok() && on_h100.launches == 1, "one launch on sm_90", pr.S);
      const MiddleForward<bf16> apart = forward<bf16>(pr, last, Norm::given, false, false, Edges::none);
      on_a100.launches = 0;
      check(MiddleForwardLaunch<bf16>(apart).run(on_a100, &unused).ok() && on_a100.launches == 1, "without messages one launch anywhere",
            pr.S);
    }
  // Of an image alone every concept has a block, and sums go in the order of a batch's.
  for (const bool last : {false, true})
    for (const Device& device : {h100(), a100()})
      for (const Edges edges : {Edges::none, Edges::static_edges})
        for (const Problem& pr : paper) {
          Problem one = pr;
          one.N = 1;
          Recorder recorder{device};
          const MiddleForward<bf16> f = forward<bf16>(one, last, Norm::given, false, false, edges);
          check(MiddleForwardLaunch<bf16>(f).run(recorder, &unused).ok() && recorder.launches == 1 && recorder.grid.blocks == pr.C,
                "a block for each concept of one image", recorder.grid.blocks);
          check(recorder.grid.together == (edges != Edges::none), "blocks wait for each other where there are messages");
          MiddleEvaluate<bf16>::Args many, few;
          if (!MiddleForwardLaunch<bf16>(forward<bf16>(pr, last, Norm::given, false, false, edges)).plan_evaluation(device, many)) continue;
          check(MiddleForwardLaunch<bf16>(f).plan_evaluation(device, few) && many.sample.block == few.sample.block,
                "evaluation's order of sums doesn't know of N");
        }
}

void check_limits() {
  char unused = 0;
  Recorder recorder{a100()};
  check(MiddleForwardLaunch<double>(forward<double>(wide, false, Norm::batch, true, true, Edges::none)).run(recorder, &unused).ok(),
        "a wide concept");
  Problem wider = wide;
  wider.p = 40000, wider.pt = 10000;
  recorder.launches = 0;
  check(MiddleForwardLaunch<float>(forward<float>(wider, true, Norm::batch, true, true, Edges::none)).run(recorder, &unused).too_wide &&
            recorder.launches == 0,
        "too wide a concept is refused before anything is launched");
  check(tile_column(16, 4) == 17 && tile_column(17, 4) == 17 && tile_column(16, 2) == 18 && tile_column(18, 2) == 18 &&
            tile_column(19, 2) == 22,
        "tile_column");
  for (int channels = 1; channels < 70; ++channels) {
    check(tile_column(channels, 4) % 2 == 1 && tile_column(channels, 4) >= channels, "an odd column", channels);
    check(tile_column(channels, 2) / 2 % 2 == 1 && tile_column(channels, 2) % 2 == 0 && tile_column(channels, 2) >= channels, "odd words",
          channels);
  }
  for (int positions = 1; positions < 70; ++positions)
    check(tile_row<float>(positions) >= positions + 3 && tile_row<float>(positions) % 4 == 0, "room for a shift", positions);
  check(images_per_group(1, 64) == 1 && images_per_group(64, 64) == 1 && images_per_group(65, 64) == 2 && images_per_group(0, 64) == 1,
        "groups");
}

void check_convert() {
  Conversion list[3]{};
  list[0].count = 5, list[1].count = 0, list[2].count = (int64_t(1) << 32) + 1;
  Recorder recorder{h100()};
  check(ConvertLaunch(list, 3).run(recorder).ok() && recorder.launches == 1, "conversions in one launch", recorder.launches);
  check(recorder.grid.units == 1 + (int64_t(1) << 22) + 1, "a unit for every 1024 numbers", recorder.grid.units);
  recorder.launches = 0;
  check(ConvertLaunch(list + 1, 1).run(recorder).ok() && recorder.launches == 0, "nothing to convert, nothing is launched");
}

template <class T>
void print_launches(const char* type) {
  char unused = 0;
  for (const bool last : {false, true})
    for (const Problem& pr : paper) {
      std::printf("  %s, p = %lld, S = %lld, N = 16, %s, H100\n", type, static_cast<long long>(pr.p), static_cast<long long>(pr.S),
                  last ? "channels_last" : "contiguous");
      Recorder recorder{h100()};
      recorder.print = true;
      MiddleForwardLaunch<T>(forward<T>(pr, last, Norm::given, false, false, Edges::dynamic_edges)).run(recorder, &unused);
      const MiddleForward<T> training = forward<T>(pr, last, Norm::batch, true, true, Edges::dynamic_edges);
      MiddleForwardLaunch<T>(training).run(recorder, &unused);
      MiddleBackward<T> backward{};
      backward.problem = pr, backward.options = training.options, backward.y = training.y;
      backward.grad_out = training.y, backward.dy = training.out;
      MiddleBackwardLaunch<T>(backward).run(recorder, &unused);
    }
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "--shared") == 0) {
    print_launches<float>("float");
    print_launches<bf16>("bf16");
    return 0;
  }
  Device apart = h100();
  apart.l2 = 0;
  for (const Device& device : {h100(), a100(), apart}) {
    check_plans<float>(device);
    check_plans<double>(device);
    check_plans<bf16>(device);
  }
  check_evaluation();
  check_limits();
  check_convert();
  std::printf("  launch arithmetic %d checks, %d failures\n", checks, failures);
  return failures != 0;
}
