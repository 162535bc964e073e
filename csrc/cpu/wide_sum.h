// Sums in about twice the precision of what is added up: floats in double, doubles together with what rounding took away. A batch mean
// must be right on its own scale, which may be far below that of the values.
#pragma once
#include "simd.h"

namespace vcr {
namespace {

// sum + error; of floats the error is 0.
struct Total {
  double sum = 0, error = 0;
};

// sum + x, and what rounding took from it (Knuth).
template <class V>
VCR_INLINE void add_exactly(V& sum, V& error, V x) {
  const V before = sum;
  sum = before + x;
  const V taken = sum - before;
  error += (before - (sum - taken)) + (x - taken);
}
template <class A>
VCR_INLINE void add(Total& to, Total x) {
  if constexpr (sizeof(A) == 4) {
    to.sum += x.sum;
  } else {
    add_exactly(to.sum, to.error, x.sum);
    to.error += x.error;
  }
}
// total / count - from: keeps its digits where the two are nearly the same. For floats count * from is exact.
template <class A>
VCR_INLINE double mean_less(Total total, double count, double from) {
  if constexpr (sizeof(A) == 4)
    return (total.sum - count * from) / count;
  else
    return (__builtin_fma(-count, from, total.sum) + total.error) / count;
}

// Floats to and from doubles, half a vector at a time. The compiler's own conversion of half a vector goes through memory.
#if defined(__AVX512F__)
VCR_INLINE vec<double> widen_half(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
template <bool upper>
VCR_INLINE vec<double> widen_half(vec<float> x) {
  return _mm512_cvtps_pd(upper ? _mm512_extractf32x8_ps(x, 1) : _mm512_castps512_ps256(x));
}
VCR_INLINE vec<float> narrow_halves(vec<double> low, vec<double> high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}
#elif defined(__AVX2__)
VCR_INLINE vec<double> widen_half(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
template <bool upper>
VCR_INLINE vec<double> widen_half(vec<float> x) {
  return _mm256_cvtps_pd(upper ? _mm256_extractf128_ps(x, 1) : _mm256_castps256_ps128(x));
}
VCR_INLINE vec<float> narrow_halves(vec<double> low, vec<double> high) {
  return _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low));
}
#elif defined(__aarch64__)
VCR_INLINE vec<double> widen_half(const float* from) { return vcvt_f64_f32(vld1_f32(from)); }
template <bool upper>
VCR_INLINE vec<double> widen_half(vec<float> x) {
  return upper ? vcvt_high_f64_f32(x) : vcvt_f64_f32(vget_low_f32(x));
}
VCR_INLINE vec<float> narrow_halves(vec<double> low, vec<double> high) { return vcvt_high_f32_f64(vcvt_f32_f64(low), high); }
#else
typedef float half_floats __attribute__((vector_size(VCR_VECTOR_BYTES / 2)));
VCR_INLINE vec<double> widen_half(const float* from) {
  half_floats x;
  __builtin_memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, vec<double>);
}
template <int first, int... I>
VCR_INLINE vec<double> widen_half_impl(vec<float> x, std::integer_sequence<int, I...>) {
  return __builtin_convertvector(half_floats(__builtin_shufflevector(x, x, (first + I)...)), vec<double>);
}
// The lower or the upper half of x.
template <bool upper>
VCR_INLINE vec<double> widen_half(vec<float> x) {
  constexpr int half = lanes<float> / 2;
  return widen_half_impl<upper ? half : 0>(x, std::make_integer_sequence<int, half>{});
}
template <int... I>
VCR_INLINE vec<float> narrow_halves_impl(vec<double> low, vec<double> high, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(__builtin_convertvector(low, half_floats), __builtin_convertvector(high, half_floats), I...);
}
VCR_INLINE vec<float> narrow_halves(vec<double> low, vec<double> high) {
  return narrow_halves_impl(low, high, std::make_integer_sequence<int, lanes<float> >{});
}
#endif

// A vector of numbers in doubles: float lanes are two vectors, double lanes one.
template <class A>
struct Wide;
template <>
struct Wide<float> {
  static constexpr int count = 2;
  vec<double> part[2];
};
template <>
struct Wide<double> {
  static constexpr int count = 1;
  vec<double> part[1];
};
template <class A>
VCR_INLINE Wide<A> widen_lanes(vec<A> x) {
  if constexpr (sizeof(A) == 4)
    return {{widen_half<false>(x), widen_half<true>(x)}};
  else
    return {{x}};
}
template <class A>
VCR_INLINE vec<A> narrow_lanes(const Wide<A>& x) {
  if constexpr (sizeof(A) == 4)
    return narrow_halves(x.part[0], x.part[1]);
  else
    return x.part[0];
}

// A sum in each lane.
template <class A>
struct WideSum {
  Wide<A> sum = {};
  vec<double> error = {};  // unused for floats

  __attribute__((always_inline)) void add(const Wide<A>& x) {
    if constexpr (sizeof(A) == 4) {
      sum.part[0] += x.part[0];
      sum.part[1] += x.part[1];
    } else {
      add_exactly(sum.part[0], error, x.part[0]);
    }
  }
  __attribute__((always_inline)) void add(vec<A> x) { add(widen_lanes<A>(x)); }
  __attribute__((always_inline)) void add(const WideSum& x) {
    add(x.sum);
    if constexpr (sizeof(A) == 8) error += x.error;
  }
  // All lanes together.
  __attribute__((always_inline)) Total total() const {
    if constexpr (sizeof(A) == 4) return {hsum<double>(sum.part[0] + sum.part[1]), 0};
    Total out;
    for (int i = 0; i < lanes<double>; ++i) vcr::add<double>(out, {sum.part[0][i], error[i]});
    return out;
  }
};
// How many numbers of this type add up in their accumulation type as they would in twice its precision: numbers of 8 bits within 2^13 of
// each other do so exactly in 24 bits, and from smaller ones a few bits of theirs go.
template <class T>
inline constexpr int sums_exactly = sizeof(T) == 2 ? 8 : 1;
// value(0) + ... + value(count - 1), as a tree.
template <int count, int first = 0, class F>
VCR_INLINE auto sum_of(F value) {
  if constexpr (count == 1)
    return value(std::integral_constant<int, first>{});
  else
    return sum_of<count / 2, first>(value) + sum_of<count - count / 2, first + count / 2>(value);
}
template <class A, class T>
VCR_INLINE Wide<A> load_wide(const T* from) {
  if constexpr (sizeof(T) == 4)
    return {{widen_half(from), widen_half(from + lanes<double>)}};  // spares a shuffle
  else
    return widen_lanes<A>(load(from));
}

}  // namespace
}  // namespace vcr
