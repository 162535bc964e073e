// What the CUDA library has beside the ops: convert.h.
#include "convert.cuh"
#include "device.cuh"

namespace vcr::cuda {

Status convert(const Conversion* list, int count, void* stream) {
  DeviceRunner runner(stream, run_kernel<ConvertNumbers>);
  if (!runner.status.ok()) return runner.status;
  return ConvertLaunch(list, count).run(runner);
}
const char* error_name(int error) { return cudaGetErrorName(cudaError_t(error)); }
const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace vcr::cuda
