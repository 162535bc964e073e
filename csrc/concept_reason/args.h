// What the reasoner's kernels take, in accumulation type A. Contract stage 3, Eq. 3.
#pragma once
#include <cstdint>

#include "../common/problem.h"
#include "../common/variants.h"

namespace vcr {

template <class A>
struct ReasonForward {
  int64_t N, C, pt;
  Edges edges;
  bool batch;  // statistics of this batch, else `mean` and `var` are read
  double eps;
  const A *h, *edge, *weight, *bias;  // [N, C, pt]; [pt, C] or [C, C]; [pt]
  A *mean, *var;                      // [pt]; written (var with Bessel's correction) where `batch`
  A* state;                           // [N, C, pt]
  A *g, *a, *norm;                    // [N, C, pt], [N, C, C], [4 pt]: what the backward pass reads
  Parallel pool;
};

template <class A>
struct ReasonBackward {
  int64_t N, C, pt;
  Edges edges;
  bool batch;
  const A *dstate, *h, *edge, *weight, *bias;
  const A *g, *a, *norm;
  A *dh, *dedge, *dweight, *dbias;
  Parallel pool;
};

}  // namespace vcr
