// Loads and stores of vectors: whole, partial, past the caches; bfloat16 becomes float on the way in and is rounded on the way out.
// `count` is in 1..lanes-1 for the partial ones, the other lanes are 0 and nothing past them is touched.
#pragma once
#include "vectors.h"

namespace vcr {
namespace {

template <class A>
VCR_INLINE vec<A> load(const A* from) {
  vec<A> x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
template <class A>
VCR_INLINE void store(A* to, vec<A> x) {
  __builtin_memcpy(to, &x, sizeof x);
}
VCR_INLINE float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
VCR_INLINE float widen(float x) { return x; }
VCR_INLINE double widen(double x) { return x; }
template <class T>
VCR_INLINE T narrow(acc_t<T> x) {
  if constexpr (sizeof(T) == 2) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return T{uint16_t((bits >> 16) | 0x40u)};
    return T{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else {
    return x;
  }
}
// A vector of two-byte features. Spelled out where the compiler takes several times as many steps.
#if defined(__AVX512F__)
using halves = __m256i;
VCR_INLINE vec<float> widen(halves h) { return (vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16); }
VCR_INLINE halves upper_halves(vec<float> x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x, 16)); }
#elif defined(__AVX2__)
using halves = __m128i;
VCR_INLINE vec<float> widen(halves h) {  // each 128-bit lane picks its own from the same eight
  const __m256i spread = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                          -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return (vec<float>)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(h), spread);
}
VCR_INLINE halves upper_halves(vec<float> x) {
  const __m256i upper = _mm256_set1_epi64x(0x0f0e0b0a07060302);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)x, upper), 0x08));
}
#else
using halves = vector_of<float>::halves;
VCR_INLINE vec<float> widen(halves h) { return (vec<float>)(__builtin_convertvector(h, vector_of<float>::bits) << 16); }
VCR_INLINE halves upper_halves(vec<float> x) { return __builtin_convertvector((vector_of<float>::bits)x >> 16, halves); }
#endif
VCR_INLINE halves narrow(vec<float> x) {
  using bits_t = vector_of<float>::bits;
  const bits_t bits = (bits_t)x;
  const bits_t rounded = bits + (((bits >> 16) & 1u) + 0x7fffu);  // to nearest, ties to even
  return upper_halves(x == x ? (vec<float>)rounded : (vec<float>)(bits | 0x400000u));
}
VCR_INLINE vec<float> load(const bf16* from) {
  halves h;
  __builtin_memcpy(&h, from, sizeof h);
  return widen(h);
}
VCR_INLINE void store(bf16* to, vec<float> x) {
  const halves h = narrow(x);
  __builtin_memcpy(to, &h, sizeof h);
}
// Two adjacent vectors: in halves the rounding is decided for twice as many numbers at a time.
template <class T>
VCR_INLINE void store_two(T* to, vec<acc_t<T>> first, vec<acc_t<T>> second) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    const __m256 unordered = _mm256_cmp_ps(first, second, _CMP_UNORD_Q);
    if (__builtin_expect(_mm256_testz_ps(unordered, unordered), 1)) {
      const __m256i a = (__m256i)first, b = (__m256i)second, low = _mm256_set1_epi32(0xffff);
      const __m256i upper = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
      const __m256i lower = _mm256_packus_epi32(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
      // the carry of lower + 0x7fff + (upper & 1) is the top bit of (lower + that - 1 + 1) / 2
      const __m256i half = _mm256_add_epi16(_mm256_and_si256(upper, _mm256_set1_epi16(1)), _mm256_set1_epi16(0x7ffe));
      const __m256i carry = _mm256_srli_epi16(_mm256_avg_epu16(lower, half), 15);
      _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(_mm256_add_epi16(upper, carry), 0xd8));
      return;
    }
  }
#endif
  store(to, first);
  store(to + lanes<acc_t<T>>, second);
}
#if defined(__AVX2__) && !defined(__AVX512F__)
alignas(64) const int32_t tail_mask_source[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
VCR_INLINE __m256i tail_mask(int count) { return _mm256_loadu_si256((const __m256i*)(tail_mask_source + 8 - count)); }
alignas(32) const int16_t last_half_source[16] = {0, 0, 0, 0, 0, 0, 0, -1};
VCR_INLINE __m128i last_half_mask(int count) { return _mm_loadu_si128((const __m128i*)(last_half_source + 8 - count)); }
#endif
template <class T>
VCR_INLINE vec<acc_t<T>> load_partial(const T* from, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1u), from);
  if constexpr (sizeof(T) == 2) return widen(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1u), from));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_maskload_ps((const float*)from, tail_mask(count));
  if constexpr (sizeof(T) == 2) {  // pairs by a mask, and an odd last one
    const uint16_t* at = (const uint16_t*)from;
    const __m128i pairs = _mm_maskload_epi32((const int*)at, _mm256_castsi256_si128(tail_mask(count / 2)));
    const __m128i last = _mm_and_si128(_mm_set1_epi16(int16_t(at[count - 1])), last_half_mask(count));
    return widen(_mm_or_si128(pairs, last));
  }
#endif
  alignas(VCR_VECTOR_BYTES) acc_t<T> x[lanes<acc_t<T>>] = {};
  for (int i = 0; i < count; ++i) x[i] = widen(from[i]);
  return load(x);
}
template <class T>
VCR_INLINE void store_partial(T* to, vec<acc_t<T>> x, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1u), x);
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1u), narrow(x));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {  // a masked store is microcoded on some AMD cores
    float* at = (float*)to;
    __m128 rest = _mm256_castps256_ps128(x);
    if (count & 4) {
      _mm_storeu_ps(at, rest);
      rest = _mm256_extractf128_ps(x, 1);
      at += 4;
    }
    if (count & 2) {
      _mm_storel_pi((__m64*)at, rest);
      rest = _mm_movehl_ps(rest, rest);
      at += 2;
    }
    if (count & 1) _mm_store_ss(at, rest);
    return;
  }
  if constexpr (sizeof(T) == 2) {
    uint16_t* at = (uint16_t*)to;
    __m128i rest = narrow(x);
    if (count & 4) {
      _mm_storel_epi64((__m128i*)at, rest);
      rest = _mm_srli_si128(rest, 8);
      at += 4;
    }
    if (count & 2) {
      _mm_storeu_si32(at, rest);
      rest = _mm_srli_si128(rest, 4);
      at += 2;
    }
    if (count & 1) *at = uint16_t(_mm_extract_epi16(rest, 0));
    return;
  }
#endif
  alignas(VCR_VECTOR_BYTES) acc_t<T> y[lanes<acc_t<T>>];
  store(y, x);
  for (int i = 0; i < count; ++i) to[i] = narrow<T>(y[i]);
}
// Past the caches: spares the read of a line that is about to be overwritten whole. `to` is aligned to a vector.
template <class T>
VCR_INLINE void store_stream(T* to, vec<acc_t<T>> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_stream_ps(to, x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_stream_ps(to, x);
#endif
  store(to, x);
}
VCR_INLINE bool can_stream(const void* to) { return reinterpret_cast<uintptr_t>(to) % VCR_VECTOR_BYTES == 0; }
// Streaming stores are ordered before whatever follows this.
VCR_INLINE void finish_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
// To be called from a loop, not from a lambda: for the compiler that has no effect, and the call is dropped.
VCR_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
VCR_INLINE void prefetch_second_level(const void* p) { __builtin_prefetch(p, 0, 2); }
VCR_INLINE void prefetch_write(const void* p) { __builtin_prefetch(p, 1, 3); }

}  // namespace
}  // namespace vcr
