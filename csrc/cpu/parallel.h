// Work over the caller's thread pool, and memory that a range of work owns.
#pragma once
#include <cstdlib>

#include "../common/problem.h"
#include "simd.h"

namespace vcr {
namespace {

// f(begin, end) over ranges of [0, count). What a unit computes must not depend on the range it came in.
template <class F>
void for_ranges(const Parallel& pool, int64_t count, const F& f) {
  if (count <= 0) return;
  pool.run(
      count, [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}
template <class F>
void for_each(const Parallel& pool, int64_t count, const F& f) {
  for_ranges(pool, count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Memory aligned for vectors, freed with its owner. Out of memory ends the process: no error can cross the thread pool.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(A) + 127) / 64 * 64;
    data_ = static_cast<A*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) std::abort();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() const { return data_; }

 private:
  A* data_;
};

// Parameters that a variant lacks are null, and stay so.
template <class A>
VCR_INLINE A* offset(A* base, int64_t count) {
  return base == nullptr ? nullptr : base + count;
}
template <class A>
VCR_INLINE void fill_zero(A* to, int64_t count) {
  if (to == nullptr) return;
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
}
VCR_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
VCR_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
VCR_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
// Elements from one row of scratch to the next: an odd number of 64-byte lines, so that a column doesn't fall into one cache set.
VCR_INLINE int64_t padded_row(int64_t count) { return ((count + 15) / 16 | 1) * 16; }

}  // namespace
}  // namespace vcr
