// Launches kernels on the host. See csrc/vcr_middle/cuda_launch.h for what a runner is.
#pragma once
#include <cstring>

#include "cuda/launch.h"
#include "simt.h"

namespace vcr_test {

struct HostRunner {
  vcr::cuda::Device device;
  simt::Settings settings;
  vcr::cuda::Status status{};

  template <class K>
  void launch(const typename K::Args& args, int cluster = 1) {
    const vcr::cuda::Grid grid = vcr::cuda::grid_of<K>(device, args, cluster);
    simt::launch(grid.blocks, grid.threads, grid.shared, grid.cluster, settings, [&] {
      simt::HostThread thread;
      vcr::cuda::run_units<K>(thread, args, grid.units);
    });
  }
  void zero(void* to, int64_t bytes) {
    if (to != nullptr) std::memset(to, 0, size_t(bytes));
  }
};

}  // namespace vcr_test
