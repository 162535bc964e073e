// torch.ops.vcr_ops.concept_modulate and its backward: CUDA's kernels. binding_cpu.cpp has the schemas.
#include "../binding/cuda.h"
#include "binding.h"

namespace vcr {

STABLE_TORCH_LIBRARY_IMPL(vcr_ops, VCR_CUDA_KEY, m) {
  m.impl("concept_modulate", &boxed<modulate<Cuda>>);
  m.impl("concept_modulate_backward", &boxed<modulate_backward<Cuda>>);
}

}  // namespace vcr
