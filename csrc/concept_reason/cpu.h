// Concept reasoner (contract stage 3, Eq. 3): G = H + A H, A = tanh(H We); state = relu(BN(G)), batch norm over the pt columns with
// statistics over N and C. Nothing here is as large as a map.
#pragma once
#include "../common/variants.h"
#include "../cpu/parallel.h"

namespace vcr {
namespace {

// to[k, c] = from[c, k]
template <class A>
VCR_INLINE void transpose_states(const A* from, int64_t C, int64_t pt, int64_t row, A* to) {
  for (int64_t k = 0; k < pt; ++k)
    for (int64_t c = 0; c < C; ++c) to[k * row + c] = from[c * pt + k];
}

VCR_INLINE int64_t reason_scratch(int64_t C, int64_t pt) { return 2 * pt * round_up(C, 16) + 64; }

// One image. h, g [C, pt]; a [C, C] is written for dynamic edges.
template <class A>
void reason_image(int64_t C, int64_t pt, Edges edges, const A* h, const A* edge, A* a, A* g, A* scratch) {
  constexpr int W = lanes<A>;
  if (edges == Edges::none) {
    for (int64_t i = 0; i < C * pt; ++i) g[i] = h[i];
    return;
  }
  const int64_t row = round_up(C, 16);
  A* ht = scratch;
  transpose_states(h, C, pt, row, ht);
  for (int64_t c = 0; c < C; ++c) {
    A* out = a + c * C;
    if (edges == Edges::dynamic_edges) {
      const auto scores = [&](int64_t d, auto fetch) {
        vec<A> x = zeros<A>();
        for (int64_t k = 0; k < pt; ++k) x = fma(splat(h[c * pt + k]), fetch(edge + k * C + d), x);
        return vcr::tanh(x);
      };
      int64_t d = 0;
      for (; d + W <= C; d += W) store(out + d, scores(d, [](const A* from) { return load(from); }));
      if (d < C) {
        const int some = int(C - d);
        store_partial(out + d, scores(d, [some](const A* from) { return load_partial(from, some); }), some);
      }
    }
    const A* weights = edges == Edges::dynamic_edges ? out : edge + c * C;
    const auto weighted = [&](int64_t k) {
      vec<A> acc = zeros<A>();
      int64_t d = 0;
      for (; d + W <= C; d += W) acc = fma(load(weights + d), load(ht + k * row + d), acc);
      if (d < C) {
        const int some = int(C - d);
        acc = fma(load_partial(weights + d, some), load_partial(ht + k * row + d, some), acc);
      }
      return acc;
    };
    int64_t k = 0;
    for (; k + W <= pt; k += W) {  // as many sums as a vector has lanes are added up together
      vec<A> acc[W];
      for (int i = 0; i < W; ++i) acc[i] = weighted(k + i);
      store(g + c * pt + k, load(h + c * pt + k) + sum_rows<A>(acc));
    }
    for (; k < pt; ++k) g[c * pt + k] = h[c * pt + k] + hsum<A>(weighted(k));
  }
}

// The batch norm of states, in double whatever their type: over few rows its gradient nearly cancels (over two, to eps / (var + eps) of
// what goes in), so both directions must see the same mean and scale, and not as a float has them. `saved` [4 pt] has the scale, then what
// rounding took from it (nothing, if it isn't finite), and the mean in the same way.
struct StateNorm {
  double *mean, *rstd;  // [pt] each
};

// The mean of each of the pt columns of g [rows, pt], and its sum of squares about it.
template <class A>
void state_moments(int64_t rows, int64_t pt, const A* g, double* mean, double* squares) {
  fill_zero(mean, pt);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < pt; ++k) mean[k] += double(g[r * pt + k]);
  for (int64_t k = 0; k < pt; ++k) mean[k] /= double(rows);
  fill_zero(squares, pt);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < pt; ++k) {
      const double x = double(g[r * pt + k]) - mean[k];
      squares[k] += x * x;
    }
}
// What the forward pass used.
template <class A>
void saved_state_norm(int64_t pt, const A* saved, const StateNorm& to) {
  for (int64_t k = 0; k < pt; ++k) {
    to.rstd[k] = double(saved[k]) + double(saved[pt + k]);
    to.mean[k] = double(saved[2 * pt + k]) + double(saved[3 * pt + k]);
  }
}
template <class A>
VCR_INLINE void save_split(double x, A& high, A& low) {
  high = A(x);
  const double rest = x - double(high);
  low = rest - rest == 0 ? A(rest) : A(0);
}
// `of` becomes what the backward pass will find.
template <class A>
void save_state_norm(int64_t pt, const StateNorm& of, A* saved) {
  for (int64_t k = 0; k < pt; ++k) {
    save_split(of.rstd[k], saved[k], saved[pt + k]);
    save_split(of.mean[k], saved[2 * pt + k], saved[3 * pt + k]);
  }
  saved_state_norm(pt, saved, of);
}
// Of this batch; mean and var (with Bessel's correction) are written.
template <class A>
void batch_state_norm(int64_t rows, int64_t pt, double eps, const A* g, const StateNorm& to, A* mean, A* var, A* saved) {
  state_moments(rows, pt, g, to.mean, to.rstd);
  for (int64_t k = 0; k < pt; ++k) {
    const double squares = to.rstd[k];
    mean[k] = A(to.mean[k]);
    var[k] = A(squares / double(rows - 1));
    to.rstd[k] = 1.0 / __builtin_sqrt(squares / double(rows) + eps);
  }
  save_state_norm(pt, to, saved);
}
template <class A>
void given_state_norm(int64_t pt, double eps, const A* mean, const A* var, const StateNorm& to, A* saved) {
  for (int64_t k = 0; k < pt; ++k) {
    to.mean[k] = double(mean[k]);
    to.rstd[k] = double(A(1.0 / __builtin_sqrt(double(var[k]) + eps)));
  }
  save_state_norm(pt, to, saved);
}

// ((g - mean) rstd) weight + bias; weight and bias may be null.
template <class A>
VCR_INLINE A normalised_state(A g, int64_t k, const StateNorm& norm, const A* weight, const A* bias) {
  const double x = (double(g) - norm.mean[k]) * norm.rstd[k];
  return A(x * (weight ? double(weight[k]) : 1.0) + (bias ? double(bias[k]) : 0.0));
}
template <class A>
VCR_INLINE void normalise_states(int64_t rows, int64_t pt, const A* g, const StateNorm& norm, const A* weight, const A* bias, A* state) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < pt; ++k) {
      const A y = normalised_state(g[r * pt + k], k, norm, weight, bias);
      state[r * pt + k] = y < 0 ? A(0) : y;  // keeps NaN
    }
}

// dstate is dL/dstate where the ReLU is active, else 0. Its sum over the rows, and that of its product with the normalised g: the
// gradients of bias and weight, [pt] each.
template <class A>
void state_norm_sums(int64_t rows, int64_t pt, const A* g, const StateNorm& norm, const A* dstate, double* sum, double* product) {
  fill_zero(sum, pt);
  fill_zero(product, pt);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < pt; ++k) {
      const double d = double(dstate[r * pt + k]);
      sum[k] += d;
      product[k] += d * ((double(g[r * pt + k]) - norm.mean[k]) * norm.rstd[k]);
    }
}
// dstate in, dL/dg out. sum, product: of all rows whose statistics were taken together, divided by their number; null for given
// statistics, which are constants.
template <class A>
void state_norm_input_grad(int64_t rows, int64_t pt, const A* g, const StateNorm& norm, const A* weight, const double* sum,
                           const double* product, A* dstate) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < pt; ++k) {
      const double scale = (weight ? double(weight[k]) : 1.0) * norm.rstd[k], x = (double(g[r * pt + k]) - norm.mean[k]) * norm.rstd[k];
      double d = double(dstate[r * pt + k]);
      if (sum != nullptr) d -= sum[k] + x * product[k];
      dstate[r * pt + k] = A(scale * d);
    }
}
// Both. dweight, dbias [pt] are always written.
template <class A>
void normalise_states_backward(int64_t rows, int64_t pt, bool batch, const A* g, const StateNorm& norm, const A* weight, A* dstate,
                               A* dweight, A* dbias) {
  Scratch<double> scratch(2 * pt);
  double *sum = scratch.get(), *product = sum + pt;
  state_norm_sums(rows, pt, g, norm, dstate, sum, product);
  for (int64_t k = 0; k < pt; ++k) {
    dbias[k] = A(sum[k]);
    dweight[k] = A(product[k]);
    sum[k] /= double(rows);
    product[k] /= double(rows);
  }
  state_norm_input_grad(rows, pt, g, norm, weight, batch ? sum : nullptr, product, dstate);
}

VCR_INLINE int64_t reason_backward_scratch(int64_t C, int64_t pt) { return 4 * pt * round_up(C, 16) + 16 * pt + 64; }

// One image: dg [C, pt] -> dh [C, pt], and for dynamic edges this image's share of dWe, [pt, C].
template <class A>
void reason_image_backward(int64_t C, int64_t pt, Edges edges, const A* h, const A* edge, const A* a, const A* dg, A* dh, A* dedge,
                           A* scratch) {
  constexpr int W = lanes<A>;
  for (int64_t i = 0; i < C * pt; ++i) dh[i] = dg[i];
  if (edges == Edges::none) return;
  const bool dynamic = edges == Edges::dynamic_edges;
  const int64_t row = round_up(C, 16);
  A *ht = scratch, *through = ht + pt * row, *dw = through + pt * row, *we = dw + pt * row;  // all [pt, row], zero past C
  A* through_scores = we + pt * row;  // [pt, lanes]: dP We^T of row c before its lanes are added up
  for (int64_t i = 0; i < 4 * pt * row; ++i) scratch[i] = 0;
  transpose_states(h, C, pt, row, ht);
  if (dynamic)
    for (int64_t k = 0; k < pt; ++k)
      for (int64_t d = 0; d < C; ++d) we[k * row + d] = edge[k * C + d];
  const A* adjacency = dynamic ? a : edge;
  for (int64_t c = 0; c < C; ++c) {
    const A* g = dg + c * pt;
    fill_zero(through_scores, pt * W);
    for (int64_t d = 0; d < C; d += W) {
      const int some = int(min(W, C - d));
      const vec<A> e = some == W ? load(adjacency + c * C + d) : load_partial(adjacency + c * C + d, some);
      vec<A> da = zeros<A>();
      for (int64_t k = 0; k < pt; ++k) {
        da = fma(splat(g[k]), load(ht + k * row + d), da);
        store(through + k * row + d, fma(splat(g[k]), e, load(through + k * row + d)));
      }
      if (!dynamic) continue;
      const vec<A> dp = da * (1 - e * e);
      for (int64_t k = 0; k < pt; ++k) {
        store(dw + k * row + d, fma(splat(h[c * pt + k]), dp, load(dw + k * row + d)));
        store(through_scores + k * W, fma(dp, load(we + k * row + d), load(through_scores + k * W)));
      }
    }
    if (dynamic)
      for (int64_t k = 0; k < pt; ++k) dh[c * pt + k] += hsum<A>(load(through_scores + k * W));
  }
  for (int64_t c = 0; c < C; ++c)
    for (int64_t k = 0; k < pt; ++k) dh[c * pt + k] += through[k * row + c];
  if (dynamic)
    for (int64_t k = 0; k < pt; ++k)
      for (int64_t d = 0; d < C; ++d) dedge[k * C + d] = dw[k * row + d];
}

// Row c of the gradient of static edges: dA[c, d] = sum_n dg[n, c] . h[n, d].
template <class A>
VCR_INLINE void static_edge_gradient_row(int64_t N, int64_t C, int64_t pt, int64_t c, const A* dg, const A* h, A* out) {
  for (int64_t d = 0; d < C; ++d) {
    double sum = 0;
    for (int64_t n = 0; n < N; ++n) {
      A x = 0;
      for (int64_t k = 0; k < pt; ++k) x += dg[(n * C + c) * pt + k] * h[(n * C + d) * pt + k];
      sum += double(x);
    }
    out[d] = A(sum);
  }
}

// All images, and the edges' gradient summed over them in order. partial: [N, pt, C] for dynamic edges.
template <class A>
void reasoner_edges_backward(const Parallel& pool, int64_t N, int64_t C, int64_t pt, Edges edges, const A* h, const A* edge, const A* a,
                             const A* dg, A* dh, A* dedge, A* partial) {
  const int64_t share = edges == Edges::dynamic_edges ? pt * C : 0;
  for_ranges(pool, N, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(reason_backward_scratch(C, pt));
    for (int64_t n = begin; n < end; ++n) {
      const int64_t k = n * C * pt;
      reason_image_backward(C, pt, edges, h + k, edge, a + n * C * C, dg + k, dh + k, partial + n * share, scratch.get());
    }
  });
  for (int64_t i = 0; i < share; ++i) {
    A sum = 0;
    for (int64_t n = 0; n < N; ++n) sum += partial[n * share + i];
    dedge[i] = sum;
  }
  if (edges == Edges::static_edges) for_each(pool, C, [&](int64_t c) { static_edge_gradient_row(N, C, pt, c, dg, h, dedge + c * C); });
}

}  // namespace
}  // namespace vcr
