// Launches kernels on the host. See csrc/vcr_middle/cuda_launch.h for what a runner is.
#pragma once
#include <cstring>
#include <typeinfo>
#include <vector>

#include "cuda/launch.h"
#include "simt.h"

namespace vcr_test {

struct HostRunner {
  struct Launched {
    const char* kernel;  // mangled
    vcr::cuda::Grid grid;
  };
  vcr::cuda::Device device;
  simt::Settings settings;
  vcr::cuda::Status status{};
  bool may_refuse = false;  // what is too wide, and `refusal` says so; else the process ends
  vcr::cuda::Status refusal{};
  std::vector<Launched> launched;  // by the last op

  template <class K>
  void launch(const typename K::Args& args, int cluster = 1) {
    launch_grid<K>(args, vcr::cuda::grid_of<K>(device, args, cluster));
  }
  template <class K>
  void launch_together(const typename K::Args& args) {
    launch_grid<K>(args, vcr::cuda::grid_together<K>(device, args));
  }
  void zero(void* to, int64_t bytes) {
    if (to != nullptr) std::memset(to, 0, size_t(bytes));
  }

 private:
  template <class K>
  void launch_grid(const typename K::Args& args, const vcr::cuda::Grid& grid) {
    launched.push_back({typeid(K).name(), grid});
    const auto body = [&] {
      simt::HostThread thread;
      vcr::cuda::run_units<K>(thread, args, grid.units);
    };
    simt::launch(grid.blocks, grid.threads, grid.shared, grid.cluster, settings, body,
                 grid.together ? simt::Grid::together : simt::Grid::apart);
  }
};

}  // namespace vcr_test
