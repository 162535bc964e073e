// What the fused middle's kernels take: sizes, options, the map, the parameters in accumulation type, and the workspace that the
// forward pass fills and the backward pass reads.
#pragma once
#include "../common/dtypes.h"
#include "../common/problem.h"
#include "../common/variants.h"
#include "../concept_sample/args.h"

namespace vcr {

struct MiddleOptions {
  Norm norm = Norm::batch;
  Sampler sampler = Sampler::dynamic_query;
  Edges edges = Edges::dynamic_edges;
  Modulation modulation = Modulation::channel;
  bool state_batch = true;  // the reasoner's batch norm uses this batch's statistics
  bool save = true;         // a backward pass will follow
  double norm_eps = 1e-5, state_eps = 1e-5;
};

// Null where the variant has none.
template <class A>
struct MiddleParams {
  const A *norm_mean, *norm_var, *norm_weight, *norm_bias;  // [C p]
  const A *value, *query, *key, *logit;                     // [C, p, pt] each; logit [C, p]
  const A* edge;                                            // [pt, C] or [C, C]
  const A *state_mean, *state_var, *state_weight, *state_bias;
  const A *scale_weight, *shift_weight;  // [C, pt, p]
  const A *scale_bias, *shift_bias;      // [C, p]
};
template <class A>
struct MiddleGrads {
  A *norm_weight, *norm_bias, *value, *query, *key, *logit, *edge, *state_weight, *state_bias, *scale_weight, *shift_weight, *scale_bias,
      *shift_bias;
};

// One array; its size does not depend on the variant. Evaluation needs no more than what stands before `edges`.
template <class A>
struct MiddleSaved {
  A *mu, *rstd, *s;            // [C p]; unused without a batch norm, where every image is centred on its own mean
  A *m, *u, *r, *abar, *bbar;  // [N, C p]: mean of yhat, score vector, centred weighted mean, modulation without its biases
  A *q, *h, *g, *state;        // [N, C, pt]
  Softmax<A>* softmax;         // [N, C]
  A* state_norm;               // [2 pt]
  A* edges;                    // [N, C, C] tanh(H We)
  A* R;                        // [N, C p, pt]

  static int64_t size(const Problem& pr, bool training) {
    const int64_t CP = pr.channels(), K = pr.N * pr.C * pr.pt;
    int64_t n = 3 * CP + 5 * pr.N * CP + 4 * K + 3 * pr.N * pr.C + 2 * pr.pt;
    if (training) n += pr.N * pr.C * pr.C + pr.N * CP * pr.pt;
    return n;
  }
  // Inlined for sure: a copy that the linker shared between levels might be one that this machine can't run.
  __attribute__((always_inline)) MiddleSaved(const Problem& pr, A* at) {
    const int64_t CP = pr.channels(), K = pr.N * pr.C * pr.pt;
    const auto take = [&at](int64_t count) {
      A* here = at;
      at += count;
      return here;
    };
    mu = take(CP), rstd = take(CP), s = take(CP);
    m = take(pr.N * CP), u = take(pr.N * CP), r = take(pr.N * CP), abar = take(pr.N * CP), bbar = take(pr.N * CP);
    q = take(K), h = take(K), g = take(K), state = take(K);
    softmax = reinterpret_cast<Softmax<A>*>(take(3 * pr.N * pr.C));
    state_norm = take(2 * pr.pt);
    edges = take(pr.N * pr.C * pr.C);
    R = at;
  }
};

template <class T>
struct MiddleForward {
  using A = acc_t<T>;
  Problem problem;
  MiddleOptions options;
  MiddleParams<A> params;
  Map<const T> y;
  Map<T> out;
  A* saved;  // MiddleSaved::size(problem, options.save)
  // Batch statistics, variances with Bessel's correction; null where the batch's are not used.
  A *norm_mean, *norm_var, *state_mean, *state_var;
  Parallel pool;
  PassClock clock;
};

template <class T>
struct MiddleBackward {
  using A = acc_t<T>;
  Problem problem;
  MiddleOptions options;
  MiddleParams<A> params;  // statistics unused: they are in saved
  Map<const T> y, grad_out;
  Map<T> dy;
  A* saved;
  MiddleGrads<A> grads;
  Parallel pool;
  PassClock clock;
};

}  // namespace vcr
