// All kernels of one level against the literal equations in double. No torch here.
//   driver                 everything; --every K takes every K-th case
//   driver --fault NAME    a fault that a sanitizer must stop: overread, race
#include <chrono>

#include "calls.h"
#include "ops.h"
#include "simd_test.h"

#define VCR_JOIN_(a, b, c) a##_##b##_##c
#define VCR_JOIN(a, b, c) VCR_JOIN_(a, b, c)
namespace vcr {
extern const Kernels<float> VCR_JOIN(kernels, VCR_LEVEL, float);
extern const Kernels<double> VCR_JOIN(kernels, VCR_LEVEL, double);
extern const Kernels<bf16> VCR_JOIN(kernels, VCR_LEVEL, bf16);
}  // namespace vcr

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

namespace {

template <class T>
const Kernels<T>& tested();
template <>
const Kernels<float>& tested<float>() {
  return VCR_JOIN(kernels, VCR_LEVEL, float);
}
template <>
const Kernels<double>& tested<double>() {
  return VCR_JOIN(kernels, VCR_LEVEL, double);
}
template <>
const Kernels<bf16>& tested<bf16>() {
  return VCR_JOIN(kernels, VCR_LEVEL, bf16);
}

template <class Op, class T>
Called call(const Case& c, const Tensors& inputs, const Setting& how, const Kernels<T>& kernels = tested<T>()) {
  return Op::call(Caller<T>(c, inputs, how), kernels);
}

struct Report {
  int calls = 0, failures = 0;
  Largest largest[3];  // of float, double, bf16
  void fail(const char* op, const Case& c, const char* type, const std::string& where, const std::string& what) {
    if (++failures <= 40) std::printf("FAILED %s %s %s, %s\n%s\n", op, c.name().c_str(), type, where.c_str(), what.c_str());
  }
};

template <class Op, class T>
void check_type(Case c, const Tensors& inputs, const Reference& reference, int turn, Report& report, Largest& largest) {
  const Precision type = precision<T>();
  const auto fail = [&](const std::string& where, const std::string& what) { report.fail(Op::name, c, type.name, where, what); };
  for (const Lie lie : {Lie::contiguous, Lie::channels_last}) {
    if (!Op::maps && lie != Lie::contiguous) break;
    const std::string where = lie_names[int(lie)];
    const Called first = call<Op, T>(c, inputs, {lie, loop.parallel, true});
    ++report.calls;
    if (!first.damage.empty()) fail(where, "    changed: " + first.damage);
    const std::string wrong = reference.check(first.results, type, {}, largest);
    if (!wrong.empty()) fail(where, wrong);
    // the same as a slice, with work divided otherwise
    const Pool& pool = pools[(turn + int(lie)) % pool_count];
    const Lie slice = lie == Lie::contiguous ? Lie::contiguous_slice : Lie::channels_last_slice;
    const Called second = call<Op, T>(c, inputs, {Op::maps ? slice : lie, pool.parallel, true});
    ++report.calls;
    const std::string other = std::string(lie_names[int(slice)]) + ", " + pool.name;
    if (!second.damage.empty()) fail(other, "    changed: " + second.damage);
    const std::string names = differing(first.results, second.results);
    if (!names.empty()) fail(other, "    other bits than in a loop over the dense map: " + names);
    if constexpr (std::is_same_v<Op, Middle> || std::is_same_v<Op, Sample>) {
      const Called forward = call<Op, T>(c, inputs, {lie, pool.parallel, false});
      ++report.calls;
      if (!forward.damage.empty()) fail(where + ", no backward", "    changed: " + forward.damage);
      const std::string bad = reference.check(forward.results, type, gradients_of(reference), largest);
      if (!bad.empty()) fail(where + ", no backward", bad);
      if constexpr (std::is_same_v<Op, Middle>) {
        if ((turn + int(lie)) % 2 == 0) {
          const Called steps = call<Op, T>(c, inputs, {lie, pool.parallel, true, false, true});
          ++report.calls;
          if (!steps.damage.empty()) fail(where + ", in steps", "    changed: " + steps.damage);
          const std::string off = reference.check(steps.results, type, {}, largest);
          if (!off.empty()) fail(where + ", in steps", off);
        }
        if (c.norm == Norm::batch || c.state_batch || c.size.N == 1) continue;
        const size_t image = size_t(c.size.channels() * c.size.S);
        for (int64_t n = 0; n < c.size.N; ++n) {
          Case one = c;
          one.size.N = 1;
          const Called alone = call<Op, T>(one, image_of(inputs, c.size, n), {lie, loop.parallel, false});
          ++report.calls;
          if (std::memcmp(alone.results.at("out").data(), forward.results.at("out").data() + size_t(n) * image, image * sizeof(double)) !=
              0)
            fail(where, "    image " + std::to_string(n) + " comes out otherwise when it is alone");
        }
      }
    }
  }
}

template <class Op>
void check_op(const std::vector<Case>& cases, int every, Report& report) {
  const auto start = std::chrono::steady_clock::now();
  double reference_s = 0;
  int taken = 0;
  Report own;
  for (size_t k = 0; k < cases.size(); k += size_t(every), ++taken) {
    Case c = cases[k];
    Tensors inputs;
    const auto before = std::chrono::steady_clock::now();
    const Reference reference = make_reference<Op>(c, inputs);
    reference_s += std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
    check_type<Op, float>(c, inputs, reference, int(k), own, own.largest[0]);
    check_type<Op, double>(c, inputs, reference, int(k) + 1, own, own.largest[1]);
    check_type<Op, bf16>(c, inputs, reference, int(k) + 2, own, own.largest[2]);
  }
  const double all_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("  %-17s %3d cases, %4d calls, %d failures; %.1f s, of which the reference %.1f s; largest error / bound:", Op::name, taken,
              own.calls, own.failures, all_s, reference_s);
  const char* types[] = {"float", "double", "bf16"};
  for (int i = 0; i < 3; ++i) std::printf(" %s %.2f (%s)", types[i], own.largest[i].ratio, own.largest[i].at.c_str());
  std::printf("\n");
  std::fflush(stdout);
  report.calls += own.calls;
  report.failures += own.failures;
}

// No image: nothing to read, gradients are zero, nothing else is touched.
template <class T>
void check_empty(Report& report) {
  for (int k = 0; k < 6; ++k) {
    Case c;
    c.size = {0, 3, 4, 4, 9};
    c.norm = k % 2 ? Norm::given : Norm::none, c.state_batch = false, c.norm_affine = c.norm == Norm::given;
    c.sampler = Sampler(k / 2), c.modulation = c.sampler == Sampler::pool ? Modulation::channel : Modulation(k % 2);
    for (const Lie lie : {Lie::contiguous, Lie::channels_last}) {
      const Called called = call<Middle, T>(c, draw_middle(c), {lie, pools[k % pool_count].parallel, true});
      ++report.calls;
      if (!called.damage.empty()) report.fail("vcr_middle", c, precision<T>().name, lie_names[int(lie)], "    changed: " + called.damage);
      for (const auto& named : called.results)
        for (double x : named.second)
          if (x != 0) {
            report.fail("vcr_middle", c, precision<T>().name, lie_names[int(lie)], "    " + named.first + " is not 0");
            break;
          }
    }
  }
}

// Maps of 16 MiB, which are written past the caches. Too many for the reference's tape: with given statistics each image must have the
// very bits that it has alone, when it is small.
template <class Op>
void check_large_case(const Case& c, Lie lie, const Pool& pool, Report& report) {
  const Tensors inputs = Op::draw(c);
  const Called whole = call<Op, float>(c, inputs, {lie, pool.parallel, true, true});
  if (!whole.damage.empty()) report.fail("large", c, "float", lie_names[int(lie)], "    changed: " + whole.damage);
  const int64_t image = c.size.channels() * c.size.S;
  for (int64_t n = 0; n < c.size.N; ++n) {
    Case one = c;
    one.size.N = 1;
    const Called alone = call<Op, float>(one, image_of(inputs, c.size, n), {lie, loop.parallel, true, false});
    for (const char* name : {"out", "dy"}) {
      const auto found = alone.results.find(name);
      if (found != alone.results.end() &&
          std::memcmp(found->second.data(), whole.results.at(name).data() + n * image, size_t(image) * sizeof(double)) != 0)
        report.fail("large", c, "float", lie_names[int(lie)],
                    std::string("    ") + name + " of image " + std::to_string(n) + " differs from the image alone");
    }
  }
  report.calls += 1 + int(c.size.N);
}
[[maybe_unused]] void check_large(int every, Report& report) {
  const auto start = std::chrono::steady_clock::now();
  int taken = 0;
  for (int k = 0; k < 6; k += every > 1 ? 3 : 1, taken += 2) {
    Case c;
    c.size = {3, k < 3 ? 16 : 32, k < 3 ? 16 : 8, 4, k % 3 == 1 ? 5505 : 5504};
    c.norm = Norm::given, c.state_batch = false, c.seed = uint64_t(8000 + k);
    c.modulation = k % 3 == 2 ? Modulation::pixel : Modulation::channel;
    c.shortcut = Shortcut(k % 3);
    const Lie lie = k % 2 ? Lie::channels_last : Lie::contiguous;
    check_large_case<Middle>(c, lie, pools[k % pool_count], report);
    check_large_case<NormReluOp>(c, lie, pools[k % pool_count], report);
  }
  const double all_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("  large maps        %3d cases; %.1f s\n", taken, all_s);
}

// ---- seeded faults: each guard of this driver is seen to fail

// Kernels with something wrong around the real ones.
namespace broken {
[[maybe_unused]] void writes_past_a_row(const MiddleForward<float>& f) {
  tested<float>().middle_forward(f);
  f.out.data[f.problem.S] = 1;  // a hole of the slice
}
[[maybe_unused]] void writes_past_the_end(const MiddleForward<float>& f) {
  tested<float>().middle_forward(f);
  f.saved[MiddleSaved<float>::size(f.problem, true)] = 1;
}
void changes_its_input(const MiddleForward<float>& f) {
  tested<float>().middle_forward(f);
  const_cast<float&>(f.y.data[0]) += 1;
}
void leaves_the_last_position_out(const MiddleForward<float>& f) {
  tested<float>().middle_forward(f);
  *f.out.at(f.problem.N - 1, f.problem.channels() - 1, f.problem.S - 1) = std::nanf("");
}
void rounds_once_more(const MiddleForward<float>& f) {
  tested<float>().middle_forward(f);
  if (f.pool.threads > 1) *f.out.at(0, 0, 0) = std::nextafter(*f.out.at(0, 0, 0), 10.f);
}
void is_a_thousandth_off(const MiddleForward<float>& f) {
  tested<float>().middle_forward(f);
  *f.out.at(0, 0, f.problem.S - 1) += 1e-3f;
}
void changes_saved(const MiddleBackward<float>& b) {
  tested<float>().middle_backward(b);
  b.saved[0] += 1;
}
}  // namespace broken

Case fault_case() {
  Case c;
  c.size = {2, 3, 4, 4, 17};
  c.seed = 99;
  return c;
}

int check_faults() {
  int missed = 0, seeded = 0;
  const auto must = [&](bool noticed, const char* fault) {
    ++seeded;
    if (!noticed) ++missed, std::printf("FAILED seeded fault went unnoticed: %s\n", fault);
  };
  Largest ignored;
  // the kernels are right, so a reference that lacks a term must differ from them
  const auto compare = [&](auto op, Case c, Fault fault) {
    using Op = decltype(op);
    Tensors inputs;
    const Reference reference = make_reference<Op>(c, inputs, fault);
    const bool in_float = !reference.check(call<Op, float>(c, inputs, {}).results, precision<float>(), {}, ignored).empty();
    const bool in_double = !reference.check(call<Op, double>(c, inputs, {}).results, precision<double>(), {}, ignored).empty();
    const bool in_bf16 = !reference.check(call<Op, bf16>(c, inputs, {}).results, precision<bf16>(), {}, ignored).empty();
    return in_float && in_double && in_bf16;
  };
  Case pixel = fault_case(), tied = fault_case();
  pixel.modulation = tied.modulation = Modulation::pixel;
  tied.draw = Draw::periodic;
  must(!compare(Middle{}, fault_case(), Fault::none) && !compare(Middle{}, pixel, Fault::none) && !compare(Middle{}, tied, Fault::none),
       "none");
  must(compare(Middle{}, fault_case(), Fault::norm_mean_gradient), "the batch mean's gradient");
  must(compare(Middle{}, fault_case(), Fault::norm_var_gradient), "the batch variance's gradient");
  must(compare(Middle{}, fault_case(), Fault::query_gradient), "the query's gradient");
  must(compare(Middle{}, fault_case(), Fault::softmax_gradient), "the softmax's gradient");
  must(compare(Middle{}, fault_case(), Fault::edges_gradient), "the edges' gradient");
  must(compare(Middle{}, fault_case(), Fault::state_stats_gradient), "the states' mean's gradient");
  must(compare(Middle{}, pixel, Fault::maximum_gradient), "the maximum's gradient");
  must(compare(Middle{}, tied, Fault::tie_gradient), "ties of the maximum");
  must(compare(Middle{}, fault_case(), Fault::transposed_edges), "edges the other way");
  must(compare(Middle{}, fault_case(), Fault::biased_variance), "the returned variance");
  must(compare(Sample{}, fault_case(), Fault::query_gradient), "concept_sample: the query's gradient");
  must(compare(Reason{}, fault_case(), Fault::edges_gradient), "concept_reason: the edges' gradient");
  must(compare(NormReluOp{}, fault_case(), Fault::norm_mean_gradient), "norm_relu: the batch mean's gradient");
  must(compare(NormReluOp{}, fault_case(), Fault::norm_var_gradient), "norm_relu: the batch variance's gradient");
  must(compare(
           Modulate{},
           [&] {
             Case c = pixel;
             c.affine = Affine::scale;
             return c;
           }(),
           Fault::maximum_gradient),
       "concept_modulate: the maximum's gradient");

  Case c = fault_case();
  Tensors inputs;
  const Reference reference = make_reference<Middle>(c, inputs);
  const auto with = [&](void (*forward)(const MiddleForward<float>&), const Setting& how) {
    Kernels<float> kernels = tested<float>();
    kernels.middle_forward = forward;
    return call<Middle, float>(c, inputs, how, kernels);
  };
  const auto wrong = [&](const Called& called) { return !reference.check(called.results, precision<float>(), {}, ignored).empty(); };
  must(wrong(with(broken::leaves_the_last_position_out, {})), "an element not written");
  must(wrong(with(broken::is_a_thousandth_off, {})), "one element 1e-3 off");
  must(wrong(call<Middle, float>(c, inputs, {Lie::contiguous, {run_without_the_last, 1}, true})), "work left out");
  must(with(broken::changes_its_input, {}).damage == "y", "a changed input");
  must(!differing(with(broken::rounds_once_more, {}).results,
                  with(broken::rounds_once_more, {Lie::contiguous, pools[1].parallel, true}).results)
            .empty(),
       "one bit that depends on the pool");
  Kernels<float> kernels = tested<float>();
  kernels.middle_backward = broken::changes_saved;
  must(call<Middle, float>(c, inputs, {}, kernels).damage == "saved", "saved changed by the backward pass");
#if !defined(__SANITIZE_ADDRESS__)  // there the sanitizer stops these at once
  must(with(broken::writes_past_a_row, {Lie::contiguous_slice, loop.parallel, true}).damage == "out", "a write between two rows");
  must(with(broken::writes_past_the_end, {}).damage == "saved", "a write past the end");
#endif
  std::printf("  seeded faults: %d of %d noticed\n", seeded - missed, seeded);
  return missed;
}

// The real kernels with a position too many, or with everything done by two threads at once.
int run_fault(const std::string& name) {
  Case c = fault_case();
  const Tensors inputs = draw_middle(c);
  if (name == "overread") {
    Kernels<float> kernels = tested<float>();
    kernels.middle_forward = [](const MiddleForward<float>& f) {
      MiddleForward<float> longer = f;
      longer.problem.S += 1;
      tested<float>().middle_forward(longer);
    };
    call<Middle, float>(c, inputs, {Lie::contiguous_slice, loop.parallel, false}, kernels);
  } else if (name == "race") {
    call<Middle, float>(c, inputs, {Lie::contiguous, {run_everything_twice_at_once, 2}, false});
  } else {
    std::printf("unknown fault %s\n", name.c_str());
    return 2;
  }
  std::printf("nothing stopped the fault '%s'\n", name.c_str());
  return 0;
}

}  // namespace
}  // namespace vcr_test

int main(int count, char** arguments) {
  using namespace vcr_test;
  int every = 1;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string option = arguments[i];
    if (option == "--fault") return run_fault(arguments[i + 1]);
    if (option == "--every") every = std::atoi(arguments[i + 1]);
  }
  if (every < 1 || count % 2 == 0) return 2;
  const int simd = simd_failures();
  std::printf("  simd.h            %s, %d failures\n", simd_width().c_str(), simd);
  std::fflush(stdout);
  Report report;
  check_op<Middle>(middle_cases(), every, report);
  check_op<Sample>(sample_cases(), every, report);
  check_op<Reason>(reason_cases(), every, report);
  check_op<Modulate>(modulate_cases(), every, report);
  check_op<NormReluOp>(norm_relu_cases(), every, report);
#if !defined(__SANITIZE_THREAD__)  // which doesn't see streaming stores
  check_large(every, report);
#endif
  check_empty<float>(report);
  check_empty<bf16>(report);
  const int missed = check_faults();
  return simd + report.failures + missed == 0 ? 0 : 1;
}
