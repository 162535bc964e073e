// The CUDA ops as torch sees them, bindings included, with kernels that run on the host and CPU tensors for CUDA ones: what csrc/cuda/*.cu
// and csrc/binding/cuda.cpp define, defined otherwise. The ops are registered for VCR_CUDA_KEY, a dispatch key that nobody else uses here.
#include "binding/cuda.h"
#include "cuda/convert.cuh"
#include "float16.h"
#include "host_kernels.h"

namespace vcr {

bool is_there(const Tensor& t) { return t.is_cpu(); }
Guard enter(int32_t) {
  return {nullptr, [](void*) {}};
}
void* current_stream(int32_t) { return nullptr; }
void check(const cuda::Status& status, int32_t device) {
  if (status.too_wide) throw std::runtime_error(too_wide_on(device));
  require(status.ok(), "a launch failed");
}

namespace cuda {
namespace {

// A small machine with clusters: loops go round more than once.
vcr_test::HostRunner& runner() {
  vcr_test::HostRunner& r = vcr_test::host_runner();
  r.device.shared = 227 << 10, r.device.multiprocessors = 2, r.device.clusters = true;
  r.device.threads = 64, r.device.tile = 2048, r.device.positions = 64;
  r.device.l2 = 64 << 10;  // some of the maps stay there
  r.may_refuse = true;
  return r;
}

}  // namespace

// The tables' functions have workspaces of their own, guarded ones.
#define VCR_LAUNCHER(kernel, Args, T)                   \
  template <>                                           \
  int64_t kernel##_workspace<T>(const Args<T>&) {       \
    return 0;                                           \
  }                                                     \
  template <>                                           \
  Status kernel<T>(const Args<T>& args, void*, void*) { \
    runner();                                           \
    vcr_test::host_kernels<T>().kernel(args);           \
    return vcr_test::host_runner().refusal;             \
  }
#define VCR_LAUNCHERS(T)                             \
  VCR_LAUNCHER(middle_forward, MiddleForward, T)     \
  VCR_LAUNCHER(middle_backward, MiddleBackward, T)   \
  VCR_LAUNCHER(sample_forward, SampleForward, T)     \
  VCR_LAUNCHER(sample_backward, SampleBackward, T)   \
  VCR_LAUNCHER(modulate_forward, ModulateForward, T) \
  VCR_LAUNCHER(modulate_backward, ModulateBackward, T)
VCR_LAUNCHERS(float)
VCR_LAUNCHERS(double)
VCR_LAUNCHERS(bf16)
VCR_LAUNCHERS(f16)
VCR_LAUNCHER(reason_forward, ReasonForward, float)
VCR_LAUNCHER(reason_backward, ReasonBackward, float)
VCR_LAUNCHER(reason_forward, ReasonForward, double)
VCR_LAUNCHER(reason_backward, ReasonBackward, double)

Status convert(const Conversion* list, int count, void*) { return ConvertLaunch(list, count).run(runner()); }

}  // namespace cuda
}  // namespace vcr
