// torch.ops.vcr_ops.concept_modulate and its backward: schemas, and the CPU's kernels.
#include "../binding/cpu.h"
#include "binding.h"

namespace vcr {
STABLE_TORCH_LIBRARY_FRAGMENT(vcr_ops, m) {
  m.def(
      "concept_modulate(Tensor z, Tensor state, Tensor? scale_weight, Tensor? shift_weight, Tensor scale_bias, Tensor shift_bias, "
      "Tensor? attention) -> Tensor");
  m.def(
      "concept_modulate_backward(Tensor grad_out, Tensor z, Tensor state, Tensor? scale_weight, Tensor? shift_weight, Tensor scale_bias, "
      "Tensor shift_bias, Tensor? attention) -> (Tensor dz, Tensor dstate, Tensor dscale_weight, Tensor dshift_weight, "
      "Tensor dscale_bias, Tensor dshift_bias, Tensor dattention)");
}
STABLE_TORCH_LIBRARY_IMPL(vcr_ops, CPU, m) {
  m.impl("concept_modulate", &boxed<modulate<Cpu>>);
  m.impl("concept_modulate_backward", &boxed<modulate_backward<Cpu>>);
}

}  // namespace vcr
