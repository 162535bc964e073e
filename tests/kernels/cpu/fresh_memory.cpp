// The kernels' own scratch starts as NaN, too: linked with --wrap=aligned_alloc.
#include <cstddef>
#include <cstring>

extern "C" void* __real_aligned_alloc(std::size_t alignment, std::size_t bytes);
extern "C" void* __wrap_aligned_alloc(std::size_t alignment, std::size_t bytes) {
  void* memory = __real_aligned_alloc(alignment, bytes);
  if (memory != nullptr) std::memset(memory, 0xff, bytes);
  return memory;
}
