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
      reason_image(f.C, f.pt, f.edges, f.h + n * f.C * f.pt, f.edge, f.a + n * f.C * f.C, f.g + n * f.C * f.pt, scratch.get());
  });
  Scratch<double> memory(2 * f.pt);
  const StateNorm norm{memory.get(), memory.get() + f.pt};
  if (f.batch)
    batch_state_norm(rows, f.pt, f.eps, f.g, norm, f.mean, f.var, f.norm);
  else
    given_state_norm(f.pt, f.eps, f.mean, f.var, norm, f.norm);
  normalise_states(rows, f.pt, f.g, norm, f.weight, f.bias, f.state);
}

template <class A>
void reason_backward(const ReasonBackward<A>& f) {
  const int64_t rows = f.N * f.C, states = rows * f.pt, share = f.edges == Edges::dynamic_edges ? f.pt * f.C : 0;
  Scratch<A> dg(states), partial(f.N * share);
  Scratch<double> memory(2 * f.pt);
  const StateNorm norm{memory.get(), memory.get() + f.pt};
  saved_state_norm(f.pt, f.norm, norm);
  for (int64_t i = 0; i < states; ++i)
    dg.get()[i] = normalised_state(f.g[i], i % f.pt, norm, f.weight, f.bias) <= 0 ? A(0) : f.dstate[i];  // NaN passes
  normalise_states_backward(rows, f.pt, f.batch, f.g, norm, f.weight, dg.get(), f.dweight, f.dbias);
  reasoner_edges_backward(f.pool, f.N, f.C, f.pt, f.edges, f.h, f.edge, f.a, dg.get(), f.dh, f.dedge, partial.get());
}

}  // namespace
}  // namespace vcr
