// torch.ops.vcr_ops.concept_sample and its backward: schemas and CPU kernels.
#include "../binding/unpack.h"
#include "../cpu/isa.h"
#include "args.h"

namespace vcr {
namespace {

template <class A>
SampleWeights<A> unpack_weights(Params<A>& get, const Problem& pr, Sampler sampler, const Tensor& value, const OptionalTensor& query,
                                const OptionalTensor& key, const OptionalTensor& logit) {
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

std::tuple<Tensor, Tensor, Tensor> sample(const Tensor& z, const Tensor& value, const OptionalTensor& query, const OptionalTensor& key,
                                          const OptionalTensor& logit, const std::string sampler, bool need_attention, bool save) {
  return dispatch(z, [&](auto type) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(z);
    SampleForward<T> f;
    f.problem = problem_of(map.shape(), value);
    const Problem& pr = f.problem;
    f.sampler = variant<Sampler>(sampler_names, sampler, "sampler");
    Params<A> get;
    f.weights = unpack_weights(get, pr, f.sampler, value, query, key, logit);
    Tensor h = new_small<A>({pr.N, pr.C, pr.pt});
    std::vector<int64_t> size{0};
    if (need_attention) {
      const auto all = z.sizes();
      size.assign(all.begin(), all.end());
      size[1] = pr.C;
    }
    Tensor attention = new_contiguous(size.data(), int64_t(size.size()), scalar_type<A>());
    Tensor saved = new_small<A>({sample_saved_size<A>(pr, save)});
    f.z = map.template map<T>();
    f.saved = data<A>(saved);
    f.h = data<A>(h);
    f.attention = need_attention ? data<A>(attention) : nullptr;
    f.save = save;
    f.pool = torch_pool();
    kernels<T>().sample_forward(f);
    if (!save) saved = new_small<A>({0});
    return {h, attention, saved};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_backward(const Tensor& dh, const OptionalTensor& dattention, const Tensor& z,
                                                                   const Tensor& value, const OptionalTensor& query,
                                                                   const OptionalTensor& key, const OptionalTensor& logit,
                                                                   const Tensor& saved, const std::string sampler) {
  return dispatch(z, [&](auto type) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(type);
    using A = acc_t<T>;
    const MapInput map(z);
    SampleBackward<T> f;
    f.problem = problem_of(map.shape(), value);
    const Problem& pr = f.problem;
    f.sampler = variant<Sampler>(sampler_names, sampler, "sampler");
    require(saved.numel() == sample_saved_size<A>(pr, true) && saved.scalar_type() == scalar_type<A>(), "saved has another size or dtype");
    Params<A> get;
    f.weights = unpack_weights(get, pr, f.sampler, value, query, key, logit);
    f.dh = get(dh, pr.N * pr.C * pr.pt, "dh");
    f.dattention = get(dattention, pr.N * pr.C * pr.S, "dattention");
    Tensor dz = new_map(map.tensor(), map.shape());
    Tensor dvalue = new_gradient<A>(value), dquery = new_gradient<A>(query), dkey = new_gradient<A>(key);
    Tensor dlogit = new_gradient<A>(logit);
    f.z = map.template map<T>();
    f.dz = output_map<T>(dz);
    f.saved = static_cast<A*>(const_cast<void*>(saved.const_data_ptr()));
    f.dvalue = data<A>(dvalue);
    f.dquery = query.has_value() ? data<A>(dquery) : nullptr;
    f.dkey = key.has_value() ? data<A>(dkey) : nullptr;
    f.dlogit = logit.has_value() ? data<A>(dlogit) : nullptr;
    f.pool = torch_pool();
    kernels<T>().sample_backward(f);
    return {dz, in_type_of(dvalue, value), in_type_of(dquery, query), in_type_of(dkey, key), in_type_of(dlogit, logit)};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vcr_ops, m) {
  m.def(
      "concept_sample(Tensor z, Tensor value, Tensor? query, Tensor? key, Tensor? logit, str sampler, bool need_attention, bool save) -> "
      "(Tensor h, Tensor attention, Tensor saved)");
  m.def(
      "concept_sample_backward(Tensor dh, Tensor? dattention, Tensor z, Tensor value, Tensor? query, Tensor? key, Tensor? logit, "
      "Tensor saved, str sampler) -> (Tensor dz, Tensor dvalue, Tensor dquery, Tensor dkey, Tensor dlogit)");
}
STABLE_TORCH_LIBRARY_IMPL(vcr_ops, CPU, m) {
  m.impl("concept_sample", TORCH_BOX(&sample));
  m.impl("concept_sample_backward", TORCH_BOX(&sample_backward));
}

}  // namespace vcr
