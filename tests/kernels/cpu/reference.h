// The contract's equations, literally and one scalar at a time. Gradients come from a tape, so none of the kernels' algebra is here.
#pragma once
#include "cases.h"

namespace vcr_test {

// Terms of a gradient, or of an equation, that a seeded fault leaves out: the comparison must notice each.
enum class Fault {
  none,
  norm_mean_gradient,    // the batch's mean as a constant
  norm_var_gradient,     // its variance
  query_gradient,        // mean(z) in the query as a constant
  softmax_gradient,      // the softmax's sum as a constant
  edges_gradient,        // tanh(H W) as a constant
  state_stats_gradient,  // the states' mean as a constant
  maximum_gradient,      // max M as a constant
  tie_gradient,          // the gradient of max M to one of several maxima alone
  transposed_edges,      // A^T H
  biased_variance,       // no Bessel correction in what is returned
};

// Where rounding could turn a comparison the reference decides: a ReLU's sign, or which position has the maximum.
struct Closest {
  bool state_sign = false, maximum = false;
};

// Outputs and all gradients in type R (double: the reference; float: what the literal equations lose in that type).
// With `closest`, grad_out is set to 0 where the pre-activation is too close to 0 to know its sign in float.
template <class R>
Tensors middle_reference(const Case& c, Tensors& inputs, Closest* closest = nullptr, Fault fault = Fault::none);
template <class R>
Tensors sample_reference(const Case& c, Tensors& inputs, Closest* closest = nullptr, Fault fault = Fault::none);
template <class R>
Tensors reason_reference(const Case& c, Tensors& inputs, Closest* closest = nullptr, Fault fault = Fault::none);
template <class R>
Tensors modulate_reference(const Case& c, Tensors& inputs, Closest* closest = nullptr, Fault fault = Fault::none);
// relu(norm(y) + norm(shortcut)); gradients where the statistics are the batch's.
template <class R>
Tensors norm_relu_reference(const Case& c, Tensors& inputs, Closest* closest = nullptr, Fault fault = Fault::none);

}  // namespace vcr_test
