// Sizes of a feature map (N, C*p, *spatial), how it lies in memory, and the caller's thread pool.
#pragma once
#include <cstdint>

namespace vcr {

struct Problem {
  int64_t N = 0, C = 0, p = 0, pt = 0, S = 0;  // images, concepts, channels of a concept, state width, positions
  int64_t channels() const { return C * p; }
};

// Contiguous: a channel's S positions are adjacent (position == 1). Channels last: a position's channels are (channel == 1).
enum class Layout { contiguous, channels_last };

// A feature map; strides in elements.
template <class T>
struct Map {
  T* data = nullptr;
  int64_t image = 0, channel = 0, position = 0;
  Layout layout() const { return position == 1 ? Layout::contiguous : Layout::channels_last; }
  T* at(int64_t n, int64_t ch, int64_t i) const { return data + n * image + ch * channel + i * position; }
};

// The pool that runs `body(context, begin, end)` over disjoint ranges of [0, count): PyTorch's in the product.
struct Parallel {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, Body body, void* context) = nullptr;
  int threads = 1;
};

// The passes that are timed when profiling is on; names as in vcr_ops.explain.
enum class Pass {
  channel_stats,
  concept_sample,
  reason,
  concept_modulate,
  modulate_backward_sums,
  small_gradients,
  middle_input_grad,
  count
};
// Called at the end of each pass; null unless profiling.
using PassClock = void (*)(Pass);

}  // namespace vcr
