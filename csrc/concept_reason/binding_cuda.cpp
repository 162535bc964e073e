// torch.ops.vcr_ops.concept_reason and its backward: CUDA's kernels. binding_cpu.cpp has the schemas.
#include "../binding/cuda.h"
#include "binding.h"

namespace vcr {

STABLE_TORCH_LIBRARY_IMPL(vcr_ops, VCR_CUDA_KEY, m) {
  m.impl("concept_reason", &boxed<reason<Cuda>>);
  m.impl("concept_reason_backward", &boxed<reason_backward<Cuda>>);
}

}  // namespace vcr
