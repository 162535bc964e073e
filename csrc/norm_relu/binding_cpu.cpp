// torch.ops.vcr_ops.norm_relu, with given statistics, and batch_norm_relu, with the batch's, and its backward: schemas, and from tensors
// to what the CPU's kernels take.
#include "../binding/cpu.h"

namespace vcr {
namespace {

template <class T>
NormRelu<T> problem(const MapInput& y) {
  NormRelu<T> f{};
  f.N = y.shape().N, f.channels = y.shape().channels, f.S = y.shape().S;
  return f;
}

template <class A>
ChannelNorm<A> channel_norm(Params<A, Cpu>& get, int64_t channels, const OptionalTensor& mean, const OptionalTensor& var,
                            const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  require(mean.has_value() == var.has_value(), "mean comes with var");
  require(mean.has_value() || !(weight.has_value() || bias.has_value()), "weight and bias come with mean and var");
  return {get(mean, channels, "mean"), get(var, channels, "var"), get(weight, channels, "weight"), get(bias, channels, "bias"), eps};
}

// Into `out` where there is one: a map that lies as `from` does, or `from` itself.
struct GivenNorms {
  const OptionalTensor &mean, &var, &weight, &bias;
  double eps;
  const OptionalTensor &shortcut, &shortcut_mean, &shortcut_var, &shortcut_weight, &shortcut_bias;
  double shortcut_eps;

  void run(Cpu& device, const MapInput& from, Tensor& out) const {
    require(shortcut.has_value() || !shortcut_mean.has_value(), "shortcut_mean comes with shortcut");
    Cpu::dispatch(out.scalar_type(), [&](auto type) {
      using T = decltype(type);
      using A = acc_t<T>;
      std::optional<MapInput> other;
      if (shortcut.has_value()) other.emplace(*shortcut, from, "shortcut");
      Params<A, Cpu> get(device);
      NormRelu<T> f = problem<T>(from);
      const int64_t channels = f.channels;
      f.y = from.template map<T>();
      if (other.has_value()) f.shortcut = other->template map<T>();
      f.out = output_map<T>(out);
      f.norm = channel_norm<A>(get, channels, mean, var, weight, bias, eps);
      f.shortcut_norm = channel_norm<A>(get, channels, shortcut_mean, shortcut_var, shortcut_weight, shortcut_bias, shortcut_eps);
      device.run(f);
      return 0;
    });
  }
};

Tensor norm_relu(const Tensor& y, const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& weight,
                 const OptionalTensor& bias, double eps, const OptionalTensor& shortcut, const OptionalTensor& shortcut_mean,
                 const OptionalTensor& shortcut_var, const OptionalTensor& shortcut_weight, const OptionalTensor& shortcut_bias,
                 double shortcut_eps) {
  Cpu device(y);
  const MapInput from(y);
  Tensor out = new_map(from.tensor(), from.shape());
  GivenNorms{mean, var, weight, bias, eps, shortcut, shortcut_mean, shortcut_var, shortcut_weight, shortcut_bias, shortcut_eps}.run(
      device, from, out);
  return out;
}

void norm_relu_(Tensor y, const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
                double eps, const OptionalTensor& shortcut, const OptionalTensor& shortcut_mean, const OptionalTensor& shortcut_var,
                const OptionalTensor& shortcut_weight, const OptionalTensor& shortcut_bias, double shortcut_eps) {
  Cpu device(y);
  require(MapShape(y).dense, "y is written in place: it must be a contiguous or a channels_last map");
  const MapInput from(y);
  GivenNorms{mean, var, weight, bias, eps, shortcut, shortcut_mean, shortcut_var, shortcut_weight, shortcut_bias, shortcut_eps}.run(
      device, from, y);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& y, const OptionalTensor& weight, const OptionalTensor& bias,
                                                           double eps, const OptionalTensor& shortcut) {
  Cpu device(y);
  return Cpu::dispatch(y.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput from(y);
    std::optional<MapInput> other;
    if (shortcut.has_value()) other.emplace(*shortcut, from, "shortcut");
    NormRelu<T> f = problem<T>(from);
    const int64_t channels = f.channels;
    require(f.N * f.S > 1, "the batch's statistics take more than one value a channel");
    Tensor out = new_map(from.tensor(), from.shape()), mean = new_small<A>(device.place(), {channels}),
           unbiased = new_small<A>(device.place(), {channels}), var = new_small<A>(device.place(), {channels});
    Params<A, Cpu> get(device);
    f.y = from.template map<T>();
    if (other.has_value()) f.shortcut = other->template map<T>();
    f.out = output_map<T>(out);
    f.mean = data<A>(mean), f.var = data<A>(var), f.unbiased = data<A>(unbiased);
    f.norm = {f.mean, f.var, get(weight, channels, "weight"), get(bias, channels, "bias"), eps};
    device.run(f);
    return {std::move(out), std::move(mean), std::move(unbiased), std::move(var)};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& grad_out, const Tensor& y, const OptionalTensor& out,
                                                                    const OptionalTensor& weight, const OptionalTensor& bias,
                                                                    const Tensor& mean, const Tensor& var, double eps) {
  Cpu device(y);
  return Cpu::dispatch(y.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput from(y), grad(grad_out, from, "grad_out");
    std::optional<MapInput> gate;
    if (out.has_value()) gate.emplace(*out, from, "out");
    NormReluBackward<T> f{};
    f.N = from.shape().N, f.channels = from.shape().channels, f.S = from.shape().S;
    const int64_t channels = f.channels;
    Tensor dy = new_map(from.tensor(), from.shape());
    Tensor dshortcut = gate.has_value() ? new_map(from.tensor(), from.shape()) : new_small<A>(device.place(), {0});
    Tensor dweight = new_small<A>(device.place(), {channels}), dbias = new_small<A>(device.place(), {channels});
    Params<A, Cpu> get(device);
    f.grad_out = grad.template map<T>(), f.y = from.template map<T>();
    f.dy = output_map<T>(dy);
    if (gate.has_value()) f.out = gate->template map<T>(), f.dshortcut = output_map<T>(dshortcut);
    f.norm = {get(mean, channels, "mean"), get(var, channels, "var"), get(weight, channels, "weight"), get(bias, channels, "bias"), eps};
    f.dweight = data<A>(dweight), f.dbias = data<A>(dbias);
    device.run(f);
    to_type_of<A>(device, weight, dweight), to_type_of<A>(device, bias, dbias);
    if (!weight.has_value()) dweight = new_small<A>(device.place(), {0});
    if (!bias.has_value()) dbias = new_small<A>(device.place(), {0});
    return {std::move(dy), std::move(dshortcut), std::move(dweight), std::move(dbias)};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vcr_ops, m) {
  m.def(
      "norm_relu(Tensor y, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, float eps, Tensor? shortcut, Tensor? shortcut_mean, "
      "Tensor? shortcut_var, Tensor? shortcut_weight, Tensor? shortcut_bias, float shortcut_eps) -> Tensor");
  m.def(
      "norm_relu_(Tensor(a!) y, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, float eps, Tensor? shortcut, "
      "Tensor? shortcut_mean, Tensor? shortcut_var, Tensor? shortcut_weight, Tensor? shortcut_bias, float shortcut_eps) -> ()");
  m.def(
      "batch_norm_relu(Tensor y, Tensor? weight, Tensor? bias, float eps, Tensor? shortcut) -> "
      "(Tensor out, Tensor mean, Tensor unbiased_var, Tensor var)");
  m.def(
      "batch_norm_relu_backward(Tensor grad_out, Tensor y, Tensor? out, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps) "
      "-> (Tensor dy, Tensor dshortcut, Tensor dweight, Tensor dbias)");
}
STABLE_TORCH_LIBRARY_IMPL(vcr_ops, CPU, m) {
  m.impl("norm_relu", &boxed<norm_relu>);
  m.impl("norm_relu_", &boxed<norm_relu_>);
  m.impl("batch_norm_relu", &boxed<batch_norm_relu>);
  m.impl("batch_norm_relu_backward", &boxed<batch_norm_relu_backward>);
}

}  // namespace vcr
