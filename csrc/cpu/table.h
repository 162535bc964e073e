// The kernels of one instruction-set level, one table for each feature type. What varies by level or type is chosen here, once.
#pragma once
#include "../concept_modulate/args.h"
#include "../concept_reason/args.h"
#include "../norm_relu/args.h"
#include "../vcr_middle/args.h"

namespace vcr {

template <class T>
struct Kernels {
  void (*middle_forward)(const MiddleForward<T>&);
  void (*middle_backward)(const MiddleBackward<T>&);
  void (*middle_stats)(const MiddleStats<T>&);
  void (*sample_forward)(const SampleForward<T>&);
  void (*sample_backward)(const SampleBackward<T>&);
  void (*modulate_forward)(const ModulateForward<T>&);
  void (*modulate_backward)(const ModulateBackward<T>&);
  void (*reason_forward)(const ReasonForward<acc_t<T>>&);  // states are in accumulation type
  void (*reason_backward)(const ReasonBackward<acc_t<T>>&);
  void (*norm_relu)(const NormRelu<T>&);
  void (*norm_relu_backward)(const NormReluBackward<T>&);
};

}  // namespace vcr
