// Concept modulator (contract stage 4): out = relu((M~ abar + b_scale) * z + M~ bbar + b_shift), z = s * yhat + b, where
// abar = state W_scale and bbar = state W_shift. Channel: M~ = 1. Passes: forward pass 3 (1R + 1W), backward pass 1 (2R).
#pragma once
#include "../concept_sample/cpu_tile.h"

namespace vcr {
namespace {

// out = relu(M~ (A1 yhat + B1) + A0 yhat + B0); for channel modulation A1 and B1 are already added to A0 and B0.
template <class A>
struct ModulateArgs {
  const A* mu;
  const A *A0, *B0, *A1, *B1;  // [p] each
};

// abar[j] = sum_k state[k] w[k, j]; 0 where affine leaves the weight out (null).
template <int P, int PT, class A>
VCR_INLINE void project_state(const Problem& pr, const A* state, const A* w, A* out) {
  const Width<P, PT> size(pr);
  for (int64_t j = 0; j < size.p(); ++j) out[j] = 0;
  if (w == nullptr) return;
  for (int64_t k = 0; k < size.pt(); ++k)
    for (int64_t j = 0; j < size.p(); ++j) out[j] += state[k] * w[k * size.p() + j];
}

// coefficients: A0, B0, A1, B1, [p] each, `stride` apart.
template <int P, class A>
VCR_INLINE void modulate_coefficients(int64_t p_, bool pixel, const A* s, const A* b, const A* abar, const A* bbar, const A* scale_bias,
                                      const A* shift_bias, int64_t stride, A* out) {
  const int64_t p = P > 0 ? P : p_;
  A *A0 = out, *B0 = out + stride, *A1 = out + 2 * stride, *B1 = out + 3 * stride;
  if (pixel) {
    for (int64_t j = 0; j < p; ++j) {
      A0[j] = scale_bias[j] * s[j];
      B0[j] = scale_bias[j] * b[j] + shift_bias[j];
      A1[j] = abar[j] * s[j];
      B1[j] = abar[j] * b[j] + bbar[j];
    }
  } else {
    for (int64_t j = 0; j < p; ++j) {
      const A alpha = abar[j] + scale_bias[j];
      A0[j] = alpha * s[j];
      B0[j] = alpha * b[j] + bbar[j] + shift_bias[j];
    }
  }
}

// One contiguous row of a channel.
template <class T>
VCR_INLINE void modulate_row(const T* y, T* out, int64_t S, acc_t<T> mu_, acc_t<T> a_, acc_t<T> b_) {
  using A = acc_t<T>;
  const vec<A> mu = splat(mu_), a = splat(a_), b = splat(b_);
  for_vectors<A>(S, [&](int64_t i, auto whole, int some) {
    store_some<whole()>(out + i, relu<A>(fma(a, load_some<whole()>(y + i, some) - mu, b)), some);
  });
}
// One channels_last row of a position: channels [0, count).
template <class T>
VCR_INLINE void modulate_position(const T* y, T* out, int64_t count, const acc_t<T>* mu, const acc_t<T>* a, const acc_t<T>* b) {
  using A = acc_t<T>;
  for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
    const vec<A> x = load_some<whole()>(y + i, some) - load_some<whole()>(mu + i, some);
    store_some<whole()>(out + i, relu<A>(fma(load_some<whole()>(a + i, some), x, load_some<whole()>(b + i, some))), some);
  });
}
// A block of one (image, concept)'s tile; attention = M~ of the block's positions.
template <class T, class O>
VCR_INLINE void modulate_pixel_block(Tile<T> y, O* out, int64_t out_row, int64_t count, int64_t p, const ModulateArgs<acc_t<T>>& m,
                                     const acc_t<T>* attention) {
  using A = acc_t<T>;
  for (int64_t j = 0; j < p; ++j) {
    const T* from = y.data + j * y.row;
    O* to = out + j * out_row;
    const vec<A> mu = splat(m.mu[j]), A0 = splat(m.A0[j]), B0 = splat(m.B0[j]), A1 = splat(m.A1[j]), B1 = splat(m.B1[j]);
    for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
      const vec<A> x = load_some<whole()>(from + i, some) - mu;
      store_some<whole()>(to + i, relu<A>(fma(load(attention + i), fma(A1, x, B1), fma(A0, x, B0))), some);
    });
  }
}

// ---- backward pass 1: e = grad_out where not (pre-activation <= 0)

// E0 = sum e, E1 = sum e yhat over one contiguous row.
template <class T>
VCR_INLINE void backward_sums_row(const T* y, const T* d, int64_t S, acc_t<T> mu_, acc_t<T> a_, acc_t<T> b_, acc_t<T>& E0, acc_t<T>& E1) {
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

// The same over channels [0, count) of one channels_last image; mu, a, b, E0, E1 [count].
template <class T>
void backward_sums_rows(const T* y, int64_t y_stride, const T* d, int64_t d_stride, int64_t S, int64_t count, const acc_t<T>* mu,
                        const acc_t<T>* a, const acc_t<T>* b, acc_t<T>* E0, acc_t<T>* E1) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  constexpr int64_t rows = 32, block_rows = 1024;  // a float sum runs over 32 terms, then over 32 such sums, then over those in double
  Scratch<double> totals(2 * count);
  for (int64_t j = 0; j < 2 * count; ++j) totals.get()[j] = 0;
  Scratch<A> partial(2 * round_up(count, W));
  A *p0 = partial.get(), *p1 = p0 + round_up(count, W);
  for (int64_t block = 0; block < S; block += block_rows) {
    const int64_t block_end = min(S, block + block_rows);
    for (int64_t j = 0; j < 2 * round_up(count, W); ++j) p0[j] = 0;
    for (int64_t i = block; i < block_end; i += rows) {
      const int64_t some_rows = min(rows, block_end - i);
      for_vectors<A>(count, [&](int64_t j, auto whole, int some) {
        const vec<A> vmu = load_some<whole()>(mu + j, some), va = load_some<whole()>(a + j, some), vb = load_some<whole()>(b + j, some);
        vec<A> e0 = zeros<A>(), e1 = e0, f0 = e0, f1 = e0;
        const T *yr = y + i * y_stride + j, *dr = d + i * d_stride + j;
        const auto one = [&](int64_t r, vec<A>& s0, vec<A>& s1) {
          prefetch(yr + (r + rows) * y_stride);
          prefetch(dr + (r + rows) * d_stride);
          const vec<A> x = load_some<whole()>(yr + r * y_stride, some) - vmu;
          const vec<A> e = where_active<A>(fma(va, x, vb), load_some<whole()>(dr + r * d_stride, some));
          s0 += e;
          s1 = fma(e, x, s1);
        };
        int64_t r = 0;
        for (; r + 2 <= some_rows; r += 2) {
          one(r, e0, e1);
          one(r + 1, f0, f1);
        }
        if (r < some_rows) one(r, e0, e1);
        store(p0 + j, load(p0 + j) + (e0 + f0));
        store(p1 + j, load(p1 + j) + (e1 + f1));
      });
    }
    for (int64_t j = 0; j < count; ++j) {
      totals.get()[j] += double(p0[j]);
      totals.get()[count + j] += double(p1[j]);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    E0[j] = A(totals.get()[j]);
    E1[j] = A(totals.get()[count + j]);
  }
}

// Pixel modulation, one block of a tile: adds to E0, E1, F0 = sum M~ e, F1 = sum M~ e yhat (all [p], double) and writes
// k_i = sum_ch e_i (A1 yhat_i + B1) (without the factor M~_i) of the block's positions.
template <class T, class D>
VCR_INLINE void backward_sums_pixel_block(Tile<T> y, Tile<D> d, int64_t count, int64_t p, const ModulateArgs<acc_t<T>>& m,
                                          const acc_t<T>* attention, double* E0, double* E1, double* F0, double* F1, acc_t<T>* k) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < round_up(count, lanes<A>); ++i) k[i] = 0;
  for (int64_t j = 0; j < p; ++j) {
    const vec<A> mu = splat(m.mu[j]), A0 = splat(m.A0[j]), B0 = splat(m.B0[j]), A1 = splat(m.A1[j]), B1 = splat(m.B1[j]);
    vec<A> e0 = zeros<A>(), e1 = e0, f0 = e0, f1 = e0;
    for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
      const vec<A> x = only<whole(), A>(load_some<whole()>(y.data + j * y.row + i, some) - mu, some);
      const vec<A> weight = load(attention + i), inner = fma(A1, x, B1);
      const vec<A> e = where_active<A>(fma(weight, inner, fma(A0, x, B0)), load_some<whole()>(d.data + j * d.row + i, some));
      const vec<A> we = weight * e;
      e0 += e;
      e1 = fma(e, x, e1);
      f0 += we;
      f1 = fma(we, x, f1);
      store(k + i, fma(e, inner, load(k + i)));
    });
    E0[j] += double(hsum<A>(e0));
    E1[j] += double(hsum<A>(e1));
    F0[j] += double(hsum<A>(f0));
    F1[j] += double(hsum<A>(f1));
  }
}

}  // namespace
}  // namespace vcr
