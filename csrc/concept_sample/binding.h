// concept_sample and its backward, from tensors to what the kernels take. Device: Cpu or Cuda.
#pragma once
#include "../binding/unpack.h"
#include "args.h"

namespace vcr {

template <class A, class Device>
SampleWeights<A> unpack_weights(Params<A, Device>& get, const Problem& pr, Sampler sampler, const Tensor& value,
                                const OptionalTensor& query, const OptionalTensor& key, const OptionalTensor& logit) {
  const int64_t weights = pr.channels() * pr.pt;
  SampleWeights<A> w{get(value, weights, "value"), nullptr, nullptr, nullptr};
  if (sampler == Sampler::dynamic_query) {
    require(query.has_value() && key.has_value(), "the dynamic sampler takes query and key");
    w.query = get(query, weights, "query");
    w.key = get(key, weights, "key");
  }
  if (sampler == Sampler::static_query) {
    require(logit.has_value(), "the static sampler takes logit");
    w.logit = get(logit, pr.channels(), "logit");
  }
  return w;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> sample(const Tensor& z, const Tensor& value, const OptionalTensor& query, const OptionalTensor& key,
                                          const OptionalTensor& logit, const std::string sampler, bool need_attention, bool save) {
  Device device(z);
  return Device::dispatch(z.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(z);
    SampleForward<T> f;
    f.problem = problem_of(map.shape(), value);
    const Problem& pr = f.problem;
    f.sampler = variant<Sampler>(sampler_names, sampler, "sampler");
    Params<A, Device> get(device);
    f.weights = unpack_weights(get, pr, f.sampler, value, query, key, logit);
    Tensor h = new_small<A>(device.place(), {pr.N, pr.C, pr.pt});
    std::vector<int64_t> size{0};
    if (need_attention) {
      const auto all = z.sizes();
      size.assign(all.begin(), all.end());
      size[1] = pr.C;
    }
    Tensor attention = new_contiguous(device.place(), size.data(), int64_t(size.size()), scalar_type<A>());
    Tensor saved = new_small<A>(device.place(), {save ? sample_saved_size<A>(pr, true) : 0});
    const typename Device::template Scratch<A> unsaved(device, save ? 0 : sample_saved_size<A>(pr, false));
    f.z = map.template map<T>();
    f.saved = save ? data<A>(saved) : unsaved.get();
    f.h = data<A>(h);
    f.attention = need_attention ? data<A>(attention) : nullptr;
    f.save = save;
    device.run(f);
    return {std::move(h), std::move(attention), std::move(saved)};
  });
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_backward(const Tensor& dh, const OptionalTensor& dattention, const Tensor& z,
                                                                   const Tensor& value, const OptionalTensor& query,
                                                                   const OptionalTensor& key, const OptionalTensor& logit,
                                                                   const Tensor& saved, const std::string sampler) {
  Device device(z);
  return Device::dispatch(z.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(z);
    SampleBackward<T> f;
    f.problem = problem_of(map.shape(), value);
    const Problem& pr = f.problem;
    f.sampler = variant<Sampler>(sampler_names, sampler, "sampler");
    require(saved.numel() == sample_saved_size<A>(pr, true) && saved.scalar_type() == scalar_type<A>(), "saved has another size or dtype");
    Params<A, Device> get(device);
    f.weights = unpack_weights(get, pr, f.sampler, value, query, key, logit);
    f.dh = get(dh, pr.N * pr.C * pr.pt, "dh");
    f.dattention = get(dattention, pr.N * pr.C * pr.S, "dattention");
    Tensor dz = new_map(map.tensor(), map.shape());
    Tensor dvalue = new_gradient<A>(device.place(), value), dquery = new_gradient<A>(device.place(), query),
           dkey = new_gradient<A>(device.place(), key);
    Tensor dlogit = new_gradient<A>(device.place(), logit);
    f.z = map.template map<T>();
    f.dz = output_map<T>(dz);
    f.saved = static_cast<A*>(const_cast<void*>(saved.const_data_ptr()));
    f.dvalue = data<A>(dvalue);
    f.dquery = query.has_value() ? data<A>(dquery) : nullptr;
    f.dkey = key.has_value() ? data<A>(dkey) : nullptr;
    f.dlogit = logit.has_value() ? data<A>(dlogit) : nullptr;
    device.run(f);
    to_type_of<A>(device, value, dvalue), to_type_of<A>(device, query, dquery), to_type_of<A>(device, key, dkey);
    to_type_of<A>(device, logit, dlogit);
    device.finish();
    return {std::move(dz), std::move(dvalue), std::move(dquery), std::move(dkey), std::move(dlogit)};
  });
}

}  // namespace vcr
