// The kernels of one instruction-set level, one table for each feature type. What varies by level or type is chosen here, once.
#pragma once
#include "../vcr_middle/args.h"

namespace vcr {

template <class T>
struct Kernels {
  void (*middle_forward)(const MiddleForward<T>&);
  void (*middle_backward)(const MiddleBackward<T>&);
};

}  // namespace vcr
