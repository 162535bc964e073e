// The op concept_reason, alone.
#pragma once
#include "args.h"
#include "cpu.h"

namespace vcr {
namespace {

template <class A>
void reason_forward(const ReasonForward<A>& f) {
  const int64_t rows = f.N * f.C;
  for_ranges(f.pool, f.N, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(reason_scratch(f.C, f.pt));
    for (int64_t n = begin; n < end; ++n)
      reason_image(f.C, f.pt, f.edges, f.h + n * f.C * f.pt, f.edge, f.a + n * f.C * f.C, f.xhat + n * f.C * f.pt, scratch.get());
  });
  if (f.batch) state_statistics(rows, f.pt, f.xhat, f.mean, f.var);
  for (int64_t k = 0; k < f.pt; ++k) {
    f.rstd[k] = A(1.0 / __builtin_sqrt(double(f.var[k]) + f.eps));
    f.rstd[f.pt + k] = f.mean[k];
    if (f.batch) f.var[k] = A(double(f.var[k]) * double(rows) / double(rows - 1));
  }
  normalise_states(rows, f.pt, f.xhat, f.mean, f.rstd, f.weight, f.bias, f.xhat, f.state);
}

template <class A>
void reason_backward(const ReasonBackward<A>& f) {
  const int64_t rows = f.N * f.C, states = rows * f.pt, share = f.edges == Edges::dynamic_edges ? f.pt * f.C : 0;
  Scratch<A> dg(states), partial(f.N * share);
  for (int64_t i = 0; i < states; ++i) {
    const int64_t k = i % f.pt;
    const A pre = f.xhat[i] * (f.weight ? f.weight[k] : A(1)) + (f.bias ? f.bias[k] : A(0));
    dg.get()[i] = pre <= 0 ? A(0) : f.dstate[i];  // NaN passes
  }
  normalise_states_backward(rows, f.pt, f.batch, f.xhat, f.rstd, f.weight, dg.get(), f.dweight, f.dbias);
  reasoner_edges_backward(f.pool, f.N, f.C, f.pt, f.edges, f.h, f.edge, f.a, dg.get(), f.dh, f.dedge, partial.get());
}

}  // namespace
}  // namespace vcr
