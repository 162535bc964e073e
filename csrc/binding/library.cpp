// What the op library says of itself.
#include <chrono>
#include <cstdlib>

#include "cpu.h"

namespace vcr {
namespace {

double pass_seconds[int(Pass::count)] = {};
std::chrono::steady_clock::time_point last_tick;

void tick(Pass pass) {
  const auto now = std::chrono::steady_clock::now();
  pass_seconds[int(pass)] += std::chrono::duration<double>(now - last_tick).count();
  last_tick = now;
}

std::string join(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ",") + name;
  return out;
}
std::string active_isa() { return active_level(); }
std::string isa_levels() { return join(available_levels()); }

// Seconds in each pass since the last call, in the order of the enum Pass.
Tensor pass_times() {
  const int64_t size = int64_t(Pass::count);
  Tensor out = new_contiguous({shim_codes.cpu, 0}, &size, 1, ScalarType::Double);
  for (int i = 0; i < int(Pass::count); ++i) {
    data<double>(out)[i] = pass_seconds[i];
    pass_seconds[i] = 0;
  }
  return out;
}

}  // namespace

PassClock pass_clock() {
  static const bool on = std::getenv("VCR_OPS_PROFILE") != nullptr;
  if (!on) return nullptr;
  last_tick = std::chrono::steady_clock::now();
  return tick;
}

STABLE_TORCH_LIBRARY(vcr_ops, m) {
  m.def("active_isa() -> str");
  m.def("isa_levels() -> str");
  m.def("pass_times() -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(vcr_ops, CompositeExplicitAutograd, m) {
  m.impl("active_isa", TORCH_BOX(&active_isa));
  m.impl("isa_levels", TORCH_BOX(&isa_levels));
  m.impl("pass_times", &boxed<pass_times>);
}

}  // namespace vcr
