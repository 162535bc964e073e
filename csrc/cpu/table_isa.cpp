// Compiled once per instruction-set level and feature type (VCR_LEVEL, VCR_DTYPE); exports one symbol, the table. Everything else
// here is in anonymous namespaces, so the linker can't give one level's code to another.
#include "../concept_modulate/cpu_op.h"
#include "../concept_reason/cpu_op.h"
#include "../concept_sample/cpu_op_backward.h"
#include "../norm_relu/cpu_backward.h"
#include "../vcr_middle/cpu_backward.h"
#include "../vcr_middle/cpu_forward.h"
#include "../vcr_middle/cpu_stats.h"
#include "table.h"

namespace vcr {
namespace {

using T = VCR_DTYPE;

// The paper's widths are compiled in; any other takes the general kernels.
template <template <class, int, int> class Kernel, class Args>
void run(const Args& args) {
  const int64_t p = args.problem.p, pt = args.problem.pt;
  if constexpr (sizeof(acc_t<T>) == 4) {
    if (p == 4 && pt == 4) return Kernel<T, 4, 4>(args).run();
    if (p == 8 && pt == 4) return Kernel<T, 8, 4>(args).run();
    if (p == 16 && pt == 4) return Kernel<T, 16, 4>(args).run();
    if (p == 32 && pt == 8) return Kernel<T, 32, 8>(args).run();
  }
  Kernel<T, 0, 0>(args).run();
}

// The stages alone take the general kernels for every width: a third of the build for ops that the fused middle replaces.
template <template <class, int, int> class Kernel, class Args>
void run_general(const Args& args) {
  Kernel<T, 0, 0>(args).run();
}

}  // namespace

#define VCR_JOIN_(a, b, c) a##_##b##_##c
#define VCR_JOIN(a, b, c) VCR_JOIN_(a, b, c)
extern const Kernels<T> VCR_JOIN(kernels, VCR_LEVEL, VCR_DTYPE);
const Kernels<T> VCR_JOIN(kernels, VCR_LEVEL, VCR_DTYPE) = {
    run<MiddleForwardCpu, MiddleForward<T>>,
    run<MiddleBackwardCpu, MiddleBackward<T>>,
    channel_moments<T>,
    run_general<SampleForwardCpu, SampleForward<T>>,
    run_general<SampleBackwardCpu, SampleBackward<T>>,
    run_general<ModulateForwardCpu, ModulateForward<T>>,
    run_general<ModulateBackwardCpu, ModulateBackward<T>>,
    reason_forward<acc_t<T>>,
    reason_backward<acc_t<T>>,
    norm_relu<T>,
    norm_relu_backward<T>,
};

}  // namespace vcr
