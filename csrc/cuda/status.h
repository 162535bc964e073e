// What a launcher returns.
#pragma once
#include <cstdint>

namespace vcr::cuda {

struct Status {
  int error = 0;          // a cudaError_t; 0: everything was launched
  bool too_wide = false;  // a concept has too many channels for the device's shared memory; nothing was launched
  bool ok() const { return error == 0 && !too_wide; }
};

}  // namespace vcr::cuda
