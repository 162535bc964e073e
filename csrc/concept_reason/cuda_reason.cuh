// The reasoner (contract stage 3, Eq. 3) on states: G = h + A h, state = relu(BN(G)). The states' batch norm is in double whatever their
// type: of few states it lets through next to nothing of a gradient, and rounding must be smaller than that (see cpu.h).
#pragma once
#include "../cuda/thread.h"
#include "args.h"

namespace vcr::cuda {

constexpr int states_at_once = 4;

// Rows [c0, c0 + count) of G of one image, a warp each. h [C, pt]; keep: dynamic edges [C, C] for the backward pass, or null; g [count, pt].
template <class A, class Thread>
VCR_DEVICE void exchange(Thread& t, Edges edges, int64_t C, int64_t pt, const A* h, const A* edge, int64_t c0, int64_t count, A* keep,
                         A* g) {
  for_warps(t, count, [&](int row) {
    const int64_t c = c0 + row;
    const A* mine = h + c * pt;
    for (int64_t k0 = 0; k0 < pt; k0 += states_at_once) {
      A sums[states_at_once] = {};
      for (int64_t d = t.lane(); d < C && edges != Edges::none; d += warp_size) {
        A weight = 0;
        if (edges == Edges::dynamic_edges) {
          for (int64_t k = 0; k < pt; ++k) weight = multiply_add(mine[k], edge[k * C + d], weight);
          weight = tangent(weight);
          if (keep != nullptr && k0 == 0) keep[c * C + d] = weight;
        } else {
          weight = edge[c * C + d];
        }
        VCR_UNROLL
        for (int k = 0; k < states_at_once; ++k)
          if (k0 + k < pt) sums[k] = multiply_add(weight, h[d * pt + k0 + k], sums[k]);
      }
      VCR_UNROLL
      for (int k = 0; k < states_at_once; ++k)
        if (k0 + k < pt) {
          const A sum = t.reduce(sums[k], Sum{});
          if (t.lane() == 0) g[row * pt + k0 + k] = mine[k0 + k] + sum;
        }
    }
  });
}

struct StateNormValues {
  double mean, rstd;
};
// Of given statistics.
template <class A>
VCR_DEVICE StateNormValues given_state_norm(const A* mean, const A* var, double eps, int64_t k) {
  return {double(mean[k]), double(A(1 / square_root(double(var[k]) + eps)))};
}
// By one warp, from every image's mean and centred sum of squares over its concepts: parts [N, 2, pt]. `squares`: of all states.
template <class Thread>
VCR_DEVICE StateNormValues batch_state_norm(Thread& t, const double* parts, int64_t N, int64_t C, int64_t pt, double eps, int64_t k,
                                            double& squares) {
  const double mean = warp_sum<double>(t, N, [&](int n) { return parts[2 * n * pt + k]; }) / double(N);
  squares = warp_sum<double>(t, N, [&](int n) {
    const double apart = parts[2 * n * pt + k] - mean;
    return parts[(2 * n + 1) * pt + k] + double(C) * apart * apart;
  });
  return {mean, 1 / square_root(squares / (double(N) * double(C)) + eps)};
}
// What both passes must see alike, `kept` [4 pt]: the scale, then what rounding took from it (nothing, if it isn't finite), and the mean in
// the same way.
template <class A>
VCR_DEVICE StateNormValues kept_state_norm(const A* kept, int64_t pt, int64_t k) {
  return {double(kept[2 * pt + k]) + double(kept[3 * pt + k]), double(kept[k]) + double(kept[pt + k])};
}
template <class A>
VCR_DEVICE A lost_by_rounding(double x) {
  const double rest = x - double(A(x));
  return rest - rest == 0 ? A(rest) : A(0);
}
template <class A>
VCR_DEVICE void keep_state_norm(StateNormValues norm, A* to, int64_t pt, int64_t k) {
  to[k] = A(norm.rstd), to[pt + k] = lost_by_rounding<A>(norm.rstd);
  to[2 * pt + k] = A(norm.mean), to[3 * pt + k] = lost_by_rounding<A>(norm.mean);
}
// A double as `kept` has it.
template <class A>
VCR_DEVICE double as_kept(double x) {
  return double(A(x)) + double(lost_by_rounding<A>(x));
}

template <class A>
VCR_DEVICE A normalised_state(A g, StateNormValues norm, const A* weight, const A* bias, int64_t k) {
  const double x = (double(g) - norm.mean) * norm.rstd;
  return A(multiply_add(x, double(value_or(weight, k, A(1))), double(value_or(bias, k, A(0)))));
}

// The norm of all pt states, in shared arrays; the first block writes what is returned and what is kept.
template <class A>
struct StateNormArgs {
  bool batch;
  double eps;
  const double* parts;  // [N, 2, pt], where `batch`
  const A *given_mean, *given_var;
  A *mean, *var, *keep;  // keep: see kept_state_norm; null where nobody asks
};
template <class A, class Thread>
VCR_DEVICE void find_state_norm(Thread& t, const StateNormArgs<A>& a, int64_t N, int64_t C, int64_t pt, bool first, double* mean,
                                double* rstd) {
  if (a.batch) {
    for_warps(t, pt, [&](int k) {
      double squares = 0;
      const StateNormValues norm = batch_state_norm(t, a.parts, N, C, pt, a.eps, k, squares);
      if (t.lane() != 0) return;
      mean[k] = as_kept<A>(norm.mean);
      rstd[k] = as_kept<A>(norm.rstd);
      if (!first) return;
      a.mean[k] = A(norm.mean);
      a.var[k] = A(squares / (double(N) * double(C) - 1));
      if (a.keep != nullptr) keep_state_norm(norm, a.keep, pt, k);
    });
  } else {
    for_threads(t, pt, [&](int k) {
      const StateNormValues norm = given_state_norm(a.given_mean, a.given_var, a.eps, k);
      mean[k] = norm.mean;
      rstd[k] = norm.rstd;
      if (first && a.keep != nullptr) keep_state_norm(norm, a.keep, pt, k);
    });
  }
}

// G of one image and, for the batch norm, its mean and centred sum of squares over the concepts. Grid: images.
template <class A>
struct ConceptReason {
  static constexpr int threads = 256, resident = 2;
  struct Args {
    int64_t N, C, pt;
    Edges edges;
    const A *h, *edge;
    A *g, *keep;    // [N, C, pt]; [N, C, C] or null
    double* parts;  // [N, 2, pt] or null
  };
  struct Shared {
    VCR_BOTH Shared(SharedCarver&, const Args&) {}
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.N; }

  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t n) {
    const int64_t states = a.C * a.pt;
    A* g = a.g + n * states;
    exchange(t, a.edges, a.C, a.pt, a.h + n * states, a.edge, 0, a.C, offset(a.keep, n * a.C * a.C), g);
    if (a.parts == nullptr) return;
    t.sync();
    for_warps(t, a.pt, [&](int k) {
      const double mean = warp_sum<double>(t, a.C, [&](int c) { return double(g[c * a.pt + k]); }) / double(a.C);
      const double squares = warp_sum<double>(t, a.C, [&](int c) {
        const double x = double(g[c * a.pt + k]) - mean;
        return x * x;
      });
      if (t.lane() == 0) a.parts[2 * n * a.pt + k] = mean, a.parts[(2 * n + 1) * a.pt + k] = squares;
    });
  }
};

}  // namespace vcr::cuda
