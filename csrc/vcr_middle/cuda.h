// The CUDA kernels of vcr_middle as a binding calls them. Needs neither CUDA's headers nor torch's.
#pragma once
#include "../cuda/status.h"
#include "args.h"

namespace vcr::cuda {

// All pointers are memory of the current device; `pool` and `clock` are not used.
// `saved` is needed where options.save is set, and may be null elsewhere. Gradients that nobody wants are null.
template <class T>
int64_t middle_forward_workspace(const MiddleForward<T>& f);  // bytes; a workspace is aligned to 256
template <class T>
Status middle_forward(const MiddleForward<T>& f, void* workspace, void* stream);  // a cudaStream_t
template <class T>
int64_t middle_backward_workspace(const MiddleBackward<T>& b);
template <class T>
Status middle_backward(const MiddleBackward<T>& b, void* workspace, void* stream);

}  // namespace vcr::cuda
