// The kernel of convert.h.
#pragma once
#include "convert.h"
#include "launch.h"

namespace vcr::cuda {

struct ConvertNumbers {
  static constexpr int threads = 256, resident = 4;
  static constexpr int64_t at_once = 1024;  // numbers of a unit, all of one array
  struct Args {
    Conversion list[conversions_at_once];
    int count;
  };
  struct Shared {
    VCR_BOTH Shared(SharedCarver&, const Args&) {}
  };
  VCR_BOTH static int64_t units(const Args& a) {
    int64_t units = 0;
    for (int i = 0; i < a.count; ++i) units += quotient_up(a.list[i].count, at_once);
    return units;
  }
  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t unit) {
    int i = 0;
    for (; unit >= quotient_up(a.list[i].count, at_once); ++i) unit -= quotient_up(a.list[i].count, at_once);
    const Conversion& c = a.list[i];
    const int64_t end = least(c.count, (unit + 1) * at_once);
    for (int64_t k = unit * at_once + t.index(); k < end; k += t.count()) write(c, k, read(c, k));
  }

 private:
  // double holds what any of the types does
  VCR_DEVICE static double read(const Conversion& c, int64_t k) {
    switch (c.from_type) {
      case Number::float32: return double(static_cast<const float*>(c.from)[k]);
      case Number::float64: return static_cast<const double*>(c.from)[k];
      case Number::bfloat16: return double(widen(static_cast<const bf16*>(c.from)[k]));
      default: return double(widen(static_cast<const f16*>(c.from)[k]));
    }
  }
  VCR_DEVICE static void write(const Conversion& c, int64_t k, double x) {
    switch (c.to_type) {
      case Number::float32: static_cast<float*>(c.to)[k] = float(x); break;
      case Number::float64: static_cast<double*>(c.to)[k] = x; break;
      case Number::bfloat16: static_cast<bf16*>(c.to)[k] = narrow<bf16>(float(x)); break;
      default: static_cast<f16*>(c.to)[k] = narrow<f16>(float(x));
    }
  }
};

struct ConvertLaunch {
  typename ConvertNumbers::Args args{};
  ConvertLaunch(const Conversion* list, int count) {
    for (int i = 0; i < count; ++i) args.list[i] = list[i];
    args.count = count;
  }
  template <class Runner>
  Status run(Runner& runner) const {
    if (ConvertNumbers::units(args) > 0) runner.template launch<ConvertNumbers>(args);
    return runner.status;
  }
};

}  // namespace vcr::cuda
