// Concept modulator (contract stage 4): out = relu((M~ abar + b_scale) * z + M~ bbar + b_shift), z = s * yhat + b, where
// abar = state W_scale and bbar = state W_shift. Channel: M~ = 1. Passes: forward pass 3 (1R + 1W), backward pass 1 (2R).
#pragma once
#include "../concept_sample/cpu_tile.h"

namespace vcr {
namespace {

// out = relu((M~ A1 + A0) yhat + M~ B1 + B0); for channel modulation A1 and B1 are already added to A0 and B0. In this order an infinite
// yhat comes out as it does where nothing is folded: the sign of its slope decides.
template <class A>
struct ModulateArgs {
  const A* mu;                 // yhat = y - mu
  const A *A0, *B0, *A1, *B1;  // [p] each
};

// abar[j] = sum_k state[k] w[k, j]; 0 where affine leaves the weight out (null).
template <int P, int PT, class A>
VCR_INLINE void project_state(const Problem& pr, const A* state, const A* w, A* out) {
  const Width<P, PT> size(pr);
  for_channels<A, P>(pr.p, [&](int64_t j, auto by) {
    auto sum = by.splat(0);
    if (w != nullptr)
      for (int64_t k = 0; k < size.pt(); ++k) sum = fma(by.splat(state[k]), by.load(w + k * size.p() + j), sum);
    by.store(out + j, sum);
  });
}

template <class A>
VCR_INLINE vec<A> slope_at(const vec<A>& M, const vec<A>& A0, const vec<A>& A1) {
  return fma(M, A1, A0);
}
// What the ReLU sees, given the slope.
template <class A>
VCR_INLINE vec<A> pre_activation(const vec<A>& M, const vec<A>& slope, const vec<A>& x, const vec<A>& B0, const vec<A>& B1) {
  return fma(slope, x, fma(M, B1, B0));
}

// 0 where b is, whatever alpha.
template <class A>
VCR_INLINE A scaled_offset(A alpha, A b) {
  return b == 0 ? A(0) : alpha * b;
}

// coefficients: A0, B0, A1, B1, [p] each, `stride` apart. For channel modulation the third is the centre of yhat instead: mu, but where
// alpha is infinite mu - b / s, so that alpha z is alpha s (y - centre) and not a difference of infinities.
template <int P, class A>
VCR_INLINE void modulate_coefficients(int64_t p_, bool pixel, const SampleArgs<A>& a, const A* abar, const A* bbar, const A* scale_bias,
                                      const A* shift_bias, int64_t stride, A* out) {
  const int64_t p = P > 0 ? P : p_;
  A *A0 = out, *B0 = out + stride, *A1 = out + 2 * stride, *B1 = out + 3 * stride;
  if (pixel) {
    for (int64_t j = 0; j < p; ++j) {
      A0[j] = scale_bias[j] * a.s[j];
      B0[j] = scale_bias[j] * a.b[j] + shift_bias[j];
      A1[j] = abar[j] * a.s[j];
      B1[j] = scaled_offset(abar[j], a.b[j]) + bbar[j];
    }
  } else {
    auto none = Steps<A, P>::splat(0);  // NaN where an alpha is infinite or NaN
    for_channels<A, P>(p, [&](int64_t j, auto by) {
      const auto alpha = by.load(abar + j) + by.load(scale_bias + j);
      by.store(A0 + j, alpha * by.load(a.s + j));
      by.store(B0 + j, alpha * by.load(a.b + j) + by.load(bbar + j) + by.load(shift_bias + j));
      by.store(A1 + j, by.load(a.mu + j));
      none += alpha - alpha;
    });
    if (Steps<A, P>::sum(none) == 0) return;
    for (int64_t j = 0; j < p; ++j) {
      const A alpha = abar[j] + scale_bias[j];
      if (alpha - alpha == 0) continue;
      B0[j] = bbar[j] + shift_bias[j];
      A1[j] = a.mu[j] - a.b[j] / a.s[j];
    }
  }
}

// One contiguous row of a channel.
template <class T>
VCR_INLINE void modulate_row(const T* y, T* out, int64_t S, acc_t<T> mu_, acc_t<T> a_, acc_t<T> b_, bool stream) {
  using A = acc_t<T>;
  const vec<A> mu = splat(mu_), a = splat(a_), b = splat(b_);
  write_row(out, S, stream, [&](int64_t i, auto whole, int some) { return relu<A>(fma(a, load_some<whole()>(y + i, some) - mu, b)); });
}
// One channels_last row of a position: channels [0, count).
template <class T>
VCR_INLINE void modulate_position(const T* y, T* out, int64_t count, const acc_t<T>* mu, const acc_t<T>* a, const acc_t<T>* b,
                                  bool stream) {
  using A = acc_t<T>;
  write_row(out, count, stream, [&](int64_t i, auto whole, int some) {
    const vec<A> x = load_some<whole()>(y + i, some) - load_some<whole()>(mu + i, some);
    return relu<A>(fma(load_some<whole()>(a + i, some), x, load_some<whole()>(b + i, some)));
  });
}
// A block of one (image, concept)'s tile; attention = M~ of the block's positions.
template <class T, class O>
VCR_KERNEL void modulate_pixel_block(Tile<T> y, O* out, int64_t out_row, int64_t count, int64_t p, const ModulateArgs<acc_t<T>>& m,
                                     const acc_t<T>* attention) {
  using A = acc_t<T>;
  for (int64_t j = 0; j < p; ++j) {
    const T* from = y.data + j * y.row;
    O* to = out + j * out_row;
    const vec<A> mu = splat(m.mu[j]), A0 = splat(m.A0[j]), B0 = splat(m.B0[j]), A1 = splat(m.A1[j]), B1 = splat(m.B1[j]);
    write_vectors(to, count, [&](int64_t i, auto whole, int some) {
      const vec<A> x = load_some<whole()>(from + i, some) - mu, M = load(attention + i);
      return relu<A>(pre_activation<A>(M, slope_at<A>(M, A0, A1), x, B0, B1));
    });
  }
}

// ---- backward pass 1: e = grad_out where not (pre-activation <= 0)

// E0 = sum e, E1 = sum e yhat over one contiguous row.
template <class T>
VCR_KERNEL void backward_sums_row(const T* y, const T* d, int64_t S, acc_t<T> mu_, acc_t<T> a_, acc_t<T> b_, acc_t<T>& E0, acc_t<T>& E1) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  const vec<A> mu = splat(mu_), a = splat(a_), b = splat(b_);
  double total0 = 0, total1 = 0;
  for (int64_t block = 0; block < S; block += sample_block) {
    const int64_t end = min(S, block + sample_block);
    vec<A> e0 = zeros<A>(), e1 = e0, f0 = e0, f1 = e0;
    int64_t i = block;
    for (; i + 2 * W <= end; i += 2 * W) {
      const vec<A> x0 = load(y + i) - mu, x1 = load(y + i + W) - mu;
      const vec<A> d0 = where_active<A>(fma(a, x0, b), load(d + i)), d1 = where_active<A>(fma(a, x1, b), load(d + i + W));
      e0 += d0;
      f0 += d1;
      e1 = fma(d0, x0, e1);
      f1 = fma(d1, x1, f1);
    }
    for_vectors<A>(end - i, [&](int64_t at, auto whole, int some) {
      const vec<A> x = only<whole(), A>(load_some<whole()>(y + i + at, some) - mu, some);
      const vec<A> e = where_active<A>(fma(a, x, b), load_some<whole()>(d + i + at, some));
      e0 += e;
      e1 = fma(e, x, e1);
    });
    total0 += double(hsum<A>(e0 + f0));
    total1 += double(hsum<A>(e1 + f1));
  }
  E0 = A(total0);
  E1 = A(total1);
}

// The same over channels [0, count) of one channels_last image; mu, a, b, E0, E1 [count]. Some rows at a time, along the channels (see
// channel_stats), of two maps: more would fall out of their cache sets. A float sum runs over them, then over 32 such sums, then in double.
constexpr int64_t sum_rows_together = 4, sum_rows_merged = 128;
template <class T>
VCR_KERNEL void backward_sums_rows(const T* y, int64_t y_stride, const T* d, int64_t d_stride, int64_t S, int64_t count, const acc_t<T>* mu,
                                   const acc_t<T>* a, const acc_t<T>* b, acc_t<T>* E0, acc_t<T>* E1) {
  using A = acc_t<T>;
  const int64_t padded = round_up(count, lanes<A>);
  Scratch<A> running(2 * padded);
  Scratch<double> totals(2 * padded);
  A *run0 = running.get(), *run1 = run0 + padded;
  fill_zero(totals.get(), 2 * padded);
  for (int64_t i = 0; i < S; i += sum_rows_merged) {
    const int64_t rows = min(sum_rows_merged, S - i);
    fill_zero(run0, 2 * padded);
    int64_t r = 0;
    const auto block = [&](auto height) {
      const T *yr = y + (i + r) * y_stride, *dr = d + (i + r) * d_stride;
      for_vectors<A>(count, [&](int64_t j, auto whole, int some) {
        if (j * sizeof(T) % 64 == 0)
          for (int k = 0; k < height(); ++k) {
            prefetch(yr + (k + height()) * y_stride + j);
            prefetch(dr + (k + height()) * d_stride + j);
          }
        const vec<A> vmu = load_some<whole()>(mu + j, some), va = load_some<whole()>(a + j, some), vb = load_some<whole()>(b + j, some);
        vec<A> e0[2] = {}, e1[2] = {};
        unroll<height()>([&](auto R) {
          const vec<A> x = load_some<whole()>(yr + R * y_stride + j, some) - vmu;
          const vec<A> e = where_active<A>(fma(va, x, vb), load_some<whole()>(dr + R * d_stride + j, some));
          e0[R % 2] += e;
          e1[R % 2] = fma(e, x, e1[R % 2]);
        });
        store(run0 + j, load(run0 + j) + (e0[0] + e0[1]));
        store(run1 + j, load(run1 + j) + (e1[0] + e1[1]));
      });
      r += height();
    };
    while (r + sum_rows_together <= rows) block(std::integral_constant<int, sum_rows_together>{});
    while (r < rows) block(std::integral_constant<int, 1>{});
    for (int64_t j = 0; j < 2 * padded; ++j) totals.get()[j] += double(run0[j]);
  }
  for (int64_t j = 0; j < count; ++j) {
    E0[j] = A(totals.get()[j]);
    E1[j] = A(totals.get()[padded + j]);
  }
}

// Short contiguous rows, as many as a vector has lanes: their lanes are added up together (see channel_stats).
template <class T>
VCR_KERNEL void backward_sums_short_rows(const T* y, int64_t y_row, const T* d, int64_t d_row, int64_t S, const acc_t<T>* mu,
                                         const acc_t<T>* a, const acc_t<T>* b, acc_t<T>* E0, acc_t<T>* E1) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  vec<A> s0[W], s1[W];
  unroll<W>([&](auto J) {
    const vec<A> m = splat(mu[J]), va = splat(a[J]), vb = splat(b[J]);
    vec<A> e0 = zeros<A>(), e1 = e0;
    for_vectors<A>(S, [&](int64_t i, auto whole, int some) {
      const vec<A> x = load_some<whole()>(y + J * y_row + i, some) - m;  // past the end grad_out is 0
      const vec<A> e = where_active<A>(fma(va, x, vb), load_some<whole()>(d + J * d_row + i, some));
      e0 += e;
      e1 = fma(e, x, e1);
    });
    s0[J] = e0;
    s1[J] = e1;
  });
  store(E0, sum_rows<A>(s0));
  store(E1, sum_rows<A>(s1));
}

// Pixel modulation, one block of a tile: adds to E0, E1, F0 = sum M~ e, F1 = sum M~ e yhat (all [p], double) and writes
// k_i = sum_ch e_i (A1 yhat_i + B1) (without the factor M~_i) of the block's positions.
template <class T, class D>
VCR_KERNEL void backward_sums_pixel_block(Tile<T> y, Tile<D> d, int64_t count, int64_t p, const ModulateArgs<acc_t<T>>& m,
                                          const acc_t<T>* attention, double* E0, double* E1, double* F0, double* F1, acc_t<T>* k) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < round_up(count, lanes<A>); ++i) k[i] = 0;
  for (int64_t j = 0; j < p; ++j) {
    const vec<A> mu = splat(m.mu[j]), A0 = splat(m.A0[j]), B0 = splat(m.B0[j]), A1 = splat(m.A1[j]), B1 = splat(m.B1[j]);
    vec<A> e0 = zeros<A>(), e1 = e0, f0 = e0, f1 = e0;
    for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
      const vec<A> x = only<whole(), A>(load_some<whole()>(y.data + j * y.row + i, some) - mu, some);
      const vec<A> weight = load(attention + i), pre = pre_activation<A>(weight, slope_at<A>(weight, A0, A1), x, B0, B1);
      const vec<A> e = where_active<A>(pre, load_some<whole()>(d.data + j * d.row + i, some));
      const vec<A> we = weight * e;
      e0 += e;
      e1 = fma(e, x, e1);
      f0 += we;
      f1 = fma(we, x, f1);
      store(k + i, fma(e, fma(A1, x, B1), load(k + i)));
    });
    E0[j] += double(hsum<A>(e0));
    E1[j] += double(hsum<A>(e1));
    F0[j] += double(hsum<A>(f0));
    F1[j] += double(hsum<A>(f1));
  }
}

}  // namespace
}  // namespace vcr
