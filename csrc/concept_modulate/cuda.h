// The CUDA kernels of concept_modulate as a binding calls them. Needs neither CUDA's headers nor torch's.
#pragma once
#include "../cuda/status.h"
#include "args.h"

namespace vcr::cuda {

// All pointers are memory of the current device; `pool` and `clock` are not used.
template <class T>
int64_t modulate_forward_workspace(const ModulateForward<T>& f);  // bytes; a workspace is aligned to 256
template <class T>
Status modulate_forward(const ModulateForward<T>& f, void* workspace, void* stream);  // a cudaStream_t
template <class T>
int64_t modulate_backward_workspace(const ModulateBackward<T>& b);
template <class T>
Status modulate_backward(const ModulateBackward<T>& b, void* workspace, void* stream);

}  // namespace vcr::cuda
