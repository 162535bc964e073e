// Running statistics of a batch norm, moved as nn.BatchNorm's training forward moves its buffers: one batch more is counted, and
// running += momentum (batch - running). A thousand numbers at most, so one thread and no vectors of its own.
#pragma once
#include <cstdint>

namespace vcr {

template <class A>
struct RunningStats {
  int64_t* counter;  // null: not kept
  A *mean, *var;     // [channels] each
  const A *batch_mean, *batch_var;
  int64_t channels;
};

// From the nearer end, as torch.lerp: a momentum of 1 gives the batch's.
template <class A>
void move_towards(A* running, const A* batch, int64_t count, A momentum) {
  if (momentum < A(0.5) && momentum > A(-0.5))
    for (int64_t i = 0; i < count; ++i) running[i] += momentum * (batch[i] - running[i]);
  else
    for (int64_t i = 0; i < count; ++i) running[i] = batch[i] - (batch[i] - running[i]) * (A(1) - momentum);
}
template <class A>
void move_running_stats(const RunningStats<A>& s, double momentum) {
  if (s.counter != nullptr) ++*s.counter;
  move_towards(s.mean, s.batch_mean, s.channels, A(momentum));
  move_towards(s.var, s.batch_var, s.channels, A(momentum));
}

}  // namespace vcr
