// torch.ops.vcr_ops.norm_relu: its schema, and from tensors to what the CPU's kernel takes.
#include "../binding/cpu.h"

namespace vcr {
namespace {

template <class A>
ChannelNorm<A> channel_norm(Params<A, Cpu>& get, int64_t channels, const OptionalTensor& mean, const OptionalTensor& var,
                            const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  require(mean.has_value() == var.has_value(), "mean comes with var");
  require(mean.has_value() || !(weight.has_value() || bias.has_value()), "weight and bias come with mean and var");
  return {get(mean, channels, "mean"), get(var, channels, "var"), get(weight, channels, "weight"), get(bias, channels, "bias"), eps};
}

Tensor norm_relu(const Tensor& y, const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& weight,
                 const OptionalTensor& bias, double eps, const OptionalTensor& shortcut, const OptionalTensor& shortcut_mean,
                 const OptionalTensor& shortcut_var, const OptionalTensor& shortcut_weight, const OptionalTensor& shortcut_bias,
                 double shortcut_eps) {
  Cpu device(y);
  require(shortcut.has_value() || !shortcut_mean.has_value(), "shortcut_mean comes with shortcut");
  return Cpu::dispatch(y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput from(y);
    std::optional<MapInput> other;
    if (shortcut.has_value()) other.emplace(*shortcut, from, "shortcut");
    Tensor out = new_map(from.tensor(), from.shape());
    Params<A, Cpu> get(device);
    const int64_t channels = from.shape().channels;
    NormRelu<T> f{};
    f.N = from.shape().N, f.channels = channels, f.S = from.shape().S;
    f.y = from.template map<T>();
    if (other.has_value()) f.shortcut = other->template map<T>();
    f.out = output_map<T>(out);
    f.norm = channel_norm<A>(get, channels, mean, var, weight, bias, eps);
    f.shortcut_norm = channel_norm<A>(get, channels, shortcut_mean, shortcut_var, shortcut_weight, shortcut_bias, shortcut_eps);
    device.run(f);
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vcr_ops, m) {
  m.def(
      "norm_relu(Tensor y, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, float eps, Tensor? shortcut, Tensor? shortcut_mean, "
      "Tensor? shortcut_var, Tensor? shortcut_weight, Tensor? shortcut_bias, float shortcut_eps) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(vcr_ops, CPU, m) { m.impl("norm_relu", TORCH_BOX(&norm_relu)); }

}  // namespace vcr
