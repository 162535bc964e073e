// torch.ops.vcr_ops.move_running_stats, in place and of two batch norms at most: schema and CPU kernel.
#include "../binding/unpack.h"
#include "cpu.h"

namespace vcr {
namespace {

struct OneNorm {
  const OptionalTensor &counter, &mean, &var, &batch_mean, &batch_var;
};

bool is_dense(const Tensor& t, ScalarType type, int64_t count) {
  return t.is_cpu() && t.scalar_type() == type && t.numel() == count && t.is_contiguous();
}
bool is_counter(const Tensor& t) { return t.is_cpu() && t.is_int64() && t.numel() == 1; }

// False where something isn't as the kernel takes it.
template <class A>
bool unpack(const OneNorm& norm, RunningStats<A>& to) {
  constexpr ScalarType type = scalar_type<A>();
  const OptionalTensor* const all[] = {&norm.mean, &norm.var, &norm.batch_mean, &norm.batch_var};
  for (const OptionalTensor* t : all)
    if (!t->has_value() || !is_dense(**t, type, norm.mean->numel())) return false;
  if (norm.counter.has_value() && !is_counter(*norm.counter)) return false;
  to = {norm.counter.has_value() ? static_cast<int64_t*>(norm.counter->mutable_data_ptr()) : nullptr,
        static_cast<A*>(norm.mean->mutable_data_ptr()),
        static_cast<A*>(norm.var->mutable_data_ptr()),
        static_cast<const A*>(norm.batch_mean->const_data_ptr()),
        static_cast<const A*>(norm.batch_var->const_data_ptr()),
        norm.mean->numel()};
  return true;
}

template <class A>
bool move(const OneNorm& first, const OneNorm& second, double momentum) {
  RunningStats<A> one, other;
  const bool two = second.mean.has_value();
  if (!unpack(first, one) || (two && !unpack(second, other))) return false;
  move_running_stats(one, momentum);
  if (two) move_running_stats(other, momentum);
  return true;
}

// Whether they have been moved; otherwise none of them has, and the caller does it in another way.
bool move_running_stats_(const OptionalTensor& counter, const OptionalTensor& mean, const OptionalTensor& var,
                         const OptionalTensor& batch_mean, const OptionalTensor& batch_var, const OptionalTensor& other_counter,
                         const OptionalTensor& other_mean, const OptionalTensor& other_var, const OptionalTensor& other_batch_mean,
                         const OptionalTensor& other_batch_var, double momentum) {
  const OneNorm first{counter, mean, var, batch_mean, batch_var},
      second{other_counter, other_mean, other_var, other_batch_mean, other_batch_var};
  if (!mean.has_value()) return false;
  return mean->scalar_type() == ScalarType::Double ? move<double>(first, second, momentum) : move<float>(first, second, momentum);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vcr_ops, m) {
  m.def(
      "move_running_stats(Tensor(a!)? counter, Tensor(b!)? mean, Tensor(c!)? var, Tensor? batch_mean, Tensor? batch_var, "
      "Tensor(d!)? other_counter, Tensor(e!)? other_mean, Tensor(f!)? other_var, Tensor? other_batch_mean, Tensor? other_batch_var, "
      "float momentum) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(vcr_ops, CPU, m) { m.impl("move_running_stats", &boxed<move_running_stats_>); }

}  // namespace vcr
