// What the CUDA library asks of PyTorch and says of errors.
#include "cuda.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#ifndef VCR_CUDA_ARCHS
#error "VCR_CUDA_ARCHS names the architectures that this library is built for"
#endif

namespace vcr {

bool is_there(const Tensor& t) { return t.is_cuda(); }

Guard enter(int32_t device) {
  using torch::stable::accelerator::DeviceGuard;
  return {new DeviceGuard(device), [](void* guard) { delete static_cast<DeviceGuard*>(guard); }};
}

// Only PyTorch's CUDA libraries have this function, and this library loads beside a PyTorch without them, too.
void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (get == nullptr) throw std::runtime_error("vcr_ops: this PyTorch is built without CUDA; install one that has it");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

void check(const cuda::Status& status, int32_t device) {
  if (status.ok()) return;
  if (status.too_wide) throw std::runtime_error(too_wide_on(device));
  const std::string name = cuda::error_name(status.error);
  std::string text = "vcr_ops: on cuda:" + std::to_string(device) + ": " + name + ", " + cuda::error_text(status.error);
  if (name == "cudaErrorNoKernelImageForDevice" || name == "cudaErrorInvalidDeviceFunction" || name == "cudaErrorUnsupportedPtxVersion")
    text += "; this library is built for " VCR_CUDA_ARCHS ": build it with this GPU's architecture in TORCH_CUDA_ARCH_LIST";
  throw std::runtime_error(text);
}

}  // namespace vcr
