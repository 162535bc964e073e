#include "host_kernels.h"

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
  if (!launch.run(runner, workspace.data()).ok()) simt::fail("a launch was refused");
}

}  // namespace

template <class T>
const Kernels<T>& host_kernels() {
  static const Kernels<T> kernels = [] {
    Kernels<T> k{};
    k.middle_forward = run<cuda::MiddleForwardLaunch<T>, MiddleForward<T>>;
    k.middle_backward = run<cuda::MiddleBackwardLaunch<T>, MiddleBackward<T>>;
    return k;
  }();
  return kernels;
}
template const Kernels<VCR_DTYPE>& host_kernels<VCR_DTYPE>();

}  // namespace vcr_test
