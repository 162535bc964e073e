// All CUDA kernels, executed on the host, against the literal equations in double. No torch, no CUDA.
//   driver                 everything; --every K takes every K-th case, --small N only maps of at most N elements, once each, and --list 1
//                          names what runs. Some cases are fixed: they run whatever is asked for.
#include <sys/mman.h>

#include <chrono>
#include <cstring>

#include "cuda/convert.cuh"
#include "float16.h"
#include "host_kernels.h"
#include "ops.h"

namespace vcr_test {

template <>
Precision precision<float>() {
  return {"float", 32, 0x1p-24, 0};
}
template <>
Precision precision<double>() {
  return {"double", 64 * 0x1p-29, 0x1p-53, 0};
}
template <>
Precision precision<bf16>() {
  return {"bf16", 32, 0x1p-24, 0x1p-8};
}
template <>
Precision precision<f16>() {
  return {"f16", 32, 0x1p-24, 0x1p-11};
}

namespace {

int64_t small = 0;  // under ThreadSanitizer a thread costs a hundred times what it costs without
bool list = false;

struct Report {
  int calls = 0, failures = 0;
  Largest largest[4];  // of float, double, bf16, f16
  void fail(const char* op, const Case& c, const char* type, const std::string& where, const std::string& what) {
    if (++failures <= 40) std::printf("FAILED %s %s %s, %s\n%s\n", op, c.name().c_str(), type, where.c_str(), what.c_str());
  }
};

// Machines to run on: all sizes are small, so that loops go round more than once, and the last has room for a map on chip.
struct Machine {
  const char* name;
  vcr::cuda::Device device;
  simt::Settings settings;
};
vcr::cuda::Device device_of(int64_t shared, bool clusters, int threads, int64_t tile, int positions, int multiprocessors, int64_t l2) {
  vcr::cuda::Device d;
  d.shared = shared, d.clusters = clusters, d.threads = threads, d.tile = tile, d.positions = positions;
  d.multiprocessors = multiprocessors, d.l2 = l2;
  return d;
}
// Those with an L2 cache launch grids whose blocks wait for each other. Eight multiprocessors are enough for one image and not for several.
const Machine machines[] = {
    {"clusters", device_of(227 << 10, true, 64, 2048, 64, 2, 0), {simt::Order::forward, simt::Order::forward, 1}},
    {"little memory", device_of(24 << 10, true, 32, 1024, 32, 2, 0), {simt::Order::backward, simt::Order::shuffled, 2}},
    {"no clusters", device_of(163 << 10, false, 96, 4096, 128, 8, 1 << 20), {simt::Order::shuffled, simt::Order::backward, 3}},
    {"clusters, together", device_of(227 << 10, true, 32, 2048, 64, 8, 1 << 20), {simt::Order::by_block, simt::Order::forward, 4}},
};
constexpr int machine_count = 4;
// Cases take the types in turn; machines go round otherwise, so that each type meets each machine.
const Machine& machine_of(int turn) { return machines[(turn + turn / 4) % machine_count]; }

// How MiddleEvaluate is launched. Concepts exchange messages within a cluster, or all over a grid whose blocks are there at once.
// (In channels_last only clusters whose blocks read whole sectors of memory come first.)
enum class Evaluation { any, cluster, grid, alone };
const char* const evaluation_names[] = {"", "by clusters", "by a grid", "by blocks alone"};
bool launched_as(Evaluation evaluation) {
  if (evaluation == Evaluation::any) return true;
  const auto& launched = host_runner().launched;
  if (launched.size() != 1 || std::strstr(launched[0].kernel, "MiddleEvaluate") == nullptr) return false;
  const vcr::cuda::Grid& grid = launched[0].grid;
  return grid.together == (evaluation == Evaluation::grid) && (grid.cluster > 1) == (evaluation == Evaluation::cluster);
}

// A case that always runs, because the cases that are drawn by numbers may miss what it does.
struct Fixed {
  int type;                       // of float, double, bf16, f16
  const Machine *first, *second;  // on which both directions run, and evaluation
  Case c;
  Evaluation evaluation = Evaluation::any;
};
struct Turn {
  int number;
  const Machine *first, *second;
  Evaluation evaluation;
  bool fixed;
};

template <class Op, class T>
Called call(const Case& c, const Tensors& inputs, const Machine& machine, Lie lie, bool backward) {
  host_runner().device = machine.device, host_runner().settings = machine.settings;
  return Op::call(Caller<T>(c, inputs, {lie, loop.parallel, backward}), host_kernels<T>());
}

template <class Op, class T>
void check_type(Case c, const Tensors& inputs, const Reference& reference, const Turn& at, Report& report, Largest& largest) {
  const Precision type = precision<T>();
  const auto fail = [&](const std::string& where, const std::string& what) { report.fail(Op::name, c, type.name, where, what); };
  const int turn = at.number;
  const Machine &first = *at.first, &second = *at.second;
  if (list) std::printf("    %s %s; %s; %s\n", c.name().c_str(), type.name, first.name, second.name);
  for (const Lie lie : {Lie::contiguous, Lie::channels_last}) {
    if (!Op::maps && lie != Lie::contiguous) break;
    const Lie slice = lie == Lie::contiguous ? Lie::contiguous_slice : Lie::channels_last_slice;
    const Lie here = Op::maps && turn / 3 % 2 ? slice : lie;
    const std::string where = std::string(lie_names[int(here)]) + ", " + first.name;
    const Called called = call<Op, T>(c, inputs, first, here, true);
    ++report.calls;
    if (!called.damage.empty()) fail(where, "    changed: " + called.damage);
    const std::string wrong = reference.check(called.results, type, {}, largest);
    if (!wrong.empty()) fail(where, wrong);
    if (small > 0 && !at.fixed && turn % 2 == int(lie == Lie::contiguous)) continue;
    // the same bits whatever the order of threads and of blocks, and for a dense map as for a slice
    Machine other = first;
    other.settings = {simt::Order::shuffled, simt::Order::shuffled, uint64_t(turn) + 10};
    if (turn / 4 % 2) other.device.l2 = 0;  // and the same as one kernel and as several
    const Called again = call<Op, T>(c, inputs, other, lie, true);
    ++report.calls;
    const std::string names = differing(called.results, again.results);
    if (!names.empty()) fail(where, "    other bits in another order: " + names);
    if constexpr (std::is_same_v<Op, Middle> || std::is_same_v<Op, Sample>) {
      const std::string alone = std::string(lie_names[int(lie)]) + ", no backward, " + second.name;
      const Called forward = call<Op, T>(c, inputs, second, lie, false);
      ++report.calls;
      if (!forward.damage.empty()) fail(alone, "    changed: " + forward.damage);
      if (!launched_as(at.evaluation)) fail(alone, std::string("    isn't evaluated ") + evaluation_names[int(at.evaluation)]);
      const std::string bad = reference.check(forward.results, type, gradients_of(reference), largest);
      if (!bad.empty()) fail(alone, bad);
      if constexpr (std::is_same_v<Op, Middle>) {
        if (c.norm == Norm::batch || c.state_batch || c.size.N == 1) continue;
        const size_t image = size_t(c.size.channels() * c.size.S);
        for (int64_t n = 0; n < c.size.N; ++n) {
          Case one = c;
          one.size.N = 1;
          const Called single = call<Op, T>(one, image_of(inputs, c.size, n), second, lie, false);
          ++report.calls;
          if (std::memcmp(single.results.at("out").data(), forward.results.at("out").data() + size_t(n) * image, image * sizeof(double)) !=
              0)
            fail(alone, "    image " + std::to_string(n) + " comes out otherwise when it is alone");
        }
      }
    }
  }
}

template <class Op>
void check_op(const std::vector<Case>& cases, int every, const std::vector<Fixed>& fixed, Report& report) {
  const auto start = std::chrono::steady_clock::now();
  double reference_s = 0;
  Report own;
  const auto check = [&](Case c, int type, const Turn& turn) {
    Tensors inputs;
    const auto before = std::chrono::steady_clock::now();
    const Reference reference = make_reference<Op>(c, inputs);
    reference_s += std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
    switch (type) {
      case 0: check_type<Op, float>(c, inputs, reference, turn, own, own.largest[0]); break;
      case 1: check_type<Op, double>(c, inputs, reference, turn, own, own.largest[1]); break;
      case 2: check_type<Op, bf16>(c, inputs, reference, turn, own, own.largest[2]); break;
      default: check_type<Op, f16>(c, inputs, reference, turn, own, own.largest[3]); break;
    }
  };
  int taken = 0;
  for (size_t k = 0, seen = 0; k < cases.size(); ++k) {
    if ((small > 0 && cases[k].size.map() > small) || seen++ % size_t(every) != 0) continue;
    // one type a case: every (type, sampler, modulation) occurs
    check(cases[k], taken % (Op::maps ? 4 : 2), {taken, &machine_of(taken), &machine_of(taken + 1), Evaluation::any, false});
    ++taken;
  }
  int number = 0;
  for (const Fixed& f : fixed) check(f.c, f.type, {number++, f.first, f.second, f.evaluation, true});
  const double all_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("  %-17s %3d cases and %d fixed, %4d calls, %d failures; %.1f s, of which the reference %.1f s; largest error / bound:",
              Op::name, taken, int(fixed.size()), own.calls, own.failures, all_s, reference_s);
  const char* types[] = {"float", "double", "bf16", "f16"};
  for (int i = 0; i < 4; ++i)
    if (!own.largest[i].at.empty()) std::printf(" %s %.2f (%s)", types[i], own.largest[i].ratio, own.largest[i].at.c_str());
  std::printf("\n");
  std::fflush(stdout);
  report.calls += own.calls;
  report.failures += own.failures;
}

// Every choice of every variant, each kind of evaluation and training as one kernel and as several, on maps of more than one stage.
std::vector<Fixed> fixed_middle() {
  const Machine *clusters = &machines[0], *little = &machines[1], *apart = &machines[2], *together = &machines[3];
  const auto middle = [](const Sizes& size, Sampler sampler, Edges edges, Modulation modulation, Affine affine, Norm norm, bool batch) {
    Case c;
    c.size = size, c.sampler = sampler, c.edges = edges, c.modulation = modulation, c.affine = affine, c.norm = norm, c.state_batch = batch;
    c.norm_affine = norm != Norm::none, c.seed = 8000 + uint64_t(size.map());
    return c;
  };
  constexpr Sampler query = Sampler::dynamic_query, logit = Sampler::static_query, pool = Sampler::pool;
  constexpr Edges dynamic = Edges::dynamic_edges, learned = Edges::static_edges, none = Edges::none;
  constexpr Modulation channel = Modulation::channel, pixel = Modulation::pixel;
  constexpr bool batch = true, given = false;
  return {
      {0, little, clusters, middle({2, 4, 8, 2, 35}, query, dynamic, channel, Affine::both, Norm::given, given), Evaluation::cluster},
      {2, clusters, together, middle({1, 3, 4, 4, 70}, query, dynamic, pixel, Affine::both, Norm::given, given), Evaluation::grid},
      {3, apart, clusters, middle({1, 2, 32, 4, 17}, logit, learned, pixel, Affine::scale, Norm::none, given), Evaluation::cluster},
      {1, little, apart, middle({1, 5, 3, 3, 20}, pool, learned, channel, Affine::shift, Norm::given, given), Evaluation::grid},
      {0, apart, clusters, middle({1, 2, 4, 4, 33}, logit, none, pixel, Affine::both, Norm::given, given), Evaluation::alone},
      {0, together, little, middle({2, 2, 4, 4, 40}, logit, dynamic, pixel, Affine::both, Norm::batch, batch)},
      {2, clusters, apart, middle({2, 3, 4, 4, 21}, query, dynamic, channel, Affine::scale, Norm::batch, batch)},
      {3, together, clusters, middle({3, 2, 5, 4, 9}, pool, none, channel, Affine::both, Norm::batch, batch)},
      {1, apart, little, middle({2, 2, 3, 4, 33}, query, learned, pixel, Affine::shift, Norm::none, batch)},
  };
}
std::vector<Fixed> fixed_sample() {
  std::vector<Fixed> fixed;
  for (int k = 0; k < 6; ++k) {
    Case c;
    c.size = {2, 3, 3, 4, 33}, c.sampler = Sampler(k % 3), c.attention_gradient = k < 3, c.seed = uint64_t(8100 + k);
    fixed.push_back({k % 4, &machines[k % 4], &machines[(k + 1) % 4], c});
  }
  return fixed;
}
std::vector<Fixed> fixed_reason() {
  std::vector<Fixed> fixed;
  for (int edges = 0; edges < 3; ++edges) {
    Case c;
    c.size = {2, 3, 1, 4, 1}, c.edges = Edges(edges), c.state_batch = true, c.seed = uint64_t(8200 + edges);
    fixed.push_back({edges % 2, &machines[edges], &machines[edges + 1], c});
  }
  return fixed;
}
std::vector<Fixed> fixed_modulate() {
  std::vector<Fixed> fixed;
  for (int affine = 0; affine < 3; ++affine) {
    Case c;
    c.size = {2, 3, 3, 4, 33}, c.modulation = Modulation::pixel, c.affine = Affine(affine), c.seed = uint64_t(8300 + affine);
    fixed.push_back({affine == 0 ? 0 : affine + 1, &machines[affine], &machines[affine + 1], c});
  }
  return fixed;
}

// No image: nothing to read, gradients are zero, nothing else is touched.
template <class T>
void check_empty(Report& report) {
  for (int k = 0; k < 6; ++k) {
    Case c;
    c.size = {0, 3, 4, 4, 9};
    c.norm = k % 2 ? Norm::given : Norm::none, c.state_batch = false, c.norm_affine = c.norm == Norm::given;
    c.sampler = Sampler(k / 2), c.modulation = c.sampler == Sampler::pool ? Modulation::channel : Modulation(k % 2);
    const Called called = call<Middle, T>(c, draw_middle(c), machines[0], k % 2 ? Lie::channels_last : Lie::contiguous, true);
    ++report.calls;
    if (!called.damage.empty()) report.fail("vcr_middle", c, precision<T>().name, "no image", "    changed: " + called.damage);
    for (const auto& named : called.results)
      for (double x : named.second)
        if (x != 0) {
          report.fail("vcr_middle", c, precision<T>().name, "no image", "    " + named.first + " is not 0");
          break;
        }
  }
}

template <class From, class To>
bool converts(cuda::Number from_type, cuda::Number to_type, const std::vector<double>& numbers) {
  const size_t sizes[] = {1, 0, numbers.size()};  // of arrays that go in one launch
  std::vector<From> from[3];
  std::vector<To> to[3];
  std::vector<cuda::Conversion> list;
  for (int i = 0; i < 3; ++i) {
    for (size_t k = 0; k < sizes[i]; ++k) from[i].push_back(vcr_test::to_type<From>(numbers[k]));
    to[i].assign(sizes[i] + 1, vcr_test::to_type<To>(-7));
    list.push_back({from[i].data(), to[i].data(), int64_t(sizes[i]), from_type, to_type});
  }
  host_runner().device = machines[0].device, host_runner().settings = {};
  if (!cuda::ConvertLaunch(list.data(), int(list.size())).run(host_runner()).ok()) return false;
  for (int i = 0; i < 3; ++i) {
    if (to_double(to[i][sizes[i]]) != -7) return false;
    for (size_t k = 0; k < sizes[i]; ++k) {
      const double right = to_double(vcr_test::to_type<To>(to_double(from[i][k]))), is = to_double(to[i][k]);
      if (!(is == right || (is != is && right != right))) return false;
    }
  }
  return true;
}
void check_convert(Report& report) {
  // more than a unit takes; among them NaN, infinities, what only float64 has, what float16 hasn't, and halfway between two of bfloat16
  std::vector<double> numbers{0.1, -0.0, std::nan(""), HUGE_VAL, -HUGE_VAL, 1e30, 1 + 0x1p-8, 1 + 0x3p-8, 6e-8, -65504};
  while (numbers.size() < 2500) numbers.push_back(std::sin(double(numbers.size())) * double(numbers.size()));
  int wrong = 0;
  const auto all_to = [&](auto from, cuda::Number number) {
    using From = decltype(from);
    wrong += !converts<From, float>(number, cuda::Number::float32, numbers) +
             !converts<From, double>(number, cuda::Number::float64, numbers) +
             !converts<From, bf16>(number, cuda::Number::bfloat16, numbers) + !converts<From, f16>(number, cuda::Number::float16, numbers);
  };
  all_to(float{}, cuda::Number::float32), all_to(double{}, cuda::Number::float64);
  all_to(bf16{}, cuda::Number::bfloat16), all_to(f16{}, cuda::Number::float16);
  report.calls += 16;
  if (wrong != 0) report.failures += wrong, std::printf("FAILED convert: %d of 16 pairs of types\n", wrong);
  std::printf("  convert            16 pairs of types\n");
}

// The kernels without their block barriers, or without the cluster's: the comparison must notice in some order of threads.
void check_faults(Report& report) {
  Case c;
  c.size = {2, 8, 4, 4, 77};
  c.norm = Norm::given, c.state_batch = false, c.seed = 77;
  Case alone = c;
  alone.size.N = 1;
  Largest ignored;
  const auto noticed = [&](simt::Fault fault, Case of, const Machine& on, bool backward) {
    Tensors inputs;
    const Reference reference = make_reference<Middle>(of, inputs);
    for (const simt::Order order : {simt::Order::forward, simt::Order::backward, simt::Order::shuffled, simt::Order::by_block}) {
      Machine machine = on;
      machine.settings.threads = order, machine.settings.fault = fault;
      const Called called = call<Middle, float>(of, inputs, machine, Lie::contiguous, backward);
      const std::vector<std::string> skip = backward ? std::vector<std::string>{} : gradients_of(reference);
      if (!reference.check(called.results, precision<float>(), skip, ignored).empty()) return true;
    }
    return false;
  };
  const Machine &clusters = machines[0], &together = machines[3];
  bool alarm = false;
  for (const bool backward : {false, true})
    alarm = alarm || noticed(simt::Fault::none, c, clusters, backward) || noticed(simt::Fault::none, alone, together, backward);
  struct {
    const char* what;
    bool right;
  } const checks[] = {{"no fault, no alarm", !alarm},
                      {"evaluation without block barriers", noticed(simt::Fault::sync, c, clusters, false)},
                      {"evaluation without cluster barriers", noticed(simt::Fault::cluster_sync, c, clusters, false)},
                      {"evaluation without grid barriers", noticed(simt::Fault::grid_sync, alone, together, false)},
                      {"training without block barriers", noticed(simt::Fault::sync, c, clusters, true)},
                      {"training without grid barriers", noticed(simt::Fault::grid_sync, c, together, true)}};
  for (const auto& check : checks)
    if (!check.right) ++report.failures, std::printf("FAILED seeded fault: %s\n", check.what);
  std::printf("  seeded faults     %d noticed in the kernels\n", 5);
}

#if !defined(__SANITIZE_THREAD__)  // which has no room for such maps
// A map whose runs and images are so far apart that offsets pass 2^31 elements and 2^32 bytes; all that is not touched takes no memory.
struct FarMap {
  static constexpr int64_t run = (int64_t(1) << 30) + 7, image = (int64_t(1) << 32) + 24, elements = 2 * image;
  bf16* data;
  FarMap() {
    void* at = mmap(nullptr, size_t(elements) * sizeof(bf16), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) simt::fail("no address space for a far map");
    data = static_cast<bf16*>(at);
  }
  ~FarMap() { munmap(data, size_t(elements) * sizeof(bf16)); }
  Map<bf16> map(bool last) const { return {data, image, last ? 1 : run, last ? run : 1}; }
};
// out = relu(scale_bias z + shift_bias) by concept_modulate; and its dz.
void check_far(Report& report) {
  for (const bool last : {false, true}) {
    const FarMap z, out, grad;
    const Problem pr{2, 1, 3, 1, last ? 3 : 50};
    const Map<bf16> zm = z.map(last), om = out.map(last), gm = grad.map(last);
    const float scale[3] = {2, -1, 0.5f}, shift[3] = {1, 0, -0.25f}, state[2] = {0, 0};
    const auto value = [](int64_t n, int64_t j, int64_t i) { return double((n * 3 + j) * 5 + i % 7) / 8 - 1; };
    for (int64_t n = 0; n < pr.N; ++n)
      for (int64_t j = 0; j < pr.p; ++j)
        for (int64_t i = 0; i < pr.S; ++i) *zm.at(n, j, i) = to_type<bf16>(value(n, j, i)), *gm.at(n, j, i) = to_type<bf16>(1);
    host_runner().device = machines[0].device, host_runner().settings = {};
    ModulateForward<bf16> f{pr, {nullptr, nullptr, scale, shift}, {zm.data, zm.image, zm.channel, zm.position}, om, state, nullptr, {}};
    host_kernels<bf16>().modulate_forward(f);
    float dstate[2], dscale[3], dshift[3];
    int wrong = 0;
    for (const bool backward : {false, true}) {
      if (backward) {  // dz goes where out was
        ModulateBackward<bf16> b{
            pr,     f.weights, f.z, {gm.data, gm.image, gm.channel, gm.position}, om, state, nullptr, dstate, nullptr, nullptr, dscale,
            dshift, nullptr,   {}};
        host_kernels<bf16>().modulate_backward(b);
      }
      for (int64_t n = 0; n < pr.N; ++n)
        for (int64_t j = 0; j < pr.p; ++j)
          for (int64_t i = 0; i < pr.S; ++i) {
            const double pre = value(n, j, i) * scale[j] + shift[j], right = backward ? (pre > 0 ? scale[j] : 0) : std::max(pre, 0.0);
            wrong += std::fabs(to_double(*om.at(n, j, i)) - right) > 0x1p-8 * std::fabs(right);
          }
    }
    ++report.calls;
    if (wrong != 0) ++report.failures, std::printf("FAILED far map, %s: %d elements\n", last ? "channels_last" : "contiguous", wrong);
  }
  std::printf("  far maps          offsets past 2^31 elements\n");
}
#endif

}  // namespace
}  // namespace vcr_test

int main(int count, char** arguments) {
  using namespace vcr_test;
  int every = 1;
  for (int i = 1; i + 1 < count; i += 2)
    if (std::string(arguments[i]) == "--every")
      every = std::atoi(arguments[i + 1]);
    else if (std::string(arguments[i]) == "--small")
      small = std::atoi(arguments[i + 1]);
    else if (std::string(arguments[i]) == "--list")
      list = std::atoi(arguments[i + 1]) != 0;
    else
      return 2;
  if (every < 1 || count % 2 == 0) return 2;
  Report report;
  const int of_others = every < 8 ? 1 : every;  // seconds together; their cases alternate, so that an even step would miss half
  check_op<Middle>(middle_cases(), every, fixed_middle(), report);
  check_op<Sample>(sample_cases(), of_others, fixed_sample(), report);
  check_op<Reason>(reason_cases(), of_others, fixed_reason(), report);
  check_op<Modulate>(modulate_cases(), of_others, fixed_modulate(), report);
  check_empty<float>(report);
  check_empty<f16>(report);
  check_convert(report);
#if !defined(__SANITIZE_THREAD__)  // faults end it: run.sh has them one by one
  check_far(report);
  check_faults(report);
#endif
  return report.failures == 0 ? 0 : 1;
}
