// torch.ops.vcr_ops.concept_sample and its backward: CUDA's kernels. binding_cpu.cpp has the schemas.
#include "../binding/cuda.h"
#include "binding.h"

namespace vcr {

STABLE_TORCH_LIBRARY_IMPL(vcr_ops, VCR_CUDA_KEY, m) {
  m.impl("concept_sample", &boxed<sample<Cuda>>);
  m.impl("concept_sample_backward", &boxed<sample_backward<Cuda>>);
}

}  // namespace vcr
