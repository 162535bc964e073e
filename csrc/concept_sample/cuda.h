// The CUDA kernels of concept_sample as a binding calls them. Needs neither CUDA's headers nor torch's.
#pragma once
#include "../cuda/status.h"
#include "args.h"

namespace vcr::cuda {

// All pointers are memory of the current device; `pool` and `clock` are not used.
// `saved` (sample_saved_size(problem, true)) is needed where `save` is set, and may be null elsewhere.
template <class T>
int64_t sample_forward_workspace(const SampleForward<T>& f);  // bytes; a workspace is aligned to 256
template <class T>
Status sample_forward(const SampleForward<T>& f, void* workspace, void* stream);  // a cudaStream_t
template <class T>
int64_t sample_backward_workspace(const SampleBackward<T>& b);
template <class T>
Status sample_backward(const SampleBackward<T>& b, void* workspace, void* stream);

}  // namespace vcr::cuda
