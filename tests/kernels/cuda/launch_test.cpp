// The launch arithmetic: how work is divided, and how much memory that takes, for maps of more than 2^31 elements, too.
//   launch_test             the checks
//   launch_test --shared    the shared memory of every kernel for the paper's stages; fails where it is more than an architecture has
#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <typeinfo>
#include <vector>

#include "concept_modulate/cuda_launch.h"
#include "concept_reason/cuda_launch.h"
#include "concept_sample/cuda_launch.h"
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
const Problem huge = {1 << 20, 32, 4, 4, 56 * 56};           // 4.2e11 elements
const Problem many = {int64_t(1) << 26, 32, 4, 4, 56 * 56};  // more than 2^31 units of work, and bytes beside the maps
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

// ChannelStats<float>
std::string name_of(const std::type_info& kernel) {
  char* demangled = abi::__cxa_demangle(kernel.name(), nullptr, nullptr, nullptr);
  std::string name = demangled;
  std::free(demangled);
  for (const std::string space : {"vcr::cuda::", "vcr::"})
    for (size_t at; (at = name.find(space)) != std::string::npos;) name.erase(at, space.size());
  return name;
}

// Remembers what would be launched.
struct Recorder {
  Device device;
  Status status{};
  int launches = 0;
  Grid grid{};
  std::vector<std::string> plan{};  // NAME UNITS[ in BLOCKS] x THREADS, BYTES[, clusters of N][, together]
  std::map<std::string, int64_t> shared{};
  template <class K>
  void launch(const typename K::Args& args, int cluster = 1) {
    ++launches;
    note(typeid(K), grid_of<K>(device, args, cluster));
    check(grid.units >= grid.blocks && !grid.together, "units", grid.units);
  }
  template <class K>
  void launch_together(const typename K::Args& args) {
    ++launches;
    note(typeid(K), grid_together<K>(device, args));
    check(grid.units == grid.blocks && grid.together, "a unit for each block", grid.units);
    // registers: K::resident of a multiprocessor; shared memory: of which each block takes 1 KiB more
    const int64_t of_each = quotient_up(grid.blocks, device.multiprocessors);
    check(of_each <= K::resident && of_each * (grid.shared + 1024) <= device.shared + 1024, "blocks that are there at once", grid.blocks);
  }
  void note(const std::type_info& kernel, const Grid& of) {
    grid = of;
    const int cluster = grid.cluster;
    const std::string name = name_of(kernel);
    plan.push_back(name.substr(0, name.find('<')) + ' ' + std::to_string(grid.units) +
                   (grid.blocks != grid.units ? " in " + std::to_string(grid.blocks) : "") + " x " + std::to_string(grid.threads) + ", " +
                   std::to_string(grid.shared) + (cluster > 1 ? ", clusters of " + std::to_string(cluster) : "") +
                   (grid.together ? ", together" : ""));
    shared[name] = most(shared[name], grid.shared);
    check(grid.shared <= device.shared, "shared memory of a block", grid.shared);
    check(grid.blocks > 0 && grid.blocks <= int64_t(1) << 30 && grid.blocks % cluster == 0, "blocks", grid.blocks);
    check(grid.units % cluster == 0, "units", grid.units);
    check(grid.threads % warp_size == 0 && grid.threads <= 1024, "threads", grid.threads);
  }
  void zero(void*, int64_t) {}
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

struct Planned {
  const char* op;
  bool ok;
  int64_t workspace;
  Recorder recorder;
};
template <class Launch, class Args>
Planned planned(const char* op, const Device& device, const Args& args) {
  const Launch launch(args);
  Carver carve{nullptr};
  launch.workspace(carve);
  Planned p{op, false, carve.used, {device}};
  char unused = 0;
  p.ok = launch.run(p.recorder, &unused).ok();
  return p;
}
// Evaluation, and both directions of every op in training.
template <class T>
std::vector<Planned> plans(const Device& device, const Problem& pr, bool last, Modulation modulation) {
  using A = acc_t<T>;
  static A there[1];  // for pointers that say what is asked for
  MiddleForward<T> evaluation = forward<T>(pr, last, Norm::given, false, false, Edges::dynamic_edges);
  MiddleForward<T> training = forward<T>(pr, last, Norm::batch, true, true, Edges::dynamic_edges);
  evaluation.options.modulation = training.options.modulation = modulation;
  MiddleBackward<T> backward{};
  backward.problem = pr, backward.options = training.options;
  backward.y = backward.grad_out = training.y, backward.dy = training.out;
  SampleForward<T> sample{};
  SampleBackward<T> sample_backward{};
  ModulateForward<T> modulate{};
  ModulateBackward<T> modulate_backward{};
  sample.problem = sample_backward.problem = modulate.problem = modulate_backward.problem = pr;
  sample.z = sample_backward.z = modulate.z = modulate_backward.z = modulate_backward.grad_out = training.y;
  sample_backward.dz = modulate.out = modulate_backward.dz = training.out;
  sample.sampler = sample_backward.sampler = Sampler::dynamic_query;
  sample.save = true, sample.saved = there, sample.attention = there, sample_backward.dattention = there;
  if (modulation == Modulation::pixel) modulate.attention = modulate_backward.attention = modulate_backward.dattention = there;
  ReasonForward<A> reason{};
  ReasonBackward<A> reason_backward{};
  reason.N = reason_backward.N = pr.N, reason.C = reason_backward.C = pr.C, reason.pt = reason_backward.pt = pr.pt;
  reason.edges = reason_backward.edges = Edges::dynamic_edges, reason.batch = reason_backward.batch = true;
  return {planned<MiddleForwardLaunch<T>>("evaluation", device, evaluation),
          planned<MiddleForwardLaunch<T>>("training", device, training),
          planned<MiddleBackwardLaunch<T>>("backward", device, backward),
          planned<SampleForwardLaunch<T>>("concept_sample", device, sample),
          planned<SampleBackwardLaunch<T>>("concept_sample_backward", device, sample_backward),
          planned<ReasonForwardLaunch<A>>("concept_reason", device, reason),
          planned<ReasonBackwardLaunch<A>>("concept_reason_backward", device, reason_backward),
          planned<ModulateForwardLaunch<T>>("concept_modulate", device, modulate),
          planned<ModulateBackwardLaunch<T>>("concept_modulate_backward", device, modulate_backward)};
}

// The workspace and the launches, to the byte.
struct Exact {
  int64_t workspace;
  std::vector<const char*> launches;
};
void check_exact(const char* what, const std::vector<Planned>& all, const std::vector<Exact>& expected) {
  check(all.size() == expected.size(), what, static_cast<long long>(all.size()));
  for (size_t i = 0; i < all.size() && i < expected.size(); ++i) {
    const Planned& is = all[i];
    const Exact& right = expected[i];
    ++checks;
    if (is.ok && is.workspace == right.workspace &&
        std::equal(right.launches.begin(), right.launches.end(), is.recorder.plan.begin(), is.recorder.plan.end()))
      continue;
    ++failures;
    std::printf("FAILED %s, %s:\n  a workspace of %lld, and it is %lld\n", what, is.op, static_cast<long long>(right.workspace),
                static_cast<long long>(is.workspace));
    for (const char* launch : right.launches) std::printf("  expected %s\n", launch);
    for (const std::string& launch : is.recorder.plan) std::printf("  is       %s\n", launch.c_str());
  }
}
// In the order of plans(). The arithmetic was done apart from this code, from the arrays that Workspace and Shared list.
void check_exact() {
  check_exact("stage 1, float", plans<float>(h100(), paper[0], false, Modulation::channel),
              {
                  {81472, {"MiddleEvaluate 128 x 256, 210688, clusters of 8"}},
                  {50176, {"Together 264 x 256, 37632, together"}},
                  {314368,
                   {"ModulateBackwardSums 256 x 256, 33344", "StateGradients 16 x 256, 0", "StateNormBackward 16 x 256, 128",
                    "SmallGradients 512 x 128, 0", "MiddleInputGrad 1792 x 256, 24992"}},
                  {0, {"ConceptSample 256 x 256, 37632"}},
                  {77824, {"AttentionSums 256 x 256, 20688", "SampleGradients 32 x 256, 0", "MiddleInputGrad 1792 x 256, 24992"}},
                  {1024, {"ConceptReason 16 x 256, 0", "NormaliseStates 16 x 256, 64"}},
                  {25600, {"StateReluBackward 16 x 256, 0", "StateNormBackward 16 x 256, 128", "ReasonGradients 32 x 256, 0"}},
                  {0, {"ModulateAlone 1792 x 256, 176"}},
                  {32768, {"ModulateAloneBackward 256 x 256, 37552", "ModulateGradients 32 x 256, 0"}},
              });
  check_exact("stage 4, bf16", plans<bf16>(h100(), paper[3], true, Modulation::pixel),
              {
                  {411776, {"MiddleEvaluate 128 x 256, 21152, clusters of 8"}},
                  {395264, {"Together 264 x 256, 7520, together"}},
                  {3708928, {"Together 264 x 256, 9632, together", "MiddleInputGrad 512 x 256, 8464"}},
                  {0, {"ConceptSample 512 x 256, 7520"}},
                  {446464, {"AttentionSums 512 x 256, 3824", "SampleGradients 32 x 256, 0", "MiddleInputGrad 512 x 256, 4912"}},
                  {2048, {"ConceptReason 16 x 256, 0", "NormaliseStates 16 x 256, 128"}},
                  {51200, {"StateReluBackward 16 x 256, 0", "StateNormBackward 16 x 256, 256", "ReasonGradients 32 x 256, 0"}},
                  {0, {"ModulateAlone 512 x 256, 4208"}},
                  {262144, {"ModulateAloneBackward 512 x 256, 8576", "ModulateGradients 32 x 256, 0"}},
              });
  check_exact(
      "many", plans<float>(h100(), many, false, Modulation::pixel),
      {
          {335007450688, {"MiddleEvaluate 536870912 x 256, 210688, clusters of 8"}},
          {73014575104,
           {"ChannelStats 1024 x 256, 16864", "ConceptSample 1073741824 x 256, 37632", "ConceptReason 67108864 x 256, 0",
            "ConceptModulate 4294967296 in 1073741824 x 256, 20896"}},
          {536871337984,
           {"ModulateBackwardSums 1073741824 x 256, 45904", "StateGradients 67108864 x 256, 0", "StateNormBackward 67108864 x 256, 128",
            "SmallGradients 1024 x 128, 0", "MiddleInputGrad 2147483648 in 1073741824 x 256, 45600"}},
          {0, {"ConceptSample 1073741824 x 256, 37632"}},
          {326417514496,
           {"AttentionSums 1073741824 x 256, 20688", "SampleGradients 32 x 256, 0",
            "MiddleInputGrad 2147483648 in 1073741824 x 256, 24992"}},
          {4294967296, {"ConceptReason 67108864 x 256, 0", "NormaliseStates 67108864 x 256, 64"}},
          {107374182400, {"StateReluBackward 67108864 x 256, 0", "StateNormBackward 67108864 x 256, 128", "ReasonGradients 32 x 256, 0"}},
          {0, {"ModulateAlone 4294967296 in 1073741824 x 256, 20784"}},
          {137438953472, {"ModulateAloneBackward 1073741824 x 256, 37552", "ModulateGradients 32 x 256, 0"}},
      });
  check_exact("tall", plans<bf16>(h100(), tall, false, Modulation::channel),
              {
                  {176, {"ConceptSample 1 x 256, 3296", "ConceptModulate 2097153 x 256, 176"}},
                  {96,
                   {"ChannelStats 1 x 256, 1120", "ConceptSample 1 x 256, 11600", "ConceptReason 1 x 256, 0",
                    "ConceptModulate 2097153 x 256, 176"}},
                  {400,
                   {"ModulateBackwardSums 1 x 256, 2208", "StateGradients 1 x 256, 0", "StateNormBackward 1 x 256, 128",
                    "SmallGradients 1 x 128, 0", "MiddleInputGrad 1048577 x 256, 5280"}},
                  {0, {"ConceptSample 1 x 256, 11600"}},
                  {176, {"AttentionSums 1 x 256, 3120", "SampleGradients 1 x 256, 0", "MiddleInputGrad 1048577 x 256, 5280"}},
                  {64, {"ConceptReason 1 x 256, 0", "NormaliseStates 1 x 256, 64"}},
                  {112, {"StateReluBackward 1 x 256, 0", "StateNormBackward 1 x 256, 128", "ReasonGradients 1 x 256, 0"}},
                  {0, {"ModulateAlone 2097153 x 256, 96"}},
                  {64, {"ModulateAloneBackward 1 x 256, 4288", "ModulateGradients 1 x 256, 0"}},
              });
}

struct Arch {
  const char* name;
  int64_t limit;  // bytes of shared memory that a block may have
  Device device;
};
// The most that a block of each kernel is given over the paper's stages, N = 1 and 16, both layouts and both modulations, as several kernels
// and as one.
template <class T>
void find_shared(const std::vector<Arch>& archs, std::map<std::string, std::vector<int64_t>>& rows) {
  for (size_t i = 0; i < archs.size(); ++i)
    for (int k = 0; k < 16; ++k)
      for (Problem pr : paper) {
        pr.N = k & 1 ? 16 : 1;
        Device device = archs[i].device;
        if (k & 8) device.l2 = 0;
        for (const Planned& p : plans<T>(device, pr, (k & 2) != 0, k & 4 ? Modulation::pixel : Modulation::channel)) {
          check(p.ok, p.op, pr.S);
          for (const auto& [kernel, bytes] : p.recorder.shared) {
            std::vector<int64_t>& row = rows[kernel];
            row.resize(archs.size());
            row[i] = most(row[i], bytes);
          }
        }
      }
}
int print_shared() {
  // What a block may have: CUDA's table of compute capabilities.
  std::vector<Arch> archs{
      {"sm_80", 163 << 10, a100()}, {"sm_86", 99 << 10, a100()}, {"sm_90", 227 << 10, h100()}, {"sm_100", 227 << 10, h100()}};
  for (Arch& arch : archs) arch.device.shared = arch.limit;
  std::map<std::string, std::vector<int64_t>> rows;
  find_shared<float>(archs, rows), find_shared<bf16>(archs, rows), find_shared<f16>(archs, rows);
  std::printf("%-36s", "shared memory of a block, bytes");
  for (const Arch& arch : archs) std::printf(" %7s", arch.name);
  std::printf("\n");
  int above = 0;
  const auto print = [&](const std::string& name, const std::vector<int64_t>& row) {
    std::printf("%-36s", name.c_str());
    for (const int64_t bytes : row) std::printf(" %7lld", static_cast<long long>(bytes));
    std::printf("\n");
  };
  std::vector<int64_t> limits;
  for (const Arch& arch : archs) limits.push_back(arch.limit);
  for (const auto& [name, row] : rows) {
    print(name.size() > 36 ? name.substr(0, 33) + "..." : name, row);
    for (size_t i = 0; i < archs.size(); ++i) above += row[i] > limits[i];
  }
  print("may have", limits);
  std::printf("%zu kernels, %d times more than a block may have, %d other failures\n", rows.size(), above, failures);
  return above + failures != 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "--shared") == 0) return print_shared();
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
  check_exact();
  std::printf("  launch arithmetic %d checks, %d failures\n", checks, failures);
  return failures != 0;
}
