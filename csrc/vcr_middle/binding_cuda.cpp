// torch.ops.vcr_ops.vcr_middle and its backward: CUDA's kernels. binding_cpu.cpp has the schemas.
#include "../binding/cuda.h"
#include "binding.h"

namespace vcr {

STABLE_TORCH_LIBRARY_IMPL(vcr_ops, VCR_CUDA_KEY, m) {
  m.impl("vcr_middle", &boxed<middle<Cuda>>);
  m.impl("vcr_middle_backward", &boxed<middle_backward<Cuda>>);
}

}  // namespace vcr
