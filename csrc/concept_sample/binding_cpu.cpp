// torch.ops.vcr_ops.concept_sample and its backward: schemas, and the CPU's kernels.
#include "../binding/cpu.h"
#include "binding.h"

namespace vcr {
STABLE_TORCH_LIBRARY_FRAGMENT(vcr_ops, m) {
  m.def(
      "concept_sample(Tensor z, Tensor value, Tensor? query, Tensor? key, Tensor? logit, str sampler, bool need_attention, bool save) -> "
      "(Tensor h, Tensor attention, Tensor saved)");
  m.def(
      "concept_sample_backward(Tensor dh, Tensor? dattention, Tensor z, Tensor value, Tensor? query, Tensor? key, Tensor? logit, "
      "Tensor saved, str sampler) -> (Tensor dz, Tensor dvalue, Tensor dquery, Tensor dkey, Tensor dlogit)");
}
STABLE_TORCH_LIBRARY_IMPL(vcr_ops, CPU, m) {
  m.impl("concept_sample", &boxed<sample<Cpu>>);
  m.impl("concept_sample_backward", &boxed<sample_backward<Cpu>>);
}

}  // namespace vcr
