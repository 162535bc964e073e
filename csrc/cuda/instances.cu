// Compiled once per feature type (VCR_DTYPE: float, double, bf16 or f16): the launchers of csrc/*/cuda.h for it. For float and double,
// VCR_STATES=1 adds the op on states.
// The numbers rely on nvcc's --fmad=false: both directions must round alike, and multiply-adds are spelled out.
#include "../concept_modulate/cuda.h"
#include "../concept_modulate/cuda_launch.h"
#include "../concept_reason/cuda.h"
#include "../concept_reason/cuda_launch.h"
#include "../concept_sample/cuda.h"
#include "../concept_sample/cuda_launch.h"
#include "../vcr_middle/cuda.h"
#include "../vcr_middle/cuda_launch.h"
#include "device.cuh"

namespace vcr::cuda {

namespace {

template <class Launch, class Args>
int64_t workspace_bytes(const Args& args) {
  Carver carve{nullptr};
  Launch(args).workspace(carve);
  return carve.used;
}
template <class Launch, class Args>
Status run(const Args& args, void* workspace, void* stream) {
  DeviceRunner runner(stream, run_kernel<MiddleEvaluate<VCR_DTYPE>>);
  if (!runner.status.ok()) return runner.status;
  return Launch(args).run(runner, workspace);
}

}  // namespace

#define VCR_LAUNCHER(name, Args, type)                                       \
  template <>                                                                \
  int64_t name##_workspace<type>(const Args<type>& args) {                   \
    return workspace_bytes<Args##Launch<type>>(args);                        \
  }                                                                          \
  template <>                                                                \
  Status name<type>(const Args<type>& args, void* workspace, void* stream) { \
    return run<Args##Launch<type>>(args, workspace, stream);                 \
  }

VCR_LAUNCHER(middle_forward, MiddleForward, VCR_DTYPE)
VCR_LAUNCHER(middle_backward, MiddleBackward, VCR_DTYPE)
VCR_LAUNCHER(sample_forward, SampleForward, VCR_DTYPE)
VCR_LAUNCHER(sample_backward, SampleBackward, VCR_DTYPE)
VCR_LAUNCHER(modulate_forward, ModulateForward, VCR_DTYPE)
VCR_LAUNCHER(modulate_backward, ModulateBackward, VCR_DTYPE)
#if VCR_STATES  // states are in accumulation type: this file compiled for float and for double
VCR_LAUNCHER(reason_forward, ReasonForward, VCR_DTYPE)
VCR_LAUNCHER(reason_backward, ReasonBackward, VCR_DTYPE)
#endif

}  // namespace vcr::cuda
