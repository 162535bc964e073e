// The gradient of the map (passes: backward pass 2). With e = grad_out where the ReLU is active:
//   dy_i = s (M~_i abar + b_scale) e_i + a_i dr + dl_i v + c0 + s dzbar / S + c1 yhat_i,
//   dl_i = a_i (yhat_i . dr - r . dr) [+ M~_i k_i - (i is a maximum) K0 / ties]
// 2R + 1W, or 1R + 1W where nothing was modulated (the sampler alone).
#pragma once
#include "../concept_modulate/cpu.h"

namespace vcr {
namespace {

constexpr int64_t grad_block = 512;            // positions of a gathered block, which stays in L1 between two sweeps
constexpr int64_t grad_row = grad_block + 16;  // between the rows of a gathered block: see padded_row

// Of a map that is read in place: longer rows, so that the memory's streams aren't broken off.
constexpr int64_t in_place_block = 512 * lanes<float>;
template <class T>
VCR_INLINE int64_t block_of(const Map<T>& y) {
  return y.layout() == Layout::contiguous ? in_place_block : grad_block;
}

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
  A rdr;        // r . dr
  A K0;         // pixel only
  bool attend;  // false: pool, every position weighs 1 / S and dl = 0
  bool stream;  // the gradient is written past the caches
};

// d.data null: no modulation. out may be the tile of a channels_last map in scratch.
template <int P, bool pixel, bool modulated, class T, class D, class O>
VCR_KERNEL void input_grad_block(Tile<T> y, Tile<D> d, O* out, int64_t out_row, int64_t begin, int64_t count, int64_t S, int64_t p_,
                                 const InputGradArgs<acc_t<T>>& g, acc_t<T>* scratch) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  const int64_t p = P > 0 ? P : p_;
  A *weight = scratch, *dlogit = weight + in_place_block, *attention = dlogit + in_place_block, *k = attention + in_place_block;
  const ModulateArgs<A>& m = g.modulate;
  if (g.attend) {
    scores<P>(y, 0, count, p, m.mu, {g.v, g.dr}, {weight, dlogit});  // dlogit holds yhat . dr, then dl
    const vec<A> top = splat(g.softmax.maximum), inverse = splat(A(1) / g.softmax.sum), rdr = splat(g.rdr);
    if constexpr (pixel) {
      for (int64_t i = 0; i < count; i += W) store(attention + i, exp_nonpositive(load(weight + i) - top));
      for (int64_t i = 0; i < round_up(count, W); ++i) k[i] = 0;
      for (int64_t j = 0; j < p; ++j) {
        const vec<A> mu = splat(m.mu[j]), A0 = splat(m.A0[j]), B0 = splat(m.B0[j]), A1 = splat(m.A1[j]), B1 = splat(m.B1[j]);
        for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
          const vec<A> x = load_some<whole()>(y.data + j * y.row + i, some) - mu, M = load(attention + i);
          const vec<A> pre = pre_activation<A>(M, slope_at<A>(M, A0, A1), x, B0, B1);
          const vec<A> e = where_active<A>(pre, load_some<whole()>(d.data + j * d.row + i, some));
          store(k + i, fma(e, fma(A1, x, B1), load(k + i)));
        });
      }
    }
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
    const bool stream = g.stream && sizeof(O) == 4 && can_stream(to);
    const auto sweep = [&](auto attend, auto past_caches) {
      const auto value = [&](int64_t i, auto whole, int some) {
        if constexpr (whole() && modulated && VCR_VECTOR_BYTES < 64)  // else each vector's prefetches would take the place of loads
          if (i * sizeof(D) % 64 == 0) {
            prefetch(grad + i + 512 / sizeof(D));
            if constexpr (!past_caches()) prefetch_write(to + i + 512 / sizeof(O));
          }
        const vec<A> x = load_some<whole()>(from + i, some) - mu;
        vec<A> z = fma(c1, x, constant);
        if constexpr (attend()) z = fma(load(weight + i), dr, fma(load(dlogit + i), v, z));
        if constexpr (modulated) {
          if constexpr (pixel) {
            const vec<A> M = load(attention + i), slope = slope_at<A>(M, A0, A1);
            const vec<A> e = where_active<A>(pre_activation<A>(M, slope, x, B0, B1), load_some<whole()>(grad + i, some));
            z = fma(slope, e, z);
          } else {
            const vec<A> e = where_active<A>(fma(A0, x, B0), load_some<whole()>(grad + i, some));
            z = fma(A0, e, z);
          }
        }
        return z;
      };
      if constexpr (past_caches())
        for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
          if constexpr (whole())
            store_stream(to + i, value(i, whole, some));
          else
            store_partial(to + i, value(i, whole, some), some);
        });
      else
        write_vectors(to, count, value);
    };
    using yes = std::integral_constant<bool, true>;
    using no = std::integral_constant<bool, false>;
    if (!g.attend)
      sweep(no{}, no{});
    else if (stream)
      sweep(yes{}, yes{});
    else
      sweep(yes{}, no{});
  }
}
// ---- channels_last with the paper's widths: no transposition. Four positions at a time; the dot products over a concept's channels
// come out of the lanes by a transposed reduction, one exp serves four positions, and a lane's shuffle hands each its own.

// One image; [C p] each, the softmax's numbers repeated for every channel of a concept.
template <class A>
struct NaturalInputGrad {
  const A *mu, *A0, *B0, *v, *dr, *constant, *c1;
  const A *maximum, *inverse_sum, *rdr;
};

constexpr int64_t grad_width = 256;  // channels of a strip, whose rows stay in L1

// Positions [begin, end); channels must be a multiple of max(P, lanes). Four rows are swept along their channels, as memory lies, strip
// by strip: dot products, then the softmax, then the gradient. In one sweep the gradients would wait for the exponentials.
template <int P, class T>
VCR_KERNEL void input_grad_natural(const Map<const T>& y, const Map<const T>& d, const Map<T>& dy, int64_t n, int64_t begin, int64_t end,
                                   int64_t channels, const NaturalInputGrad<float>& g, bool stream) {
  constexpr int W = lanes<float>;
  constexpr int NV = P > W ? P / W : 1;  // vectors of a concept
  constexpr int slot = NV * W;           // channels whose softmax is kept in one vector
  constexpr int together = sizeof(T) == 2 ? 2 : 1;
  using V = vec<float>;
  alignas(VCR_VECTOR_BYTES) float weights[grad_width], dlogits[grad_width];
  const bool far = y.image * int64_t(sizeof(T)) > natural_near;  // what is near needs no prefetching
  const auto rows = [&](int64_t i, int64_t c0, int64_t c1, auto height, auto past_caches) {
    constexpr int R = height();
    const T *yi = y.at(n, 0, i), *di = d.at(n, 0, i);
    T* out = dy.at(n, 0, i);
    const int64_t ys = y.position, ds = d.position, os = dy.position;
    for (int64_t c = c0; c < c1; c += slot) {
      V score[4] = {}, against[4] = {};
      unroll<NV>([&](auto K) {
        constexpr int k = K() * W;
        const V mu = load(g.mu + c + k), v = load(g.v + c + k), dr = load(g.dr + c + k);
        unroll<R>([&](auto I) {
          const V x = load(yi + I * ys + c + k) - mu;
          score[I] = K() == 0 ? x * v : fma(x, v, score[I]);
          against[I] = K() == 0 ? x * dr : fma(x, dr, against[I]);
        });
      });
      V l = sum_within_quads(score), w = sum_within_quads(against);
      if constexpr (P >= 8 && W >= 8) l += exchange<4>(l), w += exchange<4>(w);
      if constexpr (P >= 16 && W >= 16) l += exchange<8>(l), w += exchange<8>(w);
      store(weights + (c - c0) / NV, l);
      store(dlogits + (c - c0) / NV, w);
    }
    for (int64_t c = c0; c < c1; c += slot) {
      float *weight = weights + (c - c0) / NV, *dlogit = dlogits + (c - c0) / NV;
      const V a = exp_nonpositive(load(weight) - load(g.maximum + c)) * load(g.inverse_sum + c);
      store(dlogit, a * (load(dlogit) - load(g.rdr + c)));
      store(weight, a);
    }
    const auto write = [&](int64_t c, auto vectors) {
      constexpr int N = vectors();
      V z[N][R];
      unroll<N>([&](auto K) {
        const int64_t at = c + K * W, in_slots = (at - c0) / slot * W;
        if (far && at * sizeof(T) % 64 == 0)
          for (int k = 0; k < R; ++k) {
            prefetch(yi + (k + 4) * ys + at);
            prefetch(di + (k + 4) * ds + at);
            if constexpr (!past_caches()) prefetch_write(out + (k + 4) * os + at);
          }
        const V mu = load(g.mu + at), A0 = load(g.A0 + at), B0 = load(g.B0 + at), v = load(g.v + at), dr = load(g.dr + at);
        const V c1 = load(g.c1 + at), constant = load(g.constant + at), a = load(weights + in_slots), dl = load(dlogits + in_slots);
        unroll<R>([&](auto I) {
          const V x = load(yi + I * ys + at) - mu;
          const V e = where_active<float>(fma(A0, x, B0), load(di + I * ds + at));
          const V rest = fma(broadcast_in_quads<I()>(a), dr, fma(broadcast_in_quads<I()>(dl), v, fma(c1, x, constant)));
          z[K][I] = fma(A0, e, rest);
        });
      });
      unroll<R>([&](auto I) {
        if constexpr (N == 2)
          store_two(out + I * os + c, z[0][I], z[1][I]);
        else if constexpr (past_caches())
          store_stream(out + I * os + c, z[0][I]);
        else
          store(out + I * os + c, z[0][I]);
      });
    };
    int64_t c = c0;
    for (; c + together * W <= c1; c += together * W) write(c, std::integral_constant<int, together>{});
    for (; c < c1; c += W) write(c, std::integral_constant<int, 1>{});
  };
  const auto all = [&](auto past_caches) {
    const auto strips = [&](int64_t i, auto height) {
      for (int64_t c = 0; c < channels; c += grad_width) rows(i, c, min(channels, c + grad_width), height, past_caches);
    };
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) strips(i, std::integral_constant<int, 4>{});
    for (; i < end; ++i) strips(i, std::integral_constant<int, 1>{});
  };
  if (stream && sizeof(T) == 4 && can_stream(dy.data) && dy.position % W == 0 && dy.image % W == 0)
    all(std::integral_constant<bool, true>{});
  else
    all(std::integral_constant<bool, false>{});
}

VCR_INLINE int64_t input_grad_scratch() { return 4 * in_place_block; }

}  // namespace
}  // namespace vcr
