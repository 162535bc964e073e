#include "reference.h"

#include <cmath>

namespace vcr_test {

using namespace vcr;

namespace {

constexpr double norm_eps = 1e-5, state_eps = 1e-5;
constexpr double near_zero = 2e-4;  // on the scale of activations, which are about 1

// ---- reverse accumulation over scalars: a node knows its parents and the derivatives by them

template <class R>
struct Tape {
  struct Node {
    int parent[3];
    R slope[3];
  };
  static std::vector<Node> nodes;  // one tape at a time; its memory is kept for the next, which spares the sanitizers much work

  Tape() { nodes.clear(); }
  static int add(int a, R da, int b, R db, int c, R dc) {
    nodes.push_back({{a, b, c}, {da, db, dc}});
    return int(nodes.size()) - 1;
  }
  static void backward(std::vector<R>& adjoint) {
    for (size_t i = nodes.size(); i-- > 0;) {
      const R x = adjoint[i];
      if (x == 0) continue;
      for (int k = 0; k < 3; ++k)
        if (nodes[i].parent[k] >= 0) adjoint[size_t(nodes[i].parent[k])] += x * nodes[i].slope[k];
    }
  }
};
template <class R>
std::vector<typename Tape<R>::Node> Tape<R>::nodes;

template <class R>
struct Var {
  int id = -1;  // -1: a constant
  R v = 0;
  Var() = default;
  Var(R value) : v(value) {}
  Var(int node, R value) : id(node), v(value) {}
};
template <class R>
Var<R> node(R value, const Var<R>& a, R da, const Var<R>& b = {}, R db = 0, const Var<R>& c = {}, R dc = 0) {
  if (a.id < 0 && b.id < 0 && c.id < 0) return value;
  return {Tape<R>::add(a.id, da, b.id, db, c.id, dc), value};
}
template <class R>
Var<R> operator+(const Var<R>& a, const Var<R>& b) {
  return node<R>(a.v + b.v, a, 1, b, 1);
}
template <class R>
Var<R> operator-(const Var<R>& a, const Var<R>& b) {
  return node<R>(a.v - b.v, a, 1, b, -1);
}
template <class R>
Var<R> operator*(const Var<R>& a, const Var<R>& b) {
  return node<R>(a.v * b.v, a, b.v, b, a.v);
}
template <class R>
Var<R> operator/(const Var<R>& a, const Var<R>& b) {
  return node<R>(a.v / b.v, a, 1 / b.v, b, -a.v / (b.v * b.v));
}
template <class R>
Var<R> multiply_add(const Var<R>& a, const Var<R>& b, const Var<R>& c) {
  return node<R>(a.v * b.v + c.v, a, b.v, b, a.v, c, 1);
}
template <class R>
Var<R> relu(const Var<R>& a) {
  return node<R>(a.v > 0 ? a.v : R(0), a, a.v > 0 ? R(1) : R(0));
}
template <class R>
Var<R> exponential(const Var<R>& a) {
  const R e = std::exp(a.v);
  return node<R>(e, a, e);
}
template <class R>
Var<R> tangent(const Var<R>& a) {
  const R t = std::tanh(a.v);
  return node<R>(t, a, 1 - t * t);
}
template <class R>
Var<R> square_root(const Var<R>& a) {
  const R r = std::sqrt(a.v);
  return node<R>(r, a, 1 / (2 * r));
}
template <class R>
Var<R> constant(const Var<R>& a, bool yes = true) {
  return yes ? Var<R>(a.v) : a;
}
// The maximum; its gradient is shared evenly among ties, as torch.amax does.
template <class R>
Var<R> maximum(const Var<R>* x, int64_t count, bool first_only) {
  R top = x[0].v;
  for (int64_t i = 1; i < count; ++i) top = x[i].v > top ? x[i].v : top;
  int64_t ties = 0;
  for (int64_t i = 0; i < count; ++i) ties += x[i].v == top;
  if (first_only) ties = 1;
  Var<R> out(R(0));
  int64_t seen = 0;
  for (int64_t i = 0; i < count && seen < ties; ++i)
    if (x[i].v == top) {
      out = node<R>(top, x[i], 1 / R(ties), out, 1);
      ++seen;
    }
  return out;
}

// ---- named tensors on the tape

template <class R>
struct Graph {
  using V = Var<R>;
  using Vs = std::vector<V>;
  const Case& c;
  Tensors& inputs;
  const Fault fault;
  Closest* closest;
  Tape<R> tape;
  std::map<std::string, Vs> leaves;
  std::vector<std::pair<V, double>> seeds;
  Tensors results;

  Graph(const Case& c_, Tensors& inputs_, Closest* closest_, Fault fault_) : c(c_), inputs(inputs_), fault(fault_), closest(closest_) {}

  bool has(const std::string& name) const { return inputs.count(name) != 0; }
  const Vs& leaf(const std::string& name) {
    const auto found = leaves.find(name);
    if (found != leaves.end()) return found->second;
    Vs x;
    for (double value : inputs.at(name)) x.emplace_back(tape.add(-1, 0, -1, 0, -1, 0), R(value));
    return leaves[name] = x;
  }
  void output(const std::string& name, const Vs& x, const std::string& gradient = "") {
    std::vector<double>& values = results[name];
    for (const V& v : x) values.push_back(double(v.v));
    if (!gradient.empty() && has(gradient))
      for (size_t i = 0; i < x.size(); ++i) seeds.emplace_back(x[i], inputs.at(gradient)[i]);
  }
  Tensors finish() {
    static std::vector<R> adjoint;
    adjoint.assign(tape.nodes.size(), R(0));
    for (const auto& seed : seeds)
      if (seed.first.id >= 0) adjoint[size_t(seed.first.id)] += R(seed.second);
    tape.backward(adjoint);
    for (const auto& named : leaves)
      for (const V& v : named.second) results["d" + named.first].push_back(double(adjoint[size_t(v.id)]));
    return results;
  }

  // (x - mean) / sqrt(var + eps) * weight + bias
  static V normalised(const V& x, const V& mean, const V& var, double eps, const V& weight, const V& bias) {
    return multiply_add((x - mean) / square_root(var + V(R(eps))), weight, bias);
  }
  // Mean and biased variance of the elements that `at` gives.
  template <class At>
  static void statistics(int64_t count, At at, V& mean, V& var) {
    V sum(R(0)), squares(R(0));
    for (int64_t i = 0; i < count; ++i) sum = sum + at(i);
    mean = sum / V(R(count));
    for (int64_t i = 0; i < count; ++i) {
      const V d = at(i) - mean;
      squares = multiply_add(d, d, squares);
    }
    var = squares / V(R(count));
  }

  Vs norm(const Vs& y) {
    const Sizes& s = c.size;
    const int64_t CP = s.channels(), count = s.N * s.S;
    if (c.norm == Norm::none) return y;
    Vs z(y.size()), means, vars;
    for (int64_t j = 0; j < CP; ++j) {
      const auto index = [&](int64_t i) { return size_t((i / s.S * CP + j) * s.S + i % s.S); };
      V mean, var;
      if (c.norm == Norm::batch) {
        statistics(count, [&](int64_t i) { return y[index(i)]; }, mean, var);
        means.push_back(mean.v);
        vars.push_back(var.v * (fault == Fault::biased_variance ? R(1) : R(count) / R(count - 1)));
        mean = constant(mean, fault == Fault::norm_mean_gradient);
        var = constant(var, fault == Fault::norm_var_gradient);
      } else {
        mean = R(inputs.at("norm_mean")[size_t(j)]), var = R(inputs.at("norm_var")[size_t(j)]);
      }
      const V weight = has("norm_weight") ? leaf("norm_weight")[size_t(j)] : V(R(1));
      const V bias = has("norm_bias") ? leaf("norm_bias")[size_t(j)] : V(R(0));
      for (int64_t i = 0; i < count; ++i) z[index(i)] = normalised(y[index(i)], mean, var, norm_eps, weight, bias);
    }
    if (c.norm == Norm::batch) output("norm_mean", means), output("norm_var", vars);
    return z;
  }

  // Equations 1 and 2.
  void sample(const Vs& z, Vs& h, Vs& attention) {
    const Sizes& s = c.size;
    const Vs& value = leaf("value");
    for (int64_t n = 0; n < s.N; ++n)
      for (int64_t concept_ = 0; concept_ < s.C; ++concept_) {
        const V* Z = z.data() + (n * s.C + concept_) * s.p * s.S;
        const int64_t weights = concept_ * s.p * s.pt;
        Vs mean, pooled, M(size_t(s.S), V(1 / R(s.S)));
        for (int64_t j = 0; j < s.p; ++j) {
          V sum(R(0));
          for (int64_t i = 0; i < s.S; ++i) sum = sum + Z[j * s.S + i];
          mean.push_back(sum / V(R(s.S)));
        }
        if (c.sampler != Sampler::pool) {
          Vs logits;
          if (c.sampler == Sampler::dynamic_query) {
            const V *query = leaf("query").data() + weights, *key = leaf("key").data() + weights;
            Vs q;
            for (int64_t k = 0; k < s.pt; ++k) {
              V sum(R(0));
              for (int64_t j = 0; j < s.p; ++j)
                sum = multiply_add(constant(mean[size_t(j)], fault == Fault::query_gradient), query[j * s.pt + k], sum);
              q.push_back(sum);
            }
            for (int64_t i = 0; i < s.S; ++i) {
              V score(R(0));
              for (int64_t k = 0; k < s.pt; ++k) {
                V K(R(0));
                for (int64_t j = 0; j < s.p; ++j) K = multiply_add(Z[j * s.S + i], key[j * s.pt + k], K);
                score = multiply_add(K, q[size_t(k)], score);
              }
              logits.push_back(score / V(std::sqrt(R(s.pt))));
            }
          } else {
            const V* logit = leaf("logit").data() + concept_ * s.p;
            for (int64_t i = 0; i < s.S; ++i) {
              V score(R(0));
              for (int64_t j = 0; j < s.p; ++j) score = multiply_add(Z[j * s.S + i], logit[j], score);
              logits.push_back(score);
            }
          }
          note_maximum(logits);
          R top = logits[0].v;
          for (const V& l : logits) top = l.v > top ? l.v : top;
          V sum(R(0));
          for (V& l : logits) l = exponential(l - V(top)), sum = sum + l;
          for (size_t i = 0; i < M.size(); ++i) M[i] = logits[i] / constant(sum, fault == Fault::softmax_gradient);
        }
        for (int64_t j = 0; j < s.p; ++j) {
          V sum(R(0));
          for (int64_t i = 0; i < s.S; ++i) sum = multiply_add(M[size_t(i)], Z[j * s.S + i], sum);
          pooled.push_back(sum);
        }
        for (int64_t k = 0; k < s.pt; ++k) {
          V sum(R(0));
          for (int64_t j = 0; j < s.p; ++j) sum = multiply_add(pooled[size_t(j)], value[size_t(weights + j * s.pt + k)], sum);
          h.push_back(sum);
        }
        attention.insert(attention.end(), M.begin(), M.end());
      }
  }
  void note_maximum(const Vs& x) {
    if (closest == nullptr) return;
    R top = x[0].v;
    for (const V& v : x) top = v.v > top ? v.v : top;
    for (const V& v : x)
      if (v.v != top && top - v.v < near_zero) closest->maximum = true;
  }

  // Equation 3. `prefix` is that of the parameters of the states' batch norm.
  Vs reason(const Vs& h, const std::string& prefix) {
    const Sizes& s = c.size;
    const int64_t C = s.C, pt = s.pt, rows = s.N * C;
    Vs g;
    for (int64_t n = 0; n < s.N; ++n) {
      const V* H = h.data() + n * C * pt;
      Vs A(size_t(C * C));
      if (c.edges != Edges::none) {
        const Vs& edge = leaf("edge");
        for (int64_t from = 0; from < C; ++from)
          for (int64_t to = 0; to < C; ++to) {
            V& a = A[size_t(fault == Fault::transposed_edges ? to * C + from : from * C + to)];
            if (c.edges == Edges::dynamic_edges) {
              V sum(R(0));
              for (int64_t k = 0; k < pt; ++k) sum = multiply_add(H[from * pt + k], edge[size_t(k * C + to)], sum);
              a = constant(tangent(sum), fault == Fault::edges_gradient);
            } else {
              a = edge[size_t(from * C + to)];
            }
          }
      }
      for (int64_t row = 0; row < C; ++row)
        for (int64_t k = 0; k < pt; ++k) {
          V sum = H[row * pt + k];
          if (c.edges != Edges::none)
            for (int64_t other = 0; other < C; ++other) sum = multiply_add(A[size_t(row * C + other)], H[other * pt + k], sum);
          g.push_back(sum);
        }
    }
    Vs state(g.size()), means, vars;
    for (int64_t k = 0; k < pt; ++k) {
      V mean, var;
      if (c.state_batch) {
        statistics(rows, [&](int64_t r) { return g[size_t(r * pt + k)]; }, mean, var);
        means.push_back(mean.v);
        vars.push_back(var.v * (fault == Fault::biased_variance ? R(1) : R(rows) / R(rows - 1)));
        mean = constant(mean, fault == Fault::state_stats_gradient);
      } else {
        mean = R(inputs.at(prefix + "mean")[size_t(k)]), var = R(inputs.at(prefix + "var")[size_t(k)]);
      }
      const V weight = has(prefix + "weight") ? leaf(prefix + "weight")[size_t(k)] : V(R(1));
      const V bias = has(prefix + "bias") ? leaf(prefix + "bias")[size_t(k)] : V(R(0));
      for (int64_t r = 0; r < rows; ++r) {
        const V pre = normalised(g[size_t(r * pt + k)], mean, var, state_eps, weight, bias);
        if (closest != nullptr && pre.v != 0 && std::fabs(double(pre.v)) < near_zero) closest->state_sign = true;
        state[size_t(r * pt + k)] = relu(pre);
      }
    }
    if (c.state_batch) output(prefix + "mean", means), output(prefix + "var", vars);
    return state;
  }

  Vs modulate(const Vs& z, const Vs& state, const Vs& attention) {
    const Sizes& s = c.size;
    Vs out;
    for (int64_t n = 0; n < s.N; ++n)
      for (int64_t concept_ = 0; concept_ < s.C; ++concept_) {
        const int64_t at = n * s.C + concept_;
        const V *H = state.data() + at * s.pt, *M = attention.data() + at * s.S;
        const bool pixel = c.modulation == Modulation::pixel;
        Vs tilde(size_t(s.S), V(R(1)));
        if (pixel) {
          const V top = constant(maximum(M, s.S, fault == Fault::tie_gradient), fault == Fault::maximum_gradient);
          for (int64_t i = 0; i < s.S; ++i) tilde[size_t(i)] = M[i] / top;
        }
        for (int64_t j = 0; j < s.p; ++j) {
          V scale(R(0)), shift(R(0));  // M~ multiplies both: (M~ H) W = M~ (H W)
          for (int64_t k = 0; k < s.pt; ++k) {
            const size_t w = size_t((concept_ * s.pt + k) * s.p + j);
            if (has("scale_weight")) scale = multiply_add(H[k], leaf("scale_weight")[w], scale);
            if (has("shift_weight")) shift = multiply_add(H[k], leaf("shift_weight")[w], shift);
          }
          const V scale_bias = leaf("scale_bias")[size_t(concept_ * s.p + j)], shift_bias = leaf("shift_bias")[size_t(concept_ * s.p + j)];
          for (int64_t i = 0; i < s.S; ++i) {
            const V alpha = multiply_add(tilde[size_t(i)], scale, scale_bias), beta = multiply_add(tilde[size_t(i)], shift, shift_bias);
            const V pre = multiply_add(alpha, z[size_t((at * s.p + j) * s.S + i)], beta);
            if (closest != nullptr && std::fabs(double(pre.v)) < near_zero) inputs.at("grad_out")[out.size()] = 0;
            out.push_back(relu(pre));
          }
        }
      }
    return out;
  }
};

}  // namespace

template <class R>
Tensors middle_reference(const Case& c, Tensors& inputs, Closest* closest, Fault fault) {
  Graph<R> graph(c, inputs, closest, fault);
  const auto z = graph.norm(graph.leaf("y"));
  typename Graph<R>::Vs h, attention;
  graph.sample(z, h, attention);
  const auto state = graph.reason(h, "state_");
  graph.output("out", graph.modulate(z, state, attention), "grad_out");
  return graph.finish();
}
template <class R>
Tensors sample_reference(const Case& c, Tensors& inputs, Closest* closest, Fault fault) {
  Graph<R> graph(c, inputs, closest, fault);
  typename Graph<R>::Vs h, attention;
  graph.sample(graph.leaf("z"), h, attention);
  graph.output("h", h, "dh");
  graph.output("attention", attention, "dattention");
  return graph.finish();
}
template <class R>
Tensors reason_reference(const Case& c, Tensors& inputs, Closest* closest, Fault fault) {
  Graph<R> graph(c, inputs, closest, fault);
  graph.output("state", graph.reason(graph.leaf("h"), ""), "dstate");
  return graph.finish();
}
template <class R>
Tensors modulate_reference(const Case& c, Tensors& inputs, Closest* closest, Fault fault) {
  Graph<R> graph(c, inputs, closest, fault);
  const typename Graph<R>::Vs none;
  graph.output("out", graph.modulate(graph.leaf("z"), graph.leaf("state"), graph.has("attention") ? graph.leaf("attention") : none),
               "grad_out");
  return graph.finish();
}

template <class R>
Tensors norm_relu_reference(const Case& c, Tensors& inputs, Closest* closest, Fault fault) {
  Graph<R> graph(c, inputs, closest, fault);
  using V = Var<R>;
  const auto z = graph.norm(graph.leaf("y"));
  typename Graph<R>::Vs out;
  for (size_t i = 0; i < z.size(); ++i) {
    V pre = z[i];
    if (c.shortcut == Shortcut::plain) pre = pre + graph.leaf("shortcut")[i];
    if (c.shortcut == Shortcut::normed) {
      const size_t channel = i / size_t(c.size.S) % size_t(c.size.channels());
      const auto at = [&](const char* name, double otherwise) {
        const auto found = inputs.find(std::string("shortcut_norm_") + name);
        return V(R(found == inputs.end() ? otherwise : found->second[channel]));
      };
      pre =
          pre + Graph<R>::normalised(V(R(inputs.at("shortcut")[i])), at("mean", 0), at("var", 1), norm_eps, at("weight", 1), at("bias", 0));
    }
    if (closest != nullptr && c.norm == Norm::batch && std::fabs(double(pre.v)) < near_zero) inputs.at("grad_out")[i] = 0;
    out.push_back(relu(pre));
  }
  graph.output("out", out, "grad_out");
  if (c.norm == Norm::batch) return graph.finish();
  return graph.results;  // has no backward
}

#define VCR_REFERENCE(op)                                              \
  template Tensors op<double>(const Case&, Tensors&, Closest*, Fault); \
  template Tensors op<float>(const Case&, Tensors&, Closest*, Fault);
VCR_REFERENCE(middle_reference)
VCR_REFERENCE(sample_reference)
VCR_REFERENCE(reason_reference)
VCR_REFERENCE(modulate_reference)
VCR_REFERENCE(norm_relu_reference)

}  // namespace vcr_test
