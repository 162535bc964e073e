// What is computed with vectors: comparisons, shuffles and sums over lanes, exp and tanh.
#pragma once
#include "load_store.h"

namespace vcr {
namespace {

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
