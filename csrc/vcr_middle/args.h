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

// One op makes all passes of a direction; or, where statistics go over several processes, several make them, and what the processes
// exchange is small numbers in between. norm is given or none for all steps but `whole`.
//   forward    channel_moments (MiddleStats) | states: the sampler's pass, up to G | modulate: from the states' statistics on
//   backward   sums: up to the states' norm | states: up to the map's norm | input: the last pass
enum class ForwardStep { whole, states, modulate };
enum class BackwardStep { whole, sums, states, input };

// One array; its size does not depend on the variant. Evaluation needs no more than what stands before `edges`. `late`, an array of
// its own where the forward pass takes several ops, has what follows the states' statistics.
template <class A>
struct MiddleSaved {
  A *mu, *rstd, *s;            // [C p]; unused without a batch norm, where every image is centred on its own mean
  A *m, *u, *r, *abar, *bbar;  // [N, C p]: mean of yhat, score vector, centred weighted mean, modulation without its biases
  A *q, *h, *g, *state;        // [N, C, pt]
  Softmax<A>* softmax;         // [N, C]
  A* state_norm;               // [4 pt]
  A* edges;                    // [N, C, C] tanh(H We)
  A* R;                        // [N, C p, pt]

  static int64_t size(const Problem& pr, bool training) {
    const int64_t CP = pr.channels(), K = pr.N * pr.C * pr.pt;
    int64_t n = 3 * CP + 5 * pr.N * CP + 4 * K + 3 * pr.N * pr.C + 4 * pr.pt;
    if (training) n += pr.N * pr.C * pr.C + pr.N * CP * pr.pt;
    return n;
  }
  static int64_t late_size(const Problem& pr) { return 2 * pr.N * pr.channels() + pr.N * pr.C * pr.pt; }
  // Inlined for sure: a copy that the linker shared between levels might be one that this machine can't run.
  __attribute__((always_inline)) MiddleSaved(const Problem& pr, A* at, A* late = nullptr) {
    const int64_t CP = pr.channels(), K = pr.N * pr.C * pr.pt;
    const auto take = [&at](int64_t count) {
      A* here = at;
      at += count;
      return here;
    };
    mu = take(CP), rstd = take(CP), s = take(CP);
    m = take(pr.N * CP), u = take(pr.N * CP), r = take(pr.N * CP);
    q = take(K), h = take(K), g = take(K);
    if (late == nullptr) late = take(late_size(pr));
    abar = late, bbar = abar + pr.N * CP, state = bbar + pr.N * CP;
    softmax = reinterpret_cast<Softmax<A>*>(take(3 * pr.N * pr.C));
    state_norm = take(4 * pr.pt);
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
  ForwardStep step = ForwardStep::whole;
  A* late = nullptr;                   // MiddleSaved::late_size, where step isn't `whole`
  double* moments = nullptr;           // [2, pt], written by `states`: mean and centred sum of squares of G
  const double* state_norm = nullptr;  // [2, pt], read by `modulate`: mean and 1 / sqrt(variance + eps)
};

// Pass 1 alone.
template <class T>
struct MiddleStats {
  Problem problem;
  Map<const T> y;
  double* moments;  // [2, C p]: mean and centred sum of squares of the batch; 0 where it is empty
  Parallel pool;
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
  BackwardStep step = BackwardStep::whole;
  A* late = nullptr;
  const double* state_norm = nullptr;    // as the forward pass had it
  A* summed = nullptr;                   // MiddleBackwardWork::summed, written by `sums`
  A* attended = nullptr;                 // MiddleBackwardWork::attended, written by `states`
  double* state_sums = nullptr;          // [2, pt], written by `sums`: of dL/dBN(G), and of its product with the normalised G
  const double* state_shares = nullptr;  // the same over all processes, divided by the number of states; 0 where G's norm is given
  A* norm_sums = nullptr;                // [2, C p], written by `states`: ds, db
  const A* norm_shares = nullptr;        // the same over all processes, divided by the number of positions; null: norm given or none
};

// What the backward pass's steps leave to the following ones.
struct MiddleBackwardWork {
  // E0, E1, F0, F1, K1 [N, C p], K0 [N, C], dL/dBN(G) [N, C, pt], ds, db [C p]
  static int64_t summed(const Problem& pr) { return 5 * pr.N * pr.channels() + pr.N * pr.C + pr.N * pr.C * pr.pt + 2 * pr.channels(); }
  // dr, s dzbar / S [N, C p], r . dr [N, C]
  static int64_t attended(const Problem& pr) { return 2 * pr.N * pr.channels() + pr.N * pr.C; }
};

}  // namespace vcr
