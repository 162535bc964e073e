// The gradient of the map (passes: backward pass 2). With e = grad_out where the ReLU is active:
//   dy_i = s (M~_i abar + b_scale) e_i + a_i dr + dl_i v + c0 + s dzbar / S + c1 yhat_i,
//   dl_i = a_i (yhat_i . dr - r . dr) [+ M~_i k_i - (i is a maximum) K0 / ties]
// 2R + 1W, or 1R + 1W where nothing was modulated (the sampler alone).
#pragma once
#include "../concept_modulate/cpu.h"

namespace vcr {
namespace {

constexpr int64_t grad_block = 512;  // positions whose attention is kept in L1 between the two sweeps

// One (image, concept).
template <class A>
struct InputGradArgs {
  ModulateArgs<A> modulate;
  const A* v;             // [p]
  const A* dr;            // [p]
  const A* constant;      // [p] s dzbar / S + c0
  const A* c1;            // [p]
  const A* dlogit_extra;  // [S] or null: what else reaches the softmax's output (the sampler's returned attention)
  Softmax<A> softmax;
  A rdr;  // r . dr
  A K0;   // pixel only
  bool attend;  // false: pool, every position weighs 1 / S and dl = 0
};

// d.data null: no modulation. out may be the tile of a channels_last map in scratch.
template <int P, bool pixel, bool modulated, class T, class D, class O>
VCR_INLINE void input_grad_block(Tile<T> y, Tile<D> d, O* out, int64_t out_row, int64_t begin, int64_t count, int64_t S, int64_t p_,
                                 const InputGradArgs<acc_t<T>>& g, acc_t<T>* scratch) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  const int64_t p = P > 0 ? P : p_;
  A *weight = scratch, *dlogit = scratch + grad_block, *attention = scratch + 2 * grad_block, *k = scratch + 3 * grad_block;
  const ModulateArgs<A>& m = g.modulate;
  if (g.attend) {
    logits<P>(y, 0, count, p, m.mu, g.v, weight);
    const vec<A> top = splat(g.softmax.maximum), inverse = splat(A(1) / g.softmax.sum), rdr = splat(g.rdr);
    if constexpr (pixel) {
      for (int64_t i = 0; i < count; i += W) store(attention + i, exp_nonpositive(load(weight + i) - top));
      for (int64_t i = 0; i < round_up(count, W); ++i) k[i] = 0;
      for (int64_t j = 0; j < p; ++j) {
        const vec<A> mu = splat(m.mu[j]), A0 = splat(m.A0[j]), B0 = splat(m.B0[j]), A1 = splat(m.A1[j]), B1 = splat(m.B1[j]);
        for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
          const vec<A> x = load_some<whole()>(y.data + j * y.row + i, some) - mu, inner = fma(A1, x, B1);
          const vec<A> e = where_active<A>(fma(load(attention + i), inner, fma(A0, x, B0)),
                                           load_some<whole()>(d.data + j * d.row + i, some));
          store(k + i, fma(e, inner, load(k + i)));
        });
      }
    }
    // dlogit holds yhat . dr, then dl
    logits<P>(y, 0, count, p, m.mu, g.dr, dlogit);
    for (int64_t i = 0; i < count; i += W) {
      const vec<A> l = load(weight + i);
      const vec<A> a = exp_nonpositive(l - top) * inverse;
      vec<A> dl = a * (load(dlogit + i) - rdr);
      if constexpr (pixel) {
        dl = fma(load(attention + i), load(k + i), dl);
        dl -= l == top ? splat(g.K0 / g.softmax.ties) : zeros<A>();
      }
      store(weight + i, a);
      store(dlogit + i, dl);
    }
    if (g.dlogit_extra != nullptr)
      for (int64_t i = 0; i < count; ++i) dlogit[i] += g.dlogit_extra[begin + i];
  }
  const A share = A(1) / A(S);
  for (int64_t j = 0; j < p; ++j) {
    const T* from = y.data + j * y.row;
    const D* grad = modulated ? d.data + j * d.row : nullptr;
    O* to = out + j * out_row;
    const vec<A> mu = splat(m.mu[j]), dr = splat(g.dr[j]), v = splat(g.v[j]), c1 = splat(g.c1[j]);
    const vec<A> constant = splat(g.attend ? g.constant[j] : g.constant[j] + share * g.dr[j]);
    vec<A> A0 = zeros<A>(), B0 = A0, A1 = A0, B1 = A0;
    if constexpr (modulated) {
      A0 = splat(m.A0[j]);
      B0 = splat(m.B0[j]);
    }
    if constexpr (modulated && pixel) {
      A1 = splat(m.A1[j]);
      B1 = splat(m.B1[j]);
    }
    const auto sweep = [&](auto attend) {
      for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
        const vec<A> x = load_some<whole()>(from + i, some) - mu;
        vec<A> z = fma(c1, x, constant);
        if constexpr (attend()) z = fma(load(weight + i), dr, fma(load(dlogit + i), v, z));
        if constexpr (modulated) {
          if constexpr (pixel) {
            const vec<A> M = load(attention + i);
            const vec<A> e =
                where_active<A>(fma(M, fma(A1, x, B1), fma(A0, x, B0)), load_some<whole()>(grad + i, some));
            z = fma(fma(M, A1, A0), e, z);
          } else {
            const vec<A> e = where_active<A>(fma(A0, x, B0), load_some<whole()>(grad + i, some));
            z = fma(A0, e, z);
          }
        }
        store_some<whole()>(to + i, z, some);
      });
    };
    if (g.attend)
      sweep(std::integral_constant<bool, true>{});
    else
      sweep(std::integral_constant<bool, false>{});
  }
}
VCR_INLINE int64_t input_grad_scratch() { return 4 * grad_block; }

}  // namespace
}  // namespace vcr
