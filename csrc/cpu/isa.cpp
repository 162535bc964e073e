#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace vcr {

#define VCR_DECLARE(level)                               \
  extern const Kernels<float> kernels_##level##_float;   \
  extern const Kernels<double> kernels_##level##_double; \
  extern const Kernels<bf16> kernels_##level##_bf16;
#if defined(__x86_64__)
VCR_DECLARE(baseline)
VCR_DECLARE(avx2)
VCR_DECLARE(avx512)
#elif defined(__aarch64__)
VCR_DECLARE(neon)
#else
#error "vcr_ops has CPU kernels for x86-64 and 64-bit Arm"
#endif
#undef VCR_DECLARE

namespace {

struct Level {
  const char* name;
  bool (*available)();
  const Kernels<float>* float_kernels;
  const Kernels<double>* double_kernels;
  const Kernels<bf16>* bf16_kernels;
};

#define VCR_LEVEL_ROW(level, test) \
  {#level, [] { return bool(test); }, &kernels_##level##_float, &kernels_##level##_double, &kernels_##level##_bf16}
const Level levels[] = {
#if defined(__x86_64__)
    VCR_LEVEL_ROW(baseline, true),
    VCR_LEVEL_ROW(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
    VCR_LEVEL_ROW(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                              __builtin_cpu_supports("avx512vl")),
#else
    VCR_LEVEL_ROW(neon, true),
#endif
};
#undef VCR_LEVEL_ROW

const Level& choose() {
  std::string names;
  const Level* best = nullptr;
  const char* asked = std::getenv("VCR_OPS_ISA");
  for (const Level& level : levels) {
    if (!level.available()) continue;
    best = &level;
    if (asked != nullptr && asked == std::string(level.name)) return level;
    names += (names.empty() ? "" : ", ") + std::string(level.name);
  }
  if (asked != nullptr && *asked != '\0')
    throw std::runtime_error("VCR_OPS_ISA is '" + std::string(asked) +
                             "', which this machine or this build doesn't have; it takes one of: " + names + " (or leave it unset)");
  return *best;
}

const Level& active() {
  static const Level& level = choose();
  return level;
}

}  // namespace

std::vector<std::string> built_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels) names.emplace_back(level.name);
  return names;
}
std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels)
    if (level.available()) names.emplace_back(level.name);
  return names;
}
const std::string& active_level() {
  static const std::string name = active().name;
  return name;
}

template <>
const Kernels<float>& kernels<float>() {
  return *active().float_kernels;
}
template <>
const Kernels<double>& kernels<double>() {
  return *active().double_kernels;
}
template <>
const Kernels<bf16>& kernels<bf16>() {
  return *active().bf16_kernels;
}

}  // namespace vcr
