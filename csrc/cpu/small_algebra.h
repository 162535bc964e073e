// Products with a concept's (p, pt) matrices, and loops over its p channels. Their numbers are too few to go over positions in lanes: lanes
// hold channels, or a matrix as it lies.
#pragma once
#include "parallel.h"
#include "wide_sum.h"

namespace vcr {
namespace {

// p and pt as constants where they are compiled in (P, PT > 0), as the problem has them otherwise.
template <int P, int PT>
struct Width {
  const int64_t p_, pt_;
  explicit Width(const Problem& pr) : p_(pr.p), pt_(pr.pt) {}
  VCR_INLINE int64_t constant(int fixed, int64_t given) { return fixed > 0 ? fixed : given; }
  __attribute__((always_inline)) int64_t p() const { return constant(P, p_); }
  __attribute__((always_inline)) int64_t pt() const { return constant(PT, pt_); }
};

// ---- loops over channels

template <class A>
struct ByVectors {
  using type = vec<A>;
  static constexpr int width = lanes<A>;
  __attribute__((always_inline)) static type load(const A* from) { return vcr::load(from); }
  __attribute__((always_inline)) static void store(A* to, type x) { vcr::store(to, x); }
  __attribute__((always_inline)) static type splat(A x) { return vcr::splat(x); }
  __attribute__((always_inline)) static A sum(type x) { return hsum<A>(x); }
};
struct ByQuads {
  using type = quad;
  static constexpr int width = 4;
  __attribute__((always_inline)) static type load(const float* from) { return load_quad(from); }
  __attribute__((always_inline)) static void store(float* to, type x) { store_quad(to, x); }
  __attribute__((always_inline)) static type splat(float x) { return splat_quad(x); }
  __attribute__((always_inline)) static float sum(type x) { return (x[0] + x[1]) + (x[2] + x[3]); }
};
template <class A>
struct OneByOne {
  using type = A;
  static constexpr int width = 1;
  __attribute__((always_inline)) static type load(const A* from) { return *from; }
  __attribute__((always_inline)) static void store(A* to, type x) { *to = x; }
  __attribute__((always_inline)) static type splat(A x) { return x; }
  __attribute__((always_inline)) static A sum(type x) { return x; }
};
// The widest of these that P is a multiple of.
template <class A, int P>
using Steps = std::conditional_t<(P > 0 && P % lanes<A> == 0), ByVectors<A>,
                                 std::conditional_t<(P > 0 && P % 4 == 0 && sizeof(A) == 4), ByQuads, OneByOne<A>>>;

// f(j, step) for all channels, `width` at a time. All loads of a step come before its stores, whatever arrays overlap for the compiler.
template <class A, int P, class F>
VCR_INLINE void for_channels(int64_t p_, F f) {
  using Step = Steps<A, P>;
  const int64_t p = P > 0 ? P : p_;
  for (int64_t j = 0; j < p; j += Step::width) f(j, Step{});
}

// sum_j x[j] y[j], in double.
template <class A, int P>
VCR_INLINE double wide_dot(int64_t p, const A* x, const A* y) {
  if constexpr (P > 0 && P % lanes<A> == 0) {
    vec<double> sum = {};
    for (int j = 0; j < P; j += lanes<A>) {
      const Wide<A> a = load_wide<A>(x + j), b = load_wide<A>(y + j);
      unroll<Wide<A>::count>([&](auto K) { sum = fma(a.part[K], b.part[K], sum); });
    }
    return hsum<double>(sum);
  } else {
    double sum = 0;
    for (int64_t j = 0; j < p; ++j) sum += double(x[j]) * double(y[j]);
    return sum;
  }
}

// a b - c d, rounded about once where there are fused multiply-adds (Kahan): the two may nearly cancel.
template <class A>
VCR_INLINE A difference_of_products(A a, A b, A c, A d) {
  const A product = c * d, rounding = fma(-c, d, product);
  return fma(a, b, -product) + rounding;
}

// ---- products

// Whether (p, pt) products can go by four states at a time, which every level has registers for.
template <class A, int P, int PT>
inline constexpr bool by_quads = sizeof(A) == 4 && P > 0 && P % 4 == 0 && PT > 0 && PT % 4 == 0;
// Whether they can go along a matrix [p, pt] by whole vectors, of whole rows each.
template <class A, int P, int PT>
inline constexpr bool by_matrix =
    by_quads<A, P, PT> && (PT == 4 || PT == 8) && lanes<float> > 4 && lanes<float> % PT == 0 && P % lanes<float> == 0;

template <int i, int... I>
VCR_INLINE quad quad_of_impl(vec<float> x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (4 * i + I)...);
}
// Lanes 4 i .. 4 i + 3.
template <int i>
VCR_INLINE quad quad_of(vec<float> x) {
  return quad_of_impl<i>(x, std::make_integer_sequence<int, 4>{});
}
// The sum of every `every`-th quad from the i-th on.
template <int every, int i = 0>
VCR_INLINE quad sum_of_quads(vec<float> x) {
  if constexpr (i + every >= lanes<float> / 4)
    return quad_of<i>(x);
  else
    return quad_of<i>(x) + sum_of_quads<every, i + every>(x);
}
// Lane i of the result is the sum of rows[i]; four rows.
VCR_INLINE quad sum_four(const quad* rows) { return sum_quads(rows); }
#if VCR_VECTOR_BYTES != 16  // otherwise a quad is a vec<float>
VCR_INLINE quad sum_four(const vec<float>* rows) { return sum_of_quads<1>(sum_within_quads(rows)); }
#endif

// x[0] .. x[PT - 1], over and over. (What the compiler makes of a shuffle from four lanes to more goes through memory.)
template <int PT>
VCR_INLINE vec<float> repeated(const float* x) {
#if defined(__AVX512F__)
  return PT == 4 ? _mm512_broadcast_f32x4(_mm_loadu_ps(x)) : _mm512_broadcast_f32x8(_mm256_loadu_ps(x));
#elif defined(__AVX2__)
  return PT == 4 ? _mm256_broadcast_ps((const __m128*)x) : _mm256_loadu_ps(x);
#else
  float out[lanes<float>];
  for (int i = 0; i < lanes<float>; ++i) out[i] = x[i % PT];
  return load(out);
#endif
}
template <int PT, int first, int... I>
VCR_INLINE vec<float> each_impl(vec<float> x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (first + I / PT)...);
}
// x[first] PT times, x[first + 1] PT times, to the end of a vector.
template <int PT, int first>
VCR_INLINE vec<float> each(vec<float> x) {
  return each_impl<PT, first>(x, std::make_integer_sequence<int, lanes<float>>{});
}
// f(i, x of its rows' channels) for each vector i of a matrix [P, PT].
template <int P, int PT, class F>
VCR_INLINE void for_matrix(const float* x, F f) {
  constexpr int W = lanes<float>;
  unroll<P / W>([&](auto J) {
    const vec<float> xs = load(x + J * W);
    unroll<PT>([&](auto R) {
      constexpr int rows = W / PT;
      f(std::integral_constant<int, J * PT + R>{}, each<PT, R * rows>(xs));
    });
  });
}
template <int PT, int... I>
VCR_INLINE vec<float> in_order_impl(vec<float> x, std::integer_sequence<int, I...>) {
  constexpr int rows = lanes<float> / PT;
  return __builtin_shufflevector(x, x, (I % rows * PT + I / rows)...);
}
// out[j] = sum_k w[j, k] x[k] for lanes<float> channels.
template <int PT>
VCR_INLINE vec<float> rows_times(const float* w, vec<float> x) {
  vec<float> products[PT];
  unroll<PT>([&](auto I) { products[I] = load(w + I * lanes<float>) * x; });
  return in_order_impl<PT>(sum_within<PT>(products), std::make_integer_sequence<int, lanes<float>>{});
}

// out[j] = sum_k w[j, k] x[k]
template <int P, int PT, class A>
VCR_INLINE void project_back(const Width<P, PT>& size, const A* w, const A* x, A* out) {
  if constexpr (by_matrix<A, P, PT>) {
    const vec<float> xs = repeated<PT>(x);
    unroll<P / lanes<float>>([&](auto I) { store(out + I * lanes<float>, rows_times<PT>(w + I * lanes<float> * PT, xs)); });
  } else if constexpr (by_quads<A, P, PT>) {
    quad xs[PT / 4];
    unroll<PT / 4>([&](auto K) { xs[K] = load_quad(x + 4 * K); });
    for (int j = 0; j < P; j += 4) {
      quad rows[4];
      unroll<4>([&](auto J) {
        rows[J] = load_quad(w + (j + J) * PT) * xs[0];
        unroll<PT / 4 - 1>([&](auto K) { rows[J] = fma(load_quad(w + (j + J) * PT + 4 * (K + 1)), xs[K + 1], rows[J]); });
      });
      store_quad(out + j, sum_quads(rows));
    }
  } else {
    for (int64_t j = 0; j < size.p(); ++j) {
      A sum = 0;
      for (int64_t k = 0; k < size.pt(); ++k) sum = fma(w[j * size.pt() + k], x[k], sum);
      out[j] = sum;
    }
  }
}
// out[k] = sum_j x[j] w[j, k]
template <int P, int PT, class A>
VCR_INLINE void project(const Width<P, PT>& size, const A* x, const A* w, A* out) {
  if constexpr (by_matrix<A, P, PT>) {
    vec<float> acc[4] = {};  // four chains
    for_matrix<P, PT>(x, [&](auto I, vec<float> xs) { acc[I % 4] = fma(xs, load(w + I * lanes<float>), acc[I % 4]); });
    const vec<float> sum = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    unroll<PT / 4>([&](auto K) { store_quad(out + 4 * K, sum_of_quads<PT / 4, K()>(sum)); });
  } else if constexpr (by_quads<A, P, PT>) {
    quad acc[4][PT / 4] = {};  // four chains
    for (int j = 0; j < P; j += 4)
      unroll<4>([&](auto J) {
        unroll<PT / 4>([&](auto K) { acc[J][K] = fma(splat_quad(x[j + J]), load_quad(w + (j + J) * PT + 4 * K), acc[J][K]); });
      });
    unroll<PT / 4>([&](auto K) { store_quad(out + 4 * K, (acc[0][K] + acc[1][K]) + (acc[2][K] + acc[3][K])); });
  } else {
    for (int64_t k = 0; k < size.pt(); ++k) out[k] = 0;
    for (int64_t j = 0; j < size.p(); ++j)
      for (int64_t k = 0; k < size.pt(); ++k) out[k] = fma(x[j], w[j * size.pt() + k], out[k]);
  }
}
// w[j, k] += x[j] y[k]
template <int P, int PT, class A>
VCR_INLINE void add_outer(const Width<P, PT>& size, const A* x, const A* y, A* w) {
  if constexpr (by_matrix<A, P, PT>) {
    const vec<float> ys = repeated<PT>(y);
    for_matrix<P, PT>(x, [&](auto I, vec<float> xs) {
      float* to = w + I * lanes<float>;
      store(to, fma(xs, ys, load(to)));
    });
  } else if constexpr (by_quads<A, P, PT>) {
    quad ys[PT / 4];
    unroll<PT / 4>([&](auto K) { ys[K] = load_quad(y + 4 * K); });
    for (int j = 0; j < P; ++j)
      unroll<PT / 4>([&](auto K) { store_quad(w + j * PT + 4 * K, fma(splat_quad(x[j]), ys[K], load_quad(w + j * PT + 4 * K))); });
  } else {
    for (int64_t j = 0; j < size.p(); ++j)
      for (int64_t k = 0; k < size.pt(); ++k) w[j * size.pt() + k] = fma(x[j], y[k], w[j * size.pt() + k]);
  }
}

}  // namespace
}  // namespace vcr
