// What the sampler's kernels share: sizes known at compile time where they are the paper's, and one (image, concept)'s softmax.
#pragma once
#include "../common/dtypes.h"
#include "../common/problem.h"
#include "../common/variants.h"

namespace vcr {

// The maximum of the logits, the sum of exp(logit - maximum), and at how many positions the maximum stands
// (pixel modulation divides by it, and its gradient is shared among ties as torch.amax does).
template <class A>
struct Softmax {
  A maximum, sum, ties;
};

// How one (image, concept) is normalised and scored. Everything is centred: yhat = y - mu, z = s * yhat + b.
template <class A>
struct SampleArgs {
  const A* mu;    // [p]
  const A* s;     // [p]
  const A* b;     // [p]
  const A* v;     // [p] logits are yhat . v
  const A* mhat;  // [p] mean of yhat
};

// How image n sees what was done before the sampler, z = s (y - mu) + b: per-channel arrays of a batch norm, or, without one, s = 1 and
// each image centred on its own mean (mu = b = m), so that no variant is computed uncentred.
template <class A>
struct NormView {
  const A *mu, *s, *b;
  int64_t image_stride;  // of mu and b
  const A* mhat;         // the image's mean of yhat: kept apart from mu, since their difference would lose digits
  int64_t mhat_stride;   // 0 where images are centred on their own mean, and mhat is 0
  SampleArgs<A> concept_args(const Problem& pr, int64_t n, int64_t c, const A* v) const {
    return {mu + n * image_stride + c * pr.p, s + c * pr.p, b + n * image_stride + c * pr.p, v, mhat + n * mhat_stride + c * pr.p};
  }
};

template <class A>
struct SampleWeights {
  const A *value, *query, *key, *logit;  // [C, p, pt]; logit [C, p]; null where the sampler has none
};

// What the forward pass keeps of every (image, concept).
template <class A>
struct SampleState {
  A *m, *u, *r;         // [N, C p]: mean of yhat (without a batch norm: of z), score vector, centred weighted mean
  A *q, *h;             // [N, C, pt]
  Softmax<A>* softmax;  // [N, C]
  A* R;                 // [N, C p, pt] or null without a backward pass
};

template <class T>
struct SampleForward {
  using A = acc_t<T>;
  Problem problem;
  Sampler sampler;
  SampleWeights<A> weights;
  Map<const T> z;
  A* saved;      // sample_saved_size(problem, save)
  A* h;          // [N, C, pt]
  A* attention;  // [N, C, S] or null
  bool save;
  Parallel pool;
};

template <class T>
struct SampleBackward {
  using A = acc_t<T>;
  Problem problem;
  Sampler sampler;
  SampleWeights<A> weights;
  Map<const T> z;
  Map<T> dz;
  A* saved;
  const A* dh;          // [N, C, pt]
  const A* dattention;  // [N, C, S] or null
  A *dvalue, *dquery, *dkey, *dlogit;
  Parallel pool;
};

template <class A>
int64_t sample_saved_size(const Problem& pr, bool training) {
  return 3 * pr.N * pr.channels() + pr.N * pr.C * pr.pt + 3 * pr.N * pr.C + (training ? pr.N * pr.channels() * pr.pt : 0);
}
template <class A>
SampleState<A> sample_state(const Problem& pr, A* saved, A* h, bool training) {
  const int64_t map = pr.N * pr.channels(), states = pr.N * pr.C * pr.pt;
  A* q = saved + 3 * map;
  A* softmax = q + states;
  return {
      saved, saved + map, saved + 2 * map, q, h, reinterpret_cast<Softmax<A>*>(softmax), training ? softmax + 3 * pr.N * pr.C : nullptr};
}

}  // namespace vcr
