// What kernel bodies share. A body is a template over its Thread, which is all it may ask of the machine: see device.cuh (a GPU's) and
// tests/kernels/cuda/simt.h (fibers on the host). Multiply-adds are spelled out and no compiler may contract others, so that both
// directions of an op find the same bits.
#pragma once
#include "../common/dtypes.h"
#include "../common/problem.h"
#include "../common/variants.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define VCR_DEVICE __device__ __forceinline__
#define VCR_BOTH __host__ __device__ __forceinline__
#define VCR_UNROLL _Pragma("unroll")
#else
#include <cmath>
#include <cstring>
#define VCR_DEVICE inline
#define VCR_BOTH inline
#define VCR_UNROLL
#endif

namespace vcr::cuda {

constexpr int warp_size = 32;

// ---- numbers

VCR_DEVICE float widen(float x) { return x; }
VCR_DEVICE double widen(double x) { return x; }
VCR_DEVICE float widen(bf16 x) {
#if defined(__CUDACC__)
  return __uint_as_float(uint32_t(x.bits) << 16);
#else
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}
VCR_DEVICE float widen(f16 x) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(x.bits));
#else
  _Float16 f;
  std::memcpy(&f, &x.bits, 2);
  return float(f);
#endif
}

template <class T>
struct Narrow {
  static VCR_DEVICE T from(T x) { return x; }
};
template <>
struct Narrow<bf16> {
  static VCR_DEVICE bf16 from(float x) {
#if defined(__CUDACC__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {uint16_t(bits >> 16 | 0x40)};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
#endif
  }
};
template <>
struct Narrow<f16> {
  static VCR_DEVICE f16 from(float x) {
#if defined(__CUDACC__)
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const _Float16 f = _Float16(x);
    f16 out;
    std::memcpy(&out.bits, &f, 2);
    return out;
#endif
  }
};
template <class T>
VCR_DEVICE T narrow(acc_t<T> x) {
  return Narrow<T>::from(x);
}

#if defined(__CUDACC__)
VCR_DEVICE float multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
VCR_DEVICE double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }
VCR_DEVICE float exponential(float x) { return ::expf(x); }
VCR_DEVICE double exponential(double x) { return ::exp(x); }
VCR_DEVICE float tangent(float x) { return ::tanhf(x); }
VCR_DEVICE double tangent(double x) { return ::tanh(x); }
VCR_DEVICE float square_root(float x) { return ::sqrtf(x); }
VCR_DEVICE double square_root(double x) { return ::sqrt(x); }
#else
template <class A>
A multiply_add(A a, A b, A c) {
  return std::fma(a, b, c);
}
template <class A>
A exponential(A x) {
  return std::exp(x);
}
template <class A>
A tangent(A x) {
  return std::tanh(x);
}
template <class A>
A square_root(A x) {
  return std::sqrt(x);
}
#endif
template <class A>
VCR_DEVICE A infinity() {
  return A(__builtin_huge_val());
}
template <class A>
VCR_DEVICE A relu(A x) {
  return x < 0 ? A(0) : x;  // keeps NaN
}
VCR_BOTH int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
VCR_BOTH int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
VCR_BOTH int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Parameters that a variant lacks are null, and stay so.
template <class A>
VCR_DEVICE A* offset(A* base, int64_t count) {
  return base == nullptr ? nullptr : base + count;
}
template <class A>
VCR_DEVICE A value_or(const A* base, int64_t at, A other) {
  return base == nullptr ? other : base[at];
}

// A sum of floats in double; of doubles together with what rounding took (Knuth). A mean must be right on its own scale, which may be far
// below that of the values.
template <class A>
struct WideSum {
  double sum = 0, lost = 0;
  VCR_DEVICE void add(A x) {
    if constexpr (sizeof(A) == 4) {
      sum += double(x);
    } else {
      const double before = sum;
      sum = before + x;
      const double taken = sum - before;
      lost += (before - (sum - taken)) + (x - taken);
    }
  }
  VCR_DEVICE void add(const WideSum& other) {
    if constexpr (sizeof(A) == 4)
      sum += other.sum;
    else
      add(other.sum), lost += other.lost;
  }
  VCR_DEVICE double less(double count, double from) const {  // the sum over `count` less count * from
    return multiply_add(-count, from, sum) + lost;
  }
};

// A parameter's type that another argument decides.
template <class X>
struct Given {
  using type = X;
};
template <class X>
using given = typename Given<X>::type;

// ---- work among threads

struct Sum {
  template <class V>
  VCR_DEVICE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Merge {
  template <class V>
  VCR_DEVICE V operator()(V a, V b) const {
    a.add(b);
    return a;
  }
};
struct Maximum {
  template <class V>
  VCR_DEVICE V operator()(V a, V b) const {
    return b > a ? b : a;
  }
};

// f(i) for i in [0, count), over the block's threads, or its warps. What is counted here is never as large as a map: int is enough, and a
// division of ints is a third of one of int64.
template <class Thread, class F>
VCR_DEVICE void for_threads(Thread& t, int64_t count, F f) {
  for (int i = t.index(), end = int(count); i < end; i += t.count()) f(i);
}
template <class Thread, class F>
VCR_DEVICE void for_warps(Thread& t, int64_t count, F f) {
  for (int i = t.index() / warp_size, end = int(count); i < end; i += t.count() / warp_size) f(i);
}
// The sum, the same in every lane, of f(i) for i in [0, count): lanes first, then a tree.
template <class A, class Thread, class F>
VCR_DEVICE A warp_sum(Thread& t, int64_t count, F f) {
  A x = 0;
  for (int i = t.lane(), end = int(count); i < end; i += warp_size) x += f(i);
  return t.reduce(x, Sum{});
}

// An array in shared memory. On a GPU it is an offset: half a pointer's registers.
template <class X>
struct SharedArray {
#if defined(__CUDA_ARCH__)
  int at;
  VCR_DEVICE X* get() const {
    extern __shared__ __align__(16) char shared_memory[];
    return reinterpret_cast<X*>(shared_memory + at);
  }
#else
  X* at;
  VCR_BOTH X* get() const { return at; }
#endif
  VCR_BOTH operator X*() const { return get(); }
};
// Cuts shared memory into arrays. With base null it counts.
struct SharedCarver {
  char* base;
  int64_t used = 0;
  template <class X>
  VCR_BOTH SharedArray<X> take(int64_t count) {
    const int64_t at = used;
    used += (count * int64_t(sizeof(X)) + 15) / 16 * 16;
#if defined(__CUDA_ARCH__)
    return {int(at)};
#else
    return {reinterpret_cast<X*>(base + at)};
#endif
  }
};
// Cuts a workspace into arrays. With base null it counts.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class X>
  VCR_BOTH X* take(int64_t count) {
    X* at = reinterpret_cast<X*>(base + used);
    used += (count * int64_t(sizeof(X)) + 15) / 16 * 16;
    return at;
  }
};

}  // namespace vcr::cuda
