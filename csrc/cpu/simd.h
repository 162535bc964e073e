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
#define VCR_KERNEL __attribute__((noinline, flatten))

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

// ---- loads and stores; `count` in 1..lanes-1 for the partial ones, the other lanes are 0 and nothing past them is touched

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

// All lanes below `count` as they are, the others 0.
template <class A>
VCR_INLINE vec<A> keep_first(vec<A> x, int count) {
  mask_t<A> index;
  for (int i = 0; i < lanes<A>; ++i) index[i] = i;
  return index < decltype(index[0] + 0)(count) ? x : zeros<A>();
}

// max and relu keep NaN: a comparison with NaN is false.
template <class A>
VCR_INLINE vec<A> maximum(vec<A> a, vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_max_ps(b, a);  // the second operand where either is NaN
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return _mm256_max_ps(b, a);
#endif
  return a < b ? b : a;
}
template <class A>
VCR_INLINE vec<A> relu(vec<A> x) {
#if defined(__AVX512F__)
  // max returns its second operand when either is NaN
  if constexpr (sizeof(A) == 4) return _mm512_max_ps(_mm512_setzero_ps(), x);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return _mm256_max_ps(_mm256_setzero_ps(), x);
#endif
  return x < zeros<A>() ? zeros<A>() : x;
}
// `x` where ReLU's gradient passes: wherever `pre` is not <= 0, so NaN passes as in PyTorch.
template <class A>
VCR_INLINE vec<A> where_active(vec<A> pre, vec<A> x) {
  return pre <= zeros<A>() ? zeros<A>() : x;
}

// Whether a > b in any lane; NaN is never greater.
template <class A>
VCR_INLINE bool any_greater(vec<A> a, vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#endif
  const mask_t<A> greater = a > b;
  auto any = greater[0];
  for (int i = 1; i < lanes<A>; ++i) any |= greater[i];
  return any != 0;
}

// ---- shuffles

template <int... I, class V>
VCR_INLINE V shuffle(std::integer_sequence<int, I...>, V a, V b) {
  return __builtin_shufflevector(a, b, I...);
}
template <class A, int shift, int... I>
VCR_INLINE vec<A> rotate_impl(vec<A> x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, ((I + shift) % lanes<A>)...);
}
template <class A, int shift>
VCR_INLINE vec<A> rotate(vec<A> x) {
  return rotate_impl<A, shift>(x, std::make_integer_sequence<int, lanes<A>>{});
}
template <class A, int step = lanes<A> / 2>
VCR_INLINE A hsum(vec<A> x) {
  if constexpr (step == 0)
    return x[0];
  else
    return hsum<A, step / 2>(x + rotate<A, step>(x));
}
template <class A, int step = lanes<A> / 2>
VCR_INLINE A hmax(vec<A> x) {
  if constexpr (step == 0)
    return x[0];
  else
    return hmax<A, step / 2>(maximum<A>(x, rotate<A, step>(x)));
}

// Which source lane the kinds of pairwise shuffle take, in terms of 128-bit lanes of four floats.
template <int kind, int W>
constexpr int pair_index(int i) {
  const int lane = i / 4, k = i % 4;
  switch (kind) {
    case 0: return 4 * lane + k / 2 + (k % 2) * W;                          // low halves, interleaved by element
    case 1: return 4 * lane + 2 + k / 2 + (k % 2) * W;                      // high halves, likewise
    case 2: return 4 * lane + k % 2 + (k / 2) * W;                          // low pairs
    case 3: return 4 * lane + 2 + k % 2 + (k / 2) * W;                      // high pairs
    case 4: return (i < W / 2 ? 0 : W) + 4 * (2 * lane % (W / 4)) + k;      // even 128-bit lanes of a, then of b
    case 5: return (i < W / 2 ? 0 : W) + 4 * (2 * lane % (W / 4) + 1) + k;  // odd ones
    case 6: return (lane % 2 * W) + 4 * (lane / 2 * 2) + k;                 // even 128-bit lanes, a's and b's in turn
    default: return (lane % 2 * W) + 4 * (lane / 2 * 2 + 1) + k;            // odd ones
  }
}
template <int kind, int... I>
VCR_INLINE vec<float> pair_impl(vec<float> a, vec<float> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, pair_index<kind, lanes<float>>(I)...);
}
template <int kind>
VCR_INLINE vec<float> pair(vec<float> a, vec<float> b) {
  return pair_impl<kind>(a, b, std::make_integer_sequence<int, lanes<float>>{});
}

// Lane 4 l + i of the result is the sum of the four lanes 4 l .. 4 l + 3 of rows[i]: four rows, summed within 128-bit lanes.
VCR_INLINE vec<float> sum_within_quads(const vec<float>* rows) {
  const vec<float> x = pair<0>(rows[0], rows[1]) + pair<1>(rows[0], rows[1]);
  const vec<float> y = pair<0>(rows[2], rows[3]) + pair<1>(rows[2], rows[3]);
  return pair<2>(x, y) + pair<3>(x, y);
}
template <int bit, int... I>
VCR_INLINE vec<float> exchange_impl(vec<float> x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I ^ bit)...);
}
// Lane i gets lane i ^ bit.
template <int bit>
VCR_INLINE vec<float> exchange(vec<float> x) {
  return exchange_impl<bit>(x, std::make_integer_sequence<int, lanes<float>>{});
}
template <int k, int... I>
VCR_INLINE vec<float> broadcast_in_quads_impl(vec<float> x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I / 4 * 4 + k)...);
}
// Lane k of each 128-bit lane, in all four of it.
template <int k>
VCR_INLINE vec<float> broadcast_in_quads(vec<float> x) {
  return broadcast_in_quads_impl<k>(x, std::make_integer_sequence<int, lanes<float>>{});
}

// The same of doubles, for sums over lanes: even and odd lanes, then even and odd pairs, then even and odd fours of a, b in turn.
template <int kind, int W>
constexpr int double_index(int i) {
  constexpr int size = 1 << (kind / 2);  // of what is taken whole
  const int from = i / size % 2, group = i / (2 * size), k = i % size;
  return from * W + (2 * group + kind % 2) * size + k;
}
template <int kind, int... I>
VCR_INLINE vec<double> pair_doubles_impl(vec<double> a, vec<double> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, double_index<kind, lanes<double>>(I)...);
}
template <int kind>
VCR_INLINE vec<double> pair_doubles(vec<double> a, vec<double> b) {
  return pair_doubles_impl<kind>(a, b, std::make_integer_sequence<int, lanes<double>>{});
}

// Lane i of the result is the sum of rows[i]; lanes<A> rows.
template <class A>
VCR_INLINE vec<A> sum_rows(const vec<A>* rows) {
  constexpr int W = lanes<A>;
  if constexpr (sizeof(A) == 8) {
    vec<A> half[W / 2];
    for (int i = 0; i < W / 2; ++i) half[i] = pair_doubles<0>(rows[2 * i], rows[2 * i + 1]) + pair_doubles<1>(rows[2 * i], rows[2 * i + 1]);
    if constexpr (W == 2) {
      return half[0];
    } else if constexpr (W == 4) {
      return pair_doubles<2>(half[0], half[1]) + pair_doubles<3>(half[0], half[1]);
    } else {
      const vec<A> x = pair_doubles<2>(half[0], half[1]) + pair_doubles<3>(half[0], half[1]);
      const vec<A> y = pair_doubles<2>(half[2], half[3]) + pair_doubles<3>(half[2], half[3]);
      return pair_doubles<4>(x, y) + pair_doubles<5>(x, y);
    }
  } else {
    vec<A> half[W / 2], quarter[W / 4];
    for (int i = 0; i < W / 2; ++i) half[i] = pair<0>(rows[2 * i], rows[2 * i + 1]) + pair<1>(rows[2 * i], rows[2 * i + 1]);
    for (int i = 0; i < W / 4; ++i) quarter[i] = pair<2>(half[2 * i], half[2 * i + 1]) + pair<3>(half[2 * i], half[2 * i + 1]);
    if constexpr (W == 4) {
      return quarter[0];
    } else if constexpr (W == 8) {
      return pair<4>(quarter[0], quarter[1]) + pair<5>(quarter[0], quarter[1]);
    } else {
      const vec<A> x = pair<4>(quarter[0], quarter[1]) + pair<5>(quarter[0], quarter[1]);
      const vec<A> y = pair<4>(quarter[2], quarter[3]) + pair<5>(quarter[2], quarter[3]);
      return pair<4>(x, y) + pair<5>(x, y);
    }
  }
}

// Lane G l + i of the result is the sum of the lanes G l .. G l + G - 1 of rows[i]; G rows.
template <int G>
VCR_INLINE vec<float> sum_within(const vec<float>* rows) {
  if constexpr (G == 4) {
    return sum_within_quads(rows);
  } else if constexpr (G == lanes<float>) {
    return sum_rows<float>(rows);
  } else {
    static_assert(G == 8);
    const vec<float> x = sum_within_quads(rows), y = sum_within_quads(rows + 4);
    return pair<6>(x, y) + pair<7>(x, y);
  }
}
template <int G, int k, int... I>
VCR_INLINE vec<float> broadcast_within_impl(vec<float> x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I / G * G + k)...);
}
// Lane k of each G lanes, in all of them.
template <int G, int k>
VCR_INLINE vec<float> broadcast_within(vec<float> x) {
  return broadcast_within_impl<G, k>(x, std::make_integer_sequence<int, lanes<float>>{});
}

// rows[i][j] <-> rows[j][i], lanes<float> rows.
VCR_INLINE void transpose(vec<float>* rows) {
  constexpr int W = lanes<float>, G = W / 4;
  vec<float> t[W];
  for (int g = 0; g < G; ++g) {  // 4 x 4 within each 128-bit lane
    const vec<float> a = pair<0>(rows[4 * g], rows[4 * g + 2]), b = pair<1>(rows[4 * g], rows[4 * g + 2]);
    const vec<float> c = pair<0>(rows[4 * g + 1], rows[4 * g + 3]), d = pair<1>(rows[4 * g + 1], rows[4 * g + 3]);
    t[4 * g] = pair<0>(a, c);
    t[4 * g + 1] = pair<1>(a, c);
    t[4 * g + 2] = pair<0>(b, d);
    t[4 * g + 3] = pair<1>(b, d);
  }
  for (int k = 0; k < 4; ++k) {  // then whole lanes among the G groups
    if constexpr (G == 1) {
      rows[k] = t[k];
    } else if constexpr (G == 2) {
      rows[k] = pair<4>(t[k], t[4 + k]);
      rows[4 + k] = pair<5>(t[k], t[4 + k]);
    } else {
      const vec<float> a = pair<4>(t[k], t[4 + k]), b = pair<5>(t[k], t[4 + k]);
      const vec<float> c = pair<4>(t[8 + k], t[12 + k]), d = pair<5>(t[8 + k], t[12 + k]);
      rows[k] = pair<4>(a, c);
      rows[8 + k] = pair<5>(a, c);
      rows[4 + k] = pair<4>(b, d);
      rows[12 + k] = pair<5>(b, d);
    }
  }
}

// ---- exp(x) for x <= 0 and tanh(x); NaN stays NaN

VCR_INLINE vec<float> exp_nonpositive(vec<float> x) {
  using bits_t = vector_of<float>::bits;
  const vec<float> lowest = splat(-87.3f);  // below, exp(x) is subnormal: 0, whatever comes out of the rest
  // 1.5 * 2^23 + 127: adding it rounds to an integer n, and n + 127, the exponent of 2^n, stands in the low bits
  const vec<float> magic = splat(12583039.f);
  const vec<float> shifted = fma(x, splat(1.44269504088896341f), magic);
  const vec<float> n = shifted - magic;
  vec<float> f = fma(n, splat(-0.693359375f), x);
  f = fma(n, splat(2.12194440e-4f), f);
  vec<float> q = splat(1.9875691500e-4f);
  q = fma(q, f, splat(1.3981999507e-3f));
  q = fma(q, f, splat(8.3334519073e-3f));
  q = fma(q, f, splat(4.1665795894e-2f));
  q = fma(q, f, splat(1.6666665459e-1f));
  q = fma(q, f, splat(5.0000001201e-1f));
  q = fma(q, f * f, f + 1.f);
  const vec<float> result = q * (vec<float>)((bits_t)shifted << 23);
  return x < lowest ? zeros<float>() : result;
}
VCR_INLINE vec<double> exp_nonpositive(vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
// 2^x for x < 127, with fewer steps than exp; the relative error is below 2e-7. Below 2^-126: 0. NaN stays NaN.
VCR_INLINE vec<float> power_of_two(vec<float> x) {
  using bits_t = vector_of<float>::bits;
  const vec<float> y = maximum<float>(x, splat(-127.f));  // whose exponent is that of 0
  const vec<float> magic = splat(12583039.f);             // see exp_nonpositive
  const vec<float> shifted = y + magic;
  const vec<float> f = y - (shifted - magic);
  vec<float> q = splat(1.3264727e-3f);  // the polynomial with the smallest relative error that is 1 at 0
  q = fma(q, f, splat(9.6715126e-3f));
  q = fma(q, f, splat(5.5507337e-2f));
  q = fma(q, f, splat(2.4022242e-1f));
  q = fma(q, f, splat(6.9314698e-1f));
  q = fma(q, f, splat(1.f));
  return q * (vec<float>)((bits_t)shifted << 23);
}
VCR_INLINE vec<double> power_of_two(vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}
VCR_INLINE vec<float> tanh(vec<float> x) {
  const vec<float> a = x < zeros<float>() ? -x : x;
  const vec<float> e = exp_nonpositive(a * -2.f);
  vec<float> large = (1.f - e) / (1.f + e);
  large = x < zeros<float>() ? -large : large;
  const vec<float> z = x * x;  // odd polynomial where the quotient would cancel
  vec<float> q = splat(-5.70498872745e-3f);
  q = fma(q, z, splat(2.06390887954e-2f));
  q = fma(q, z, splat(-5.37397155531e-2f));
  q = fma(q, z, splat(1.33314422036e-1f));
  q = fma(q, z, splat(-3.33332819422e-1f));
  const vec<float> small = fma(q * z, x, x);
  return a < splat(0.625f) ? small : large;
}
VCR_INLINE vec<double> tanh(vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}
VCR_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
VCR_INLINE double sqrt(double x) { return __builtin_sqrt(x); }

// ---- four floats, which every level has: the small algebra's states are 4 or 8 wide

typedef float quad __attribute__((vector_size(16)));
VCR_INLINE quad load_quad(const float* from) {
  quad x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
VCR_INLINE void store_quad(float* to, quad x) { __builtin_memcpy(to, &x, sizeof x); }
VCR_INLINE quad splat_quad(float x) { return quad{x, x, x, x}; }
#if VCR_VECTOR_BYTES != 16  // otherwise a quad is a vec<float>, which has its fma
VCR_INLINE quad fma(quad a, quad b, quad c) {
#if defined(__FMA__)
  return _mm_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
#endif
// Lane i of the result is the sum of rows[i].
VCR_INLINE quad sum_quads(const quad* rows) {
  const quad x = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5) + __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const quad y = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5) + __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  return __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
}

template <int... I, class F>
VCR_INLINE void unroll_impl(std::integer_sequence<int, I...>, [[maybe_unused]] F f) {
  (f(std::integral_constant<int, I>{}), ...);
}
// f(0), ..., f(count - 1) with compile-time indices.
template <int count, class F>
VCR_INLINE void unroll(F f) {
  unroll_impl(std::make_integer_sequence<int, count>{}, f);
}

}  // namespace
}  // namespace vcr
