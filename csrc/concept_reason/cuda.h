// The CUDA kernels of concept_reason as a binding calls them. Needs neither CUDA's headers nor torch's.
#pragma once
#include "../cuda/status.h"
#include "args.h"

namespace vcr::cuda {

// All pointers are memory of the current device; `pool` and `clock` are not used.
// A is float or double. Where `batch` is not set, mean and var are read. dweight and dbias may be null.
template <class A>
int64_t reason_forward_workspace(const ReasonForward<A>& f);  // bytes; a workspace is aligned to 256
template <class A>
Status reason_forward(const ReasonForward<A>& f, void* workspace, void* stream);  // a cudaStream_t
template <class A>
int64_t reason_backward_workspace(const ReasonBackward<A>& b);
template <class A>
Status reason_backward(const ReasonBackward<A>& b, void* workspace, void* stream);

}  // namespace vcr::cuda
