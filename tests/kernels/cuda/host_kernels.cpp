#include "host_kernels.h"

#include "concept_modulate/cuda_launch.h"
#include "concept_reason/cuda_launch.h"
#include "concept_sample/cuda_launch.h"
#include "float16.h"
#include "vcr_middle/cuda_launch.h"

namespace vcr_test {

using namespace vcr;

namespace {

// Exactly as many bytes as the launcher asks for, NaN to begin with, between guards.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : block_("workspace", bytes, 0, {}) { block_.poison(); }
  ~Workspace() {
    if (!block_.intact()) simt::fail("written outside the workspace");
  }
  void* data() const { return block_.data(); }

 private:
  Block<unsigned char> block_;
};

template <class Launch, class Args>
void run(const Args& args) {
  const Launch launch(args);
  cuda::Carver carve{nullptr};
  launch.workspace(carve);
  const Workspace workspace(carve.used);
  HostRunner& runner = host_runner();
  runner.status = {};
  runner.launched.clear();
  runner.refusal = launch.run(runner, workspace.data());
  if (!runner.refusal.ok() && !runner.may_refuse) simt::fail("a launch was refused");
}

}  // namespace

template <class T>
const Kernels<T>& host_kernels() {
  static const Kernels<T> kernels = [] {
    Kernels<T> k{};
    k.middle_forward = run<cuda::MiddleForwardLaunch<T>, MiddleForward<T>>;
    k.middle_backward = run<cuda::MiddleBackwardLaunch<T>, MiddleBackward<T>>;
    k.sample_forward = run<cuda::SampleForwardLaunch<T>, SampleForward<T>>;
    k.sample_backward = run<cuda::SampleBackwardLaunch<T>, SampleBackward<T>>;
    k.modulate_forward = run<cuda::ModulateForwardLaunch<T>, ModulateForward<T>>;
    k.modulate_backward = run<cuda::ModulateBackwardLaunch<T>, ModulateBackward<T>>;
    if constexpr (sizeof(T) >= 4) {  // states are in accumulation type
      k.reason_forward = run<cuda::ReasonForwardLaunch<T>, ReasonForward<T>>;
      k.reason_backward = run<cuda::ReasonBackwardLaunch<T>, ReasonBackward<T>>;
    }
    return k;
  }();
  return kernels;
}
template const Kernels<VCR_DTYPE>& host_kernels<VCR_DTYPE>();

}  // namespace vcr_test
