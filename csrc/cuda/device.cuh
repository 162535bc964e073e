// The Thread of a GPU, and what launches kernels there.
#pragma once
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <atomic>

#include "launch.h"

namespace vcr::cuda {

struct DeviceThread {
  VCR_DEVICE int index() const { return int(threadIdx.x); }
  VCR_DEVICE int count() const { return int(blockDim.x); }
  VCR_DEVICE int lane() const { return int(threadIdx.x) % warp_size; }
  VCR_DEVICE int64_t block() const { return int64_t(blockIdx.x); }
  VCR_DEVICE int64_t blocks() const { return int64_t(gridDim.x); }
  VCR_DEVICE char* shared() const {
    extern __shared__ __align__(16) char shared_memory[];
    return shared_memory;
  }
  VCR_DEVICE void sync() const { __syncthreads(); }
  VCR_DEVICE void sync_warp() const { __syncwarp(); }
  VCR_DEVICE void grid_sync() const { cooperative_groups::this_grid().sync(); }
  template <class V>
  VCR_DEVICE V shuffle(V x, int from) const {
    return by_words(x, [from](int word) { return __shfl_sync(0xffffffffu, word, from); });
  }
  template <class V, class Op>
  VCR_DEVICE V reduce(V x, Op op) const {
    VCR_UNROLL
    for (int distance = warp_size / 2; distance > 0; distance /= 2)
      x = op(x, by_words(x, [distance](int word) { return __shfl_xor_sync(0xffffffffu, word, distance); }));
    return x;
  }
  VCR_DEVICE unsigned ballot(bool x) const { return __ballot_sync(0xffffffffu, x); }
#if __CUDA_ARCH__ >= 900
  VCR_DEVICE void cluster_sync() const { cooperative_groups::this_cluster().sync(); }
  template <class X>
  VCR_DEVICE X* peer(X* shared, int rank) const {
    return cooperative_groups::this_cluster().map_shared_rank(shared, unsigned(rank));
  }
#else  // never reached: clusters aren't launched
  VCR_DEVICE void cluster_sync() const { __trap(); }
  template <class X>
  VCR_DEVICE X* peer(X* shared, int) const {
    __trap();
    return shared;
  }
#endif

 private:
  template <class V, class F>
  static VCR_DEVICE V by_words(V x, F f) {
    static_assert(sizeof(V) % 4 == 0, "values go by words");
    int words[sizeof(V) / 4];
    memcpy(words, &x, sizeof x);
    VCR_UNROLL
    for (int i = 0; i < int(sizeof(V) / 4); ++i) words[i] = f(words[i]);
    memcpy(&x, words, sizeof x);
    return x;
  }
};

template <class K>
__global__ void __launch_bounds__(K::threads, K::resident) run_kernel(const __grid_constant__ typename K::Args args, int64_t units) {
  DeviceThread thread;
  run_units<K>(thread, args, units);
}

// Launches on one stream of the current device; after an error nothing more.
struct DeviceRunner {
  Device device;
  Status status;
  cudaStream_t stream;

  // probe: a kernel whose code tells what the library was built for.
  template <class Kernel>
  DeviceRunner(void* stream_, Kernel* probe) : stream(static_cast<cudaStream_t>(stream_)) {
    int current = 0, shared = 0, multiprocessors = 1, major = 0, cooperative = 0, l2 = 0;
    note(cudaGetDevice(&current));
    note(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, current));
    note(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, current));
    note(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current));
    note(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, current));
    note(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, current));
    device.shared = shared;
    device.multiprocessors = multiprocessors;
    device.l2 = cooperative != 0 ? l2 : 0;
    device.clusters = major >= 9 && status.ok() && built_for_clusters(current, probe);
  }
  template <class K>
  void launch(const typename K::Args& args, int cluster = 1) {
    launch_grid<K>(args, grid_of<K>(device, args, cluster));
  }
  template <class K>
  void launch_together(const typename K::Args& args) {
    launch_grid<K>(args, grid_together<K>(device, args));
  }
  void zero(void* to, int64_t bytes) {
    if (status.ok() && to != nullptr && bytes > 0) note(cudaMemsetAsync(to, 0, size_t(bytes), stream));
  }

 private:
  template <class K>
  void launch_grid(const typename K::Args& args, const Grid& grid) {
    if (!status.ok()) return;
    if (grid.shared > 48 << 10) note(cudaFuncSetAttribute(run_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared)));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(grid.blocks));
    config.blockDim = dim3(unsigned(grid.threads));
    config.dynamicSmemBytes = size_t(grid.shared);
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    if (grid.cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = unsigned(grid.cluster), attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    config.attrs = &attribute;
    config.numAttrs = grid.cluster > 1 || grid.together ? 1 : 0;
    if (status.ok()) note(cudaLaunchKernelEx(&config, run_kernel<K>, args, grid.units));
  }
  void note(cudaError_t error) {
    if (error == cudaSuccess) return;
    if (status.error == 0) status.error = int(error);
    cudaGetLastError();  // it is reported by the status, and must not be by the next call
  }
  // Code made from PTX for older GPUs has no clusters, whatever it runs on.
  template <class Kernel>
  bool built_for_clusters(int current, Kernel* probe) {
    constexpr int known = 64;
    static std::atomic<int> answers[known];  // 0: not asked yet, 1: no, 2: yes
    int answer = current < known ? answers[current].load(std::memory_order_relaxed) : 0;
    if (answer == 0) {
      cudaFuncAttributes attributes{};
      note(cudaFuncGetAttributes(&attributes, probe));
      if (!status.ok()) return false;
      answer = attributes.ptxVersion >= 90 ? 2 : 1;
      if (current < known) answers[current].store(answer, std::memory_order_relaxed);
    }
    return answer == 2;
  }
};

}  // namespace vcr::cuda
