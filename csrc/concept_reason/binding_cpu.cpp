// torch.ops.vcr_ops.concept_reason and its backward: schemas, and the CPU's kernels.
#include "../binding/cpu.h"
#include "binding.h"

namespace vcr {
STABLE_TORCH_LIBRARY_FRAGMENT(vcr_ops, m) {
  m.def(
      "concept_reason(Tensor h, Tensor? edge, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, float eps, str edges, bool save) -> "
      "(Tensor state, Tensor mean, Tensor var, Tensor saved)");
  m.def(
      "concept_reason_backward(Tensor dstate, Tensor h, Tensor? edge, Tensor? weight, Tensor? bias, Tensor saved, str edges, bool batch) "
      "-> "
      "(Tensor dh, Tensor dedge, Tensor dweight, Tensor dbias)");
}
STABLE_TORCH_LIBRARY_IMPL(vcr_ops, CPU, m) {
  m.impl("concept_reason", &boxed<reason<Cpu>>);
  m.impl("concept_reason_backward", &boxed<reason_backward<Cpu>>);
}

}  // namespace vcr
