// Vectors as wide as this instruction-set level has them. Compiled once per level, so everything is in an anonymous namespace:
// the linker must never merge two levels' copies of a function.
//
// Multiply-adds are spelled fma() and contraction is off: the same expression then gives the same bits wherever it is inlined,
// which the backward pass relies on when it recomputes the forward's ReLU mask and softmax.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "../common/dtypes.h"

#if defined(VCR_VECTOR_BYTES)  // given by the tests' build: a width that the machine lacks, in the compiler's generic vectors
#elif defined(__AVX512F__)
#define VCR_VECTOR_BYTES 64
#include <immintrin.h>
#elif defined(__AVX2__)
#define VCR_VECTOR_BYTES 32
#include <immintrin.h>
#elif defined(__aarch64__)
#define VCR_VECTOR_BYTES 16
#include <arm_neon.h>
#else
#define VCR_VECTOR_BYTES 16
#endif

#define VCR_INLINE static inline __attribute__((always_inline))
// A loop over a map's tile or rows: all that it calls is inlined, lambdas too, however large the file that it is compiled in.
#if defined(VCR_CALLS)  // given by the tests' build: calls are left, where code that compiles sooner may be slow
#define VCR_KERNEL __attribute__((noinline))
#else
#define VCR_KERNEL __attribute__((noinline, flatten))
#endif

namespace vcr {
namespace {

template <class A>
struct vector_of;
template <>
struct vector_of<float> {
  typedef float type __attribute__((vector_size(VCR_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(VCR_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(VCR_VECTOR_BYTES)));
  typedef uint16_t halves __attribute__((vector_size(VCR_VECTOR_BYTES / 2)));
};
template <>
struct vector_of<double> {
  typedef double type __attribute__((vector_size(VCR_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(VCR_VECTOR_BYTES)));
};
template <class A>
using vec = typename vector_of<A>::type;
template <class A>
using mask_t = typename vector_of<A>::mask;
template <class A>
inline constexpr int lanes = VCR_VECTOR_BYTES / int(sizeof(A));

template <class A, int... I>
VCR_INLINE vec<A> splat_impl(A x, std::integer_sequence<int, I...>) {
  return vec<A>{(static_cast<void>(I), x)...};  // one broadcast; 0 + x would be an addition
}
template <class A>
VCR_INLINE vec<A> splat(A x) {
  return splat_impl<A>(x, std::make_integer_sequence<int, lanes<A>>{});
}
template <class A>
VCR_INLINE vec<A> zeros() {
  return vec<A>{};
}

// a * b + c
VCR_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
VCR_INLINE double fma(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
VCR_INLINE vec<float> fma(vec<float> a, vec<float> b, vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
VCR_INLINE vec<double> fma(vec<double> a, vec<double> b, vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

}  // namespace
}  // namespace vcr
