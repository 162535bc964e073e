// One call of each kernel, forward and backward, with all its memory; results by name as the reference has them.
#pragma once
#include <cmath>

#include "cpu/table.h"
#include "memory.h"
#include "pools.h"

namespace vcr_test {

using namespace vcr;

// How the maps lie, who runs the work, and whether a backward pass follows.
struct Setting {
  Lie lie = Lie::contiguous;
  Parallel pool = loop.parallel;
  bool backward = true;
  bool aligned = false;  // what is written begins at a vector's boundary, as streaming stores ask
  bool steps = false;    // the middle's passes as ops of their own, as for statistics over several processes
};

struct Called {
  Tensors results;
  std::string damage;  // names of arrays that were changed and shouldn't have been
};

inline Problem problem_of(const Sizes& s) { return {s.N, s.C, s.p, s.pt, s.S}; }

// grad_out has another gap than the map, and where its format stays the same, it is a slice where the map isn't.
inline Lie lie_of_gradient(const Sizes& s, Lie lie) {
  if (s.channels() == 1) return lie;  // strides are ambiguous
  return lie == Lie::contiguous ? Lie::contiguous_slice : lie == Lie::channels_last ? Lie::channels_last_slice : lie;
}

template <class T>
class Caller {
  using A = acc_t<T>;
  const Case& c;
  const Tensors& inputs;
  const Setting& how;
  Memory memory;
  Called called;
  std::vector<std::function<void()>> collect;  // reads outputs, once the memory isn't poisoned any more

 public:
  Caller(const Case& c_, const Tensors& inputs_, const Setting& how_) : c(c_), inputs(inputs_), how(how_) {}

  Called middle(const Kernels<T>& kernels) {
    if (how.steps) return middle_in_steps(kernels);
    const Sizes& s = c.size;
    MiddleForward<T> f;
    f.problem = problem_of(s);
    f.options.norm = c.norm, f.options.sampler = c.sampler, f.options.edges = c.edges, f.options.modulation = c.modulation;
    f.options.state_batch = c.state_batch;
    f.options.save = how.backward;
    f.params = {in("norm_mean"),  in("norm_var"),     in("norm_weight"),  in("norm_bias"),  in("value"),     in("query"),
                in("key"),        in("logit"),        in("edge"),         in("state_mean"), in("state_var"), in("state_weight"),
                in("state_bias"), in("scale_weight"), in("shift_weight"), in("scale_bias"), in("shift_bias")};
    f.y = map_in("y", how.lie);
    f.out = map_out("out");
    f.saved = memory.array<A>("saved", MiddleSaved<A>::size(f.problem, how.backward));
    f.norm_mean = c.norm == Norm::batch ? out("norm_mean", s.channels()) : nullptr;
    f.norm_var = c.norm == Norm::batch ? out("norm_var", s.channels()) : nullptr;
    f.state_mean = c.state_batch ? out("state_mean", s.pt) : nullptr;
    f.state_var = c.state_batch ? out("state_var", s.pt) : nullptr;
    f.pool = how.pool;
    f.clock = nullptr;
    MiddleBackward<T> b;
    b.problem = f.problem, b.options = f.options, b.params = f.params, b.y = f.y, b.saved = f.saved, b.pool = how.pool, b.clock = nullptr;
    b.params.norm_mean = b.params.norm_var = b.params.state_mean = b.params.state_var = nullptr;
    if (how.backward) {
      b.grad_out = map_in("grad_out", lie_of_gradient(s, how.lie));
      b.dy = map_out("dy");
      b.grads = {grad("norm_weight"),
                 grad("norm_bias"),
                 grad("value"),
                 grad("query"),
                 grad("key"),
                 grad("logit"),
                 grad("edge"),
                 grad("state_weight", s.pt),
                 grad("state_bias", s.pt),
                 grad("scale_weight"),
                 grad("shift_weight"),
                 grad("scale_bias"),
                 grad("shift_bias")};
    }
    memory.poison();
    kernels.middle_forward(f);
    if (how.backward) {
      memory.freeze<A>("saved");  // a second backward pass may follow
      kernels.middle_backward(b);
    }
    return finish();
  }

  Called middle_in_steps(const Kernels<T>& kernels) {
    const Sizes& s = c.size;
    const bool batch = c.norm == Norm::batch;
    const int64_t CP = s.channels(), pt = s.pt;
    const double positions = double(s.N * s.S), states = double(s.N * s.C);
    MiddleStats<T> m{problem_of(s), map_in("y", how.lie), memory.array<double>("moments", 2 * CP), how.pool};
    MiddleForward<T> f{};
    f.problem = m.problem;
    f.options.norm = batch ? Norm::given : c.norm;
    f.options.sampler = c.sampler, f.options.edges = c.edges, f.options.modulation = c.modulation;
    f.params = {in("norm_mean"),  in("norm_var"),     in("norm_weight"),  in("norm_bias"),  in("value"),     in("query"),
                in("key"),        in("logit"),        in("edge"),         in("state_mean"), in("state_var"), in("state_weight"),
                in("state_bias"), in("scale_weight"), in("shift_weight"), in("scale_bias"), in("shift_bias")};
    f.y = m.y;
    f.out = map_out("out");
    A* norm_mean = batch ? out("norm_mean", CP) : nullptr;
    A* norm_var = batch ? out("norm_var", CP) : nullptr;
    A* biased_var = memory.array<A>("biased variance", CP);
    A* state_mean = c.state_batch ? out("state_mean", pt) : nullptr;
    A* state_var = c.state_batch ? out("state_var", pt) : nullptr;
    f.saved = memory.array<A>("saved", MiddleSaved<A>::size(f.problem, true) - MiddleSaved<A>::late_size(f.problem));
    f.late = memory.array<A>("late", MiddleSaved<A>::late_size(f.problem));
    f.moments = memory.array<double>("state moments", 2 * pt);
    double* state_norm = memory.array<double>("state norm", 2 * pt);
    f.state_norm = state_norm;
    f.pool = how.pool;
    MiddleBackward<T> b{};
    b.problem = f.problem, b.options = f.options, b.y = f.y, b.saved = f.saved, b.late = f.late, b.pool = how.pool;
    b.state_norm = state_norm;
    b.params = f.params;
    b.params.norm_mean = b.params.norm_var = b.params.state_mean = b.params.state_var = nullptr;
    b.grad_out = map_in("grad_out", lie_of_gradient(s, how.lie));
    b.dy = map_out("dy");
    A *dweight = grad("state_weight", pt), *dbias = grad("state_bias", pt);
    b.summed = memory.array<A>("summed", MiddleBackwardWork::summed(f.problem));
    b.attended = memory.array<A>("attended", MiddleBackwardWork::attended(f.problem));
    b.state_sums = memory.array<double>("state sums", 2 * pt);
    double* state_shares = memory.array<double>("state shares", 2 * pt);
    A *norm_sums = memory.array<A>("norm sums", 2 * CP), *norm_shares = memory.array<A>("norm shares", 2 * CP);
    b.state_shares = state_shares, b.norm_sums = norm_sums, b.norm_shares = batch ? norm_shares : nullptr;
    b.grads.scale_weight = grad("scale_weight"), b.grads.shift_weight = grad("shift_weight");
    b.grads.scale_bias = grad("scale_bias"), b.grads.shift_bias = grad("shift_bias");
    const MiddleGrads<A> modulator = b.grads;
    MiddleGrads<A> others{};
    others.norm_weight = grad("norm_weight"), others.norm_bias = grad("norm_bias"), others.value = grad("value");
    others.query = grad("query"), others.key = grad("key"), others.logit = grad("logit"), others.edge = grad("edge");
    memory.poison();
    if (batch) {
      kernels.middle_stats(m);
      for (int64_t j = 0; j < CP; ++j) {
        norm_mean[j] = A(m.moments[j]);
        norm_var[j] = A(m.moments[CP + j] / (positions - 1));
        biased_var[j] = A(m.moments[CP + j] / positions);
      }
      f.params.norm_mean = norm_mean, f.params.norm_var = biased_var;
    }
    f.step = ForwardStep::states;
    kernels.middle_forward(f);
    for (int64_t k = 0; k < pt; ++k) {
      const double mean = f.moments[k], squares = f.moments[pt + k];
      if (c.state_batch) state_mean[k] = A(mean), state_var[k] = A(squares / (states - 1));
      state_norm[k] = c.state_batch ? mean : double(f.params.state_mean[k]);
      state_norm[pt + k] = 1 / std::sqrt((c.state_batch ? squares / states : double(f.params.state_var[k])) + f.options.state_eps);
    }
    memory.freeze<A>("saved");
    f.step = ForwardStep::modulate;
    kernels.middle_forward(f);
    memory.freeze<A>("late");
    b.step = BackwardStep::sums, b.grads = modulator;
    kernels.middle_backward(b);
    for (int64_t k = 0; k < pt; ++k) dbias[k] = A(b.state_sums[k]), dweight[k] = A(b.state_sums[pt + k]);
    for (int64_t k = 0; k < 2 * pt; ++k) state_shares[k] = c.state_batch ? b.state_sums[k] / states : 0;
    memory.freeze<A>("summed");
    b.step = BackwardStep::states, b.grads = others;
    kernels.middle_backward(b);
    for (int64_t j = 0; j < 2 * CP; ++j) norm_shares[j] = A(double(norm_sums[j]) / positions);
    memory.freeze<A>("attended");
    b.step = BackwardStep::input, b.grads = {};
    kernels.middle_backward(b);
    return finish();
  }

  Called sample(const Kernels<T>& kernels) {
    const Sizes& s = c.size;
    SampleForward<T> f;
    f.problem = problem_of(s);
    f.sampler = c.sampler;
    f.weights = {in("value"), in("query"), in("key"), in("logit")};
    f.z = map_in("z", how.lie);
    f.saved = memory.array<A>("saved", sample_saved_size<A>(f.problem, how.backward));
    f.h = out("h", s.states());
    f.attention = out("attention", s.N * s.C * s.S);
    f.save = how.backward;
    f.pool = how.pool;
    SampleBackward<T> b;
    if (how.backward) {
      b.problem = f.problem, b.sampler = f.sampler, b.weights = f.weights, b.z = f.z, b.saved = f.saved, b.pool = how.pool;
      b.dz = map_out("dz");
      b.dh = in("dh");
      b.dattention = in("dattention");
      b.dvalue = grad("value"), b.dquery = grad("query"), b.dkey = grad("key"), b.dlogit = grad("logit");
    }
    memory.poison();
    kernels.sample_forward(f);
    if (how.backward) {
      memory.freeze<A>("saved");
      kernels.sample_backward(b);
    }
    return finish();
  }

  Called reason(const Kernels<T>& kernels) {
    const Sizes& s = c.size;
    ReasonForward<A> f;
    f.N = s.N, f.C = s.C, f.pt = s.pt;
    f.edges = c.edges, f.batch = c.state_batch, f.eps = 1e-5;
    f.h = in("h"), f.edge = in("edge"), f.weight = in("weight"), f.bias = in("bias");
    f.mean = c.state_batch ? out("mean", s.pt) : in("mean");
    f.var = c.state_batch ? out("var", s.pt) : in("var");
    f.state = out("state", s.states());
    const int64_t square = s.N * s.C * s.C;
    A* saved = memory.array<A>("saved", s.states() + square + 4 * s.pt);
    f.g = saved, f.a = saved + s.states(), f.norm = f.a + square;
    f.pool = how.pool;
    ReasonBackward<A> b;
    b.N = f.N, b.C = f.C, b.pt = f.pt, b.edges = f.edges, b.batch = f.batch;
    b.dstate = in("dstate"), b.h = f.h, b.edge = f.edge, b.weight = f.weight, b.bias = f.bias;
    b.g = f.g, b.a = f.a, b.norm = f.norm;
    b.dh = out("dh", s.states()), b.dedge = grad("edge"), b.dweight = grad("weight", s.pt), b.dbias = grad("bias", s.pt);
    b.pool = how.pool;
    memory.poison();
    kernels.reason_forward(f);
    memory.freeze<A>("saved");
    kernels.reason_backward(b);
    return finish();
  }

  Called modulate(const Kernels<T>& kernels) {
    const Sizes& s = c.size;
    ModulateForward<T> f;
    f.problem = problem_of(s);
    f.weights = {in("scale_weight"), in("shift_weight"), in("scale_bias"), in("shift_bias")};
    f.z = map_in("z", how.lie);
    f.out = map_out("out");
    f.state = in("state");
    f.attention = in("attention");
    f.pool = how.pool;
    ModulateBackward<T> b;
    b.problem = f.problem, b.weights = f.weights, b.z = f.z, b.state = f.state, b.attention = f.attention, b.pool = how.pool;
    b.grad_out = map_in("grad_out", lie_of_gradient(s, how.lie));
    b.dz = map_out("dz");
    b.dstate = out("dstate", s.states());
    b.dscale_weight = grad("scale_weight"), b.dshift_weight = grad("shift_weight");
    b.dscale_bias = grad("scale_bias"), b.dshift_bias = grad("shift_bias");
    b.dattention = grad("attention");
    memory.poison();
    kernels.modulate_forward(f);
    kernels.modulate_backward(b);
    return finish();
  }

  Called norm_relu(const Kernels<T>& kernels) {
    const Sizes& s = c.size;
    NormRelu<T> f{};
    f.N = s.N, f.channels = s.channels(), f.S = s.S;
    f.y = map_in("y", how.lie);
    if (c.shortcut != Shortcut::none) f.shortcut = map_in("shortcut", lie_of_gradient(s, how.lie));
    f.out = map_out("out");
    f.norm = {in("norm_mean"), in("norm_var"), in("norm_weight"), in("norm_bias"), 1e-5};
    f.shortcut_norm = {in("shortcut_norm_mean"), in("shortcut_norm_var"), in("shortcut_norm_weight"), in("shortcut_norm_bias"), 1e-5};
    f.pool = how.pool;
    NormReluBackward<T> b{};
    if (c.norm == Norm::batch) {
      f.mean = out("norm_mean", s.channels()), f.unbiased = out("norm_var", s.channels());
      f.var = memory.array<A>("biased variance", s.channels());
      f.norm.mean = f.mean, f.norm.var = f.var;
      b.N = f.N, b.channels = f.channels, b.S = f.S;
      b.grad_out = map_in("grad_out", lie_of_gradient(s, how.lie));
      b.y = f.y, b.norm = f.norm, b.pool = how.pool;
      b.dy = map_out("dy");
      if (c.shortcut != Shortcut::none)
        b.out = {f.out.data, f.out.image, f.out.channel, f.out.position}, b.dshortcut = map_out("dshortcut");
      b.dweight = grad("norm_weight", s.channels()), b.dbias = grad("norm_bias", s.channels());
    }
    memory.poison();
    kernels.norm_relu(f);
    if (c.norm == Norm::batch) kernels.norm_relu_backward(b);
    return finish();
  }

 private:
  A* in(const char* name) { return memory.input<A>(name, inputs); }
  A* out(const std::string& name, int64_t count) {
    A* to = memory.array<A>(name, count);
    collect.emplace_back([this, name, to, count] { called.results[name] = values_of(to, count); });
    return to;
  }
  // Null where there is no such parameter, unless the kernel writes `always` elements anyway.
  A* grad(const std::string& name, int64_t always = 0) {
    const auto found = inputs.find(name);
    if (found != inputs.end()) return out("d" + name, int64_t(found->second.size()));
    return always > 0 ? memory.array<A>("unused d" + name, always) : nullptr;
  }
  Map<const T> map_in(const std::string& name, Lie lie) {
    const Map<T> map = memory.map<T>(name, c.size, lie, name == "grad_out" ? 3 : 5, &inputs.at(name));
    return {map.data, map.image, map.channel, map.position};
  }
  Map<T> map_out(const std::string& name) {
    const Map<T> map = memory.map<T>(name, c.size, how.lie, how.aligned ? 0 : 1, nullptr);
    collect.emplace_back([this, name, map] { called.results[name] = values_of(map, c.size); });
    return map;
  }
  Called finish() {
    called.damage = memory.damage();
    for (const auto& read : collect) read();
    return called;
  }
};

}  // namespace vcr_test
