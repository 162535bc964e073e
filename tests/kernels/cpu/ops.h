// The ops as a driver sees them: how to draw one, its reference in either type, and its kernels.
#pragma once
#include "calls.h"
#include "compare.h"
#include "reference.h"

namespace vcr_test {

struct Middle {
  static constexpr const char* name = "vcr_middle";
  static constexpr bool maps = true;
  static Tensors draw(const Case& c) { return draw_middle(c); }
  template <class R>
  static Tensors reference(const Case& c, Tensors& in, Closest* closest, Fault fault) {
    return middle_reference<R>(c, in, closest, fault);
  }
  template <class T>
  static Called call(Caller<T> caller, const Kernels<T>& kernels) {
    return caller.middle(kernels);
  }
};
struct Sample {
  static constexpr const char* name = "concept_sample";
  static constexpr bool maps = true;
  static Tensors draw(const Case& c) { return draw_sample(c); }
  template <class R>
  static Tensors reference(const Case& c, Tensors& in, Closest* closest, Fault fault) {
    return sample_reference<R>(c, in, closest, fault);
  }
  template <class T>
  static Called call(Caller<T> caller, const Kernels<T>& kernels) {
    return caller.sample(kernels);
  }
};
struct Reason {
  static constexpr const char* name = "concept_reason";
  static constexpr bool maps = false;
  static Tensors draw(const Case& c) { return draw_reason(c); }
  template <class R>
  static Tensors reference(const Case& c, Tensors& in, Closest* closest, Fault fault) {
    return reason_reference<R>(c, in, closest, fault);
  }
  template <class T>
  static Called call(Caller<T> caller, const Kernels<T>& kernels) {
    return caller.reason(kernels);
  }
};
struct Modulate {
  static constexpr const char* name = "concept_modulate";
  static constexpr bool maps = true;
  static Tensors draw(const Case& c) { return draw_modulate(c); }
  template <class R>
  static Tensors reference(const Case& c, Tensors& in, Closest* closest, Fault fault) {
    return modulate_reference<R>(c, in, closest, fault);
  }
  template <class T>
  static Called call(Caller<T> caller, const Kernels<T>& kernels) {
    return caller.modulate(kernels);
  }
};
struct NormReluOp {
  static constexpr const char* name = "norm_relu";
  static constexpr bool maps = true;
  static Tensors draw(const Case& c) { return draw_norm_relu(c); }
  template <class R>
  static Tensors reference(const Case& c, Tensors& in, Closest* closest, Fault fault) {
    return norm_relu_reference<R>(c, in, closest, fault);
  }
  template <class T>
  static Called call(Caller<T> caller, const Kernels<T>& kernels) {
    return caller.norm_relu(kernels);
  }
};

// Draws again where the reference stands too near a switch for float to decide it alike.
template <class Op>
Reference make_reference(Case& c, Tensors& inputs, Fault fault = Fault::none) {
  for (int attempt = 0;; ++attempt) {
    inputs = Op::draw(c);
    Closest closest;
    Tensors exact = Op::template reference<double>(c, inputs, &closest, fault);
    if ((!closest.state_sign && !closest.maximum) || attempt == 12) {
      exact = Op::template reference<double>(c, inputs, nullptr, fault);  // with the cleared elements of grad_out
      return {std::move(exact), Op::template reference<float>(c, inputs, nullptr, fault)};
    }
    c.seed += 100000;  // some are always near: a longer search isn't worth the time
  }
}
inline std::vector<std::string> gradients_of(const Reference& reference) {
  std::vector<std::string> names;
  for (const auto& named : reference.exact)
    if (named.first[0] == 'd') names.push_back(named.first);
  return names;
}

// Image n of a batch, alone: what evaluation gives mustn't depend on the others.
inline Tensors image_of(const Tensors& inputs, const Sizes& s, int64_t n) {
  Tensors one = inputs;
  for (const char* name : {"y", "grad_out", "shortcut"}) {
    if (inputs.find(name) == inputs.end()) continue;
    const int64_t size = s.channels() * s.S;
    const auto& all = inputs.at(name);
    one[name].assign(all.begin() + n * size, all.begin() + (n + 1) * size);
  }
  return one;
}

}  // namespace vcr_test
