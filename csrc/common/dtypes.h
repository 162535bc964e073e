// Feature types and the type each of them is accumulated in.
#pragma once
#include <cstdint>

namespace vcr {

struct bf16 {
  uint16_t bits;
};
struct f16 {  // GPUs only
  uint16_t bits;
};

// Reductions, softmax and statistics run in float32; in float64 for float64 features.
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename accumulator<T>::type;

}  // namespace vcr
