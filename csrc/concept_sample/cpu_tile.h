// Attention pooling of one (image, concept)'s tile (passes: forward pass 2). Contract stage 2, Eq. 2, centred:
//   l_i = yhat_i . v,  a = softmax(l),  r = sum_i a_i yhat_i,  and for training R = Cov_a(yhat, yhat * s Wv) [p, pt],
// which spares the backward pass a read of the map (dv = R dh). The tile is read from memory once and then from cache.
#pragma once
#include "../channel_stats/cpu_channels_last.h"
#include "cpu_small.h"

namespace vcr {
namespace {

constexpr int64_t sample_block = 128 * lanes<float>;  // positions that moments are summed over before the blocks are added up
// Doubles are fewer to a vector, and their blocks' sums aren't added up in anything wider: shorter ones.
template <class A>
inline constexpr int64_t moment_block = sizeof(A) == 4 ? sample_block : 32 * lanes<A>;

// out[k][i] = sum_j (y[j, begin + i] - mu[j]) v[k][j], i < count; lanes past the end are -inf in out[0], 0 in the others. The sum over j
// runs in one order everywhere, so that the backward pass finds the same bits.
template <int P, int count_v, class T>
VCR_INLINE void scores(Tile<T> y, int64_t begin, int64_t count, int64_t p_, const acc_t<T>* mu, const acc_t<T>* const (&v)[count_v],
                       acc_t<T>* const (&out)[count_v]) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>, together = count_v <= 2 ? 4 : 2;
  const int64_t p = P > 0 ? P : p_;
  int64_t i = 0;
  // all vectors in one sweep: the chains of sums over j run side by side
  const auto some_vectors = [&](auto vectors, auto partial, int some) {
    vec<A> x[count_v][vectors() + 1] = {};
    const T* from = y.data + begin + i;
    for (int64_t j = 0; j < p; ++j, from += y.row) {
      const vec<A> m = splat(mu[j]);
      vec<A> centred[vectors() + 1];
      unroll<vectors()>([&](auto K) { centred[K] = load(from + K * W) - m; });
      if constexpr (partial()) centred[vectors()] = load_partial(from + vectors() * W, some) - m;
      unroll<count_v>([&](auto V) {
        const vec<A> w = splat(v[V][j]);
        unroll<vectors() + partial()>([&](auto K) { x[V][K] = fma(centred[K], w, x[V][K]); });
      });
    }
    unroll<count_v>([&](auto V) {
      unroll<vectors()>([&](auto K) { store(out[V] + i + K * W, x[V][K]); });
      if constexpr (partial()) {
        mask_t<A> index;
        for (int k = 0; k < W; ++k) index[k] = k;
        const vec<A> beyond = V() == 0 ? splat(-A(__builtin_inf())) : zeros<A>();
        store(out[V] + i + vectors() * W, index < decltype(index[0] + 0)(some) ? x[V][vectors()] : beyond);
      }
    });
  };
  using yes = std::integral_constant<bool, true>;
  using no = std::integral_constant<bool, false>;
  for (; i + together * W <= count; i += together * W) some_vectors(std::integral_constant<int, together>{}, no{}, 0);
  unroll<together>([&](auto K) {
    if ((count - i) / W != K) return;
    const int some = int((count - i) % W);
    if (some != 0)
      some_vectors(K, yes{}, some);
    else if constexpr (K() > 0)
      some_vectors(K, no{}, 0);
  });
}
template <int P, class T>
VCR_INLINE void logits(Tile<T> y, int64_t begin, int64_t count, int64_t p, const acc_t<T>* mu, const acc_t<T>* v, acc_t<T>* out) {
  scores<P, 1>(y, begin, count, p, mu, {v}, {out});
}

// weights: the logits of all S positions in, exp(logit - maximum) out, 0 in the lanes past the end.
template <class A>
VCR_INLINE Softmax<A> softmax_inplace(A* weights, int64_t S, bool count_ties) {
  constexpr int W = lanes<A>;
  const int64_t padded = round_up(S, W);
  vec<A> top = load(weights), other = top;
  for (int64_t i = W; i < padded; i += 2 * W) {
    top = maximum<A>(top, load(weights + i));
    if (i + W < padded) other = maximum<A>(other, load(weights + i + W));
  }
  top = maximum<A>(top, other);
  Softmax<A> out{hmax<A>(top), 0, 1};
  const vec<A> m = splat(out.maximum);
  if (count_ties) {
    int64_t ties = 0;
    for (int64_t i = 0; i < S; ++i) ties += weights[i] == out.maximum;
    out.ties = A(max(ties, 1));
  }
  double sum = 0;
  for (int64_t block = 0; block < padded; block += sample_block) {
    vec<A> s[4] = {};
    const int64_t end = min(padded, block + sample_block);
    int64_t i = block;
    for (; i + 4 * W <= end; i += 4 * W)
      unroll<4>([&](auto K) {
        const vec<A> e = exp_nonpositive(load(weights + i + K * W) - m);
        store(weights + i + K * W, e);
        s[K] += e;
      });
    for (; i < end; i += W) {
      const vec<A> e = exp_nonpositive(load(weights + i) - m);
      store(weights + i, e);
      s[0] += e;
    }
    sum += double(hsum<A>((s[0] + s[1]) + (s[2] + s[3])));
  }
  out.sum = A(sum);
  return out;
}

// r[j] += sum_i e_i yhat[j, i] over one block.
template <int P, class T>
VCR_INLINE void add_first_moment(Tile<T> y, int64_t begin, int64_t count, int64_t p_, const acc_t<T>* mu, const acc_t<T>* e, acc_t<T>* r) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>, J4 = P > 0 && P % 4 == 0 ? 4 : 1, together = P > 0 && P % W == 0 && W % J4 == 0 ? W : J4;
  const int64_t p = P > 0 ? P : p_;
  for (int64_t j0 = 0; j0 < p; j0 += together) {
    vec<A> sums[together];
    for (int g = 0; g < together; g += J4) {  // eight chains and four means fit into registers
      const T* from = y.data + (j0 + g) * y.row + begin;
      vec<A> acc[J4][2] = {}, m[J4];
      unroll<J4>([&](auto J) { m[J] = splat(mu[j0 + g + J]); });
      int64_t i = 0;
      for (; i + 2 * W <= count; i += 2 * W) {
        const vec<A> w0 = load(e + i), w1 = load(e + i + W);
        unroll<J4>([&](auto J) {
          acc[J][0] = fma(load(from + J * y.row + i) - m[J], w0, acc[J][0]);
          acc[J][1] = fma(load(from + J * y.row + i + W) - m[J], w1, acc[J][1]);
        });
      }
      for_vectors<A>(count - i, [&](int64_t at, auto whole, int some) {
        const vec<A> w = load(e + i + at);
        unroll<J4>([&](auto J) { acc[J][0] = fma(load_some<whole()>(from + J * y.row + i + at, some) - m[J], w, acc[J][0]); });
      });
      unroll<J4>([&](auto J) { sums[g + J] = acc[J][0] + acc[J][1]; });
    }
    if constexpr (together == W) {
      store(r + j0, load(r + j0) + sum_rows<A>(sums));
    } else {
      for (int j = 0; j < together; ++j) r[j0 + j] += hsum<A>(sums[j]);
    }
  }
}

// r = the weighted mean of yhat and nothing else, block by block while it is in L1; v: the scores in units of log2. scratch: attend_block.
// What stands behind a large tile is read next: it is prefetched while the exponentials keep the core busy.
constexpr int64_t attend_block = 64 * lanes<float>;
constexpr int64_t prefetched_tile = 16384;  // bytes

template <int P, class T>
VCR_KERNEL void attend_tile(Tile<T> y, int64_t S, int64_t p, const acc_t<T>* mu, const acc_t<T>* v, acc_t<T>* scratch, acc_t<T>* r) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  const T* next = p * S * int64_t(sizeof(T)) >= prefetched_tile ? y.data + p * y.row : nullptr;
  A *e = scratch, top = 0, sum = 0;
  for (int64_t j = 0; j < p; ++j) r[j] = 0;
  for (int64_t i = 0; i < S; i += attend_block) {
    const int64_t count = min(attend_block, S - i), padded = round_up(count, W);
    logits<P>(y, i, count, p, mu, v, e);
    vec<A> high = load(e);
    for (int64_t k = W; k < padded; k += W) high = maximum<A>(high, load(e + k));
    const A highest = hmax<A>(high);
    if (i == 0) {
      top = highest;
    } else if (highest > top + A(softmax_slack)) {
      const A factor = power_of_two(splat(top - highest))[0];
      for (int64_t j = 0; j < p; ++j) r[j] *= factor;
      sum *= factor;
      top = highest;
    }
    const vec<A> t = splat(top);
    vec<A> s[4] = {};
    int64_t k = 0;
    const auto weigh = [&](auto vectors) {
      unroll<vectors()>([&](auto K) {
        const vec<A> x = power_of_two(load(e + k + K * W) - t);
        store(e + k + K * W, x);
        s[K] += x;
      });
      if (next != nullptr)
        for (int64_t line = 64 / sizeof(T), j = (i + k) * p; j < (i + k + vectors() * W) * p; j += line) prefetch_second_level(next + j);
      k += vectors() * W;
    };
    while (k + 4 * W <= padded) weigh(std::integral_constant<int, 4>{});
    while (k < padded) weigh(std::integral_constant<int, 1>{});
    sum += hsum<A>((s[0] + s[1]) + (s[2] + s[3]));
    add_first_moment<P>(y, i, count, p, mu, e, r);
  }
  const A inverse = A(1) / sum;
  for (int64_t j = 0; j < p; ++j) r[j] *= inverse;
}

// Small p: the symmetric p x p second moment costs fewer multiply-adds than projecting to pt first.
template <int P>
inline constexpr bool full_covariance = P == 4 || P == 8;

// r[j] += sum_i e_i yhat[j, i], moment[j, l] += sum_i e_i yhat[j, i] yhat[l, i] (j <= l) over one block, in 4 x 4 pieces.
template <int P, class T>
VCR_INLINE void add_second_moment(Tile<T> y, int64_t begin, int64_t count, const acc_t<T>* mu, const acc_t<T>* e, acc_t<T>* r,
                                  acc_t<T>* moment) {
  using A = acc_t<T>;
  for (int j0 = 0; j0 < P; j0 += 4) {
    const T* from = y.data + j0 * y.row + begin;
    vec<A> first[4] = {}, second[10] = {};
    for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
      const vec<A> w = load(e + i);
      vec<A> x[4];
      unroll<4>([&](auto J) { x[J] = load_some<whole()>(from + J * y.row + i, some) - splat(mu[j0 + J]); });
      unroll<4>([&](auto J) {
        const vec<A> wx = w * x[J];
        first[J] += wx;
        unroll<4 - J()>([&](auto L) {
          constexpr int at = J() * 4 - J() * (J() - 1) / 2 + L();
          second[at] = fma(wx, x[J() + L()], second[at]);
        });
      });
    });
    int at = 0;
    for (int j = 0; j < 4; ++j) {
      r[j0 + j] += hsum<A>(first[j]);
      for (int l = j; l < 4; ++l) moment[(j0 + j) * P + j0 + l] += hsum<A>(second[at++]);
    }
    for (int l0 = j0 + 4; l0 < P; l0 += 4) {
      const T* other = y.data + l0 * y.row + begin;
      for (int half = 0; half < 4; half += 2) {  // eight sums at a time stay in registers
        vec<A> cross[8] = {};
        for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
          const vec<A> w = load(e + i);
          vec<A> wx[2];
          unroll<2>([&](auto J) { wx[J] = w * (load_some<whole()>(from + (half + J) * y.row + i, some) - splat(mu[j0 + half + J])); });
          unroll<4>([&](auto L) {
            const vec<A> x = load_some<whole()>(other + L * y.row + i, some) - splat(mu[l0 + L]);
            unroll<2>([&](auto J) { cross[J * 4 + L] = fma(wx[J], x, cross[J * 4 + L]); });
          });
        });
        for (int j = 0; j < 2; ++j)
          for (int l = 0; l < 4; ++l) moment[(j0 + half + j) * P + l0 + l] += hsum<A>(cross[j * 4 + l]);
      }
    }
  }
}

// States as wide as vectors, whose lanes go over them.
template <class A, int P, int PT>
inline constexpr bool states_in_lanes = sizeof(A) == 4 && P > 0 && P % 8 == 0 && !full_covariance<P> && PT > 0 && PT % lanes<A> == 0;
// Few states, of a width known when this is compiled: what moments need of a position, yhat . w[:, k], comes out of the sweep for the logits.
template <class A, int P, int PT>
inline constexpr bool projects_with_logits =
    sizeof(A) == 4 && P > 0 && P % 4 == 0 && !full_covariance<P> && !states_in_lanes<A, P, PT> && PT == 4;

// g_k = yhat . w[:, k]; projected[k, i] = e_i g_k(i), G[k] += its sum, moment[j, k] += sum_i yhat[j, i] projected[k, i] over one block.
// With projects_with_logits, `projected` holds g_k.
template <int P, int PT, class T>
VCR_INLINE void add_projected_moment(Tile<T> y, int64_t begin, int64_t count, const Problem& pr, const acc_t<T>* mu, const acc_t<T>* w,
                                     const acc_t<T>* e, acc_t<T>* projected, acc_t<T>* G, acc_t<T>* r, acc_t<T>* moment) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  constexpr bool fixed = P > 0 && P % 4 == 0 && PT > 0 && PT % 4 == 0 && sizeof(A) == 4;
  constexpr bool early = projects_with_logits<A, P, PT>;
  const Width<P, PT> size(pr);
  const int64_t p = size.p(), pt = size.pt(), row = padded_row(early ? pr.S : min(pr.S, sample_block));
  constexpr int KB = fixed ? PT : 1;
  if constexpr (early) {
    vec<A> total[PT] = {};
    for (int64_t i = 0; i < count; i += W) {
      const vec<A> weight = load(e + i);
      unroll<PT>([&](auto K) {
        const vec<A> x = weight * load(projected + K * row + i);
        total[K] += x;
        store(projected + K * row + i, x);
      });
    }
    for (int k = 0; k < PT; ++k) G[k] += hsum<A>(total[k]);
  }
  for (int64_t k0 = early ? pt : 0; k0 < pt; k0 += KB) {
    vec<A> total[KB] = {};
    for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
      vec<A> g[KB] = {};
      const T* from = y.data + begin + i;
      for (int64_t j = 0; j < p; ++j, from += y.row) {
        const vec<A> x = load_some<whole()>(from, some) - splat(mu[j]);
        unroll<KB>([&](auto K) { g[K] = fma(x, splat(w[j * pt + k0 + K]), g[K]); });
      }
      const vec<A> weight = load(e + i);
      unroll<KB>([&](auto K) {
        const vec<A> x = weight * g[K];
        total[K] += x;
        store(projected + (k0 + K) * row + i, x);
      });
    });
    for (int k = 0; k < KB; ++k) G[k0 + k] += hsum<A>(total[k]);
  }
  if constexpr (fixed) {
    constexpr int JB = W / 4;  // JB x 4 sums: as many as one transposed reduction takes
    for (int64_t j0 = 0; j0 < p; j0 += JB) {
      const T* from = y.data + j0 * y.row + begin;
      vec<A> first[JB] = {};
      for (int64_t k0 = 0; k0 < pt; k0 += 4) {
        vec<A> acc[W] = {};
        for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
          vec<A> ag[4];
          unroll<4>([&](auto K) { ag[K] = load(projected + (k0 + K) * row + i); });
          const vec<A> weight = load(e + i);
          unroll<JB>([&](auto J) {
            const vec<A> x = load_some<whole()>(from + J * y.row + i, some) - splat(mu[j0 + J]);
            if (k0 == 0) first[J] = fma(x, weight, first[J]);
            unroll<4>([&](auto K) { acc[J * 4 + K] = fma(x, ag[K], acc[J * 4 + K]); });
          });
        });
        alignas(VCR_VECTOR_BYTES) A sums[W];
        store(sums, sum_rows<A>(acc));
        for (int j = 0; j < JB; ++j)
          for (int k = 0; k < 4; ++k) moment[(j0 + j) * pt + k0 + k] += sums[j * 4 + k];
      }
      for (int j = 0; j < JB; ++j) r[j0 + j] += hsum<A>(first[j]);
    }
  } else {
    add_first_moment<P>(y, begin, count, p, mu, e, r);
    for (int64_t j = 0; j < p; ++j)
      for (int64_t k = 0; k < pt; ++k) {
        vec<A> acc = zeros<A>();
        const T* from = y.data + j * y.row + begin;
        for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
          acc = fma(load_some<whole()>(from + i, some) - splat(mu[j]), load(projected + k * row + i), acc);
        });
        moment[j * pt + k] += hsum<A>(acc);
      }
  }
}

// States as wide as vectors: lanes go over k, so that no sum has lanes to add up. Same result as add_projected_moment, by blocks of
// `state_block` positions whose centred tile stays in L1.
constexpr int64_t state_block = 128;

template <int P, int PT, class T>
VCR_INLINE void add_moment_by_states(Tile<T> y, int64_t begin, int64_t count, const acc_t<T>* mu, const acc_t<T>* w, const acc_t<T>* e,
                                     acc_t<T>* scratch, acc_t<T>* G, acc_t<T>* r, acc_t<T>* moment) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>, KV = PT / W;
  const int64_t row = padded_row(state_block);
  A *centred = scratch, *projected = scratch + P * row;  // [P, row], [positions, PT]
  for (int64_t block = 0; block < count; block += state_block) {
    const int64_t some = min(state_block, count - block), padded = round_up(some, W);
    const A* weight = e + block;
    for (int j = 0; j < P; ++j) {
      const T* from = y.data + j * y.row + begin + block;
      const vec<A> m = splat(mu[j]);
      for_vectors<A>(some, [&](int64_t i, auto whole, int rest) { store(centred + j * row + i, load_some<whole()>(from + i, rest) - m); });
    }
    const Tile<A> tile{centred, row};
    alignas(64) A zero[P] = {};
    add_first_moment<P>(tile, 0, padded, P, zero, weight, r);  // past the end the weight is 0
    vec<A> total[KV] = {};
    int64_t i = 0;
    const auto project = [&](auto positions) {
      constexpr int N = positions();
      vec<A> g[N][KV] = {};
      for (int j = 0; j < P; ++j)
        unroll<KV>([&](auto K) {
          const vec<A> wk = load(w + j * PT + K * W);
          unroll<N>([&](auto I) { g[I][K] = fma(splat(centred[j * row + i + I]), wk, g[I][K]); });
        });
      unroll<N>([&](auto I) {
        unroll<KV>([&](auto K) {
          const vec<A> x = g[I][K] * splat(weight[i + I]);
          total[K] += x;
          store(projected + (i + I) * PT + K * W, x);
        });
      });
      i += N;
    };
    while (i + 8 / KV <= some) project(std::integral_constant<int, 8 / KV>{});
    while (i < some) project(std::integral_constant<int, 1>{});
    unroll<KV>([&](auto K) { store(G + K * W, load(G + K * W) + total[K]); });
    constexpr int JB = 8 / KV;
    for (int j0 = 0; j0 < P; j0 += JB) {
      vec<A> acc[JB][KV] = {};
      const A* from = centred + j0 * row;
      for (int64_t at = 0; at < some; ++at)
        unroll<KV>([&](auto K) {
          const vec<A> x = load(projected + at * PT + K * W);
          unroll<JB>([&](auto J) { acc[J][K] = fma(splat(from[J * row + at]), x, acc[J][K]); });
        });
      unroll<JB>([&](auto J) {
        unroll<KV>([&](auto K) {
          A* to = moment + (j0 + J) * PT + K * W;
          store(to, load(to) + acc[J][K]);
        });
      });
    }
  }
}

// Elements of scratch that sample_tile needs: for what moments are made of, and in all.
VCR_INLINE int64_t projected_scratch(const Problem& pr) {
  return max(pr.pt * padded_row(pr.S), pr.p * padded_row(state_block) + pr.pt * state_block);
}
VCR_INLINE int64_t sample_scratch(const Problem& pr) {
  return round_up(pr.S, 16) + projected_scratch(pr) + pr.p * pr.pt + pr.p * max(pr.p, pr.pt) + pr.pt + 64;
}

// Returns the softmax; writes r [p] and, where R is not null, R [p, pt]. On return scratch begins with exp(logit - maximum) of every position.
template <int P, int PT, class T>
VCR_KERNEL Softmax<acc_t<T>> sample_tile(const Problem& pr, Tile<T> y, const SampleArgs<acc_t<T>>& a, const acc_t<T>* value,
                                         bool count_ties, acc_t<T>* scratch, acc_t<T>* r, acc_t<T>* R) {
  using A = acc_t<T>;
  const Width<P, PT> size(pr);
  const int64_t p = size.p(), pt = size.pt(), S = pr.S;
  A *e = scratch, *projected = e + round_up(S, 16), *w = projected + projected_scratch(pr);
  A *moment = w + p * pt, *G = moment + p * max(p, pt);
  constexpr bool early = projects_with_logits<A, P, PT>;
  if (R != nullptr)
    for (int64_t j = 0; j < p; ++j)
      for (int64_t k = 0; k < pt; ++k) w[early ? k * p + j : j * pt + k] = a.s[j] * value[j * pt + k];
  for (int64_t i = 0; i < S; i += sample_block) {
    const int64_t count = min(sample_block, S - i);
    if constexpr (early)
      if (R != nullptr) {
        A* const g = projected + i;
        const int64_t row = padded_row(S);
        scores<P>(y, i, count, p, a.mu, {a.v, w, w + P, w + 2 * P, w + 3 * P}, {e + i, g, g + row, g + 2 * row, g + 3 * row});
        continue;
      }
    logits<P>(y, i, count, p, a.mu, a.v, e + i);
  }
  const Softmax<A> softmax = softmax_inplace(e, S, count_ties);
  const A inverse = A(1) / softmax.sum;
  for (int64_t j = 0; j < p; ++j) r[j] = 0;
  if (R == nullptr) {
    for (int64_t i = 0; i < S; i += moment_block<A>) add_first_moment<P>(y, i, min(moment_block<A>, S - i), p, a.mu, e + i, r);
    for (int64_t j = 0; j < p; ++j) r[j] *= inverse;
    return softmax;
  }
  if constexpr (full_covariance<P>) {
    for (int64_t j = 0; j < P * P; ++j) moment[j] = 0;
    for (int64_t i = 0; i < S; i += moment_block<A>) add_second_moment<P>(y, i, min(moment_block<A>, S - i), a.mu, e + i, r, moment);
    for (int64_t j = 0; j < P; ++j) r[j] *= inverse;
    for (int j = 0; j < P; ++j)
      for (int l = j; l < P; ++l) {
        const A covariance = difference_of_products(moment[j * P + l], inverse, r[j], r[l]);
        moment[j * P + l] = moment[l * P + j] = covariance;
      }
    for (int64_t j = 0; j < P; ++j)
      for (int64_t k = 0; k < pt; ++k) {
        A x = 0;
        for (int64_t l = 0; l < P; ++l) x += moment[j * P + l] * w[l * pt + k];
        R[j * pt + k] = x;
      }
  } else {
    for (int64_t j = 0; j < p * pt; ++j) moment[j] = 0;
    for (int64_t k = 0; k < pt; ++k) G[k] = 0;
    for (int64_t i = 0; i < S; i += moment_block<A>) {
      if constexpr (states_in_lanes<A, P, PT>)
        add_moment_by_states<P, PT>(y, i, min(moment_block<A>, S - i), a.mu, w, e + i, projected, G, r, moment);
      else
        add_projected_moment<P, PT>(y, i, min(moment_block<A>, S - i), pr, a.mu, w, e + i, early ? projected + i : projected, G, r, moment);
    }
    for (int64_t j = 0; j < p; ++j) r[j] *= inverse;
    for (int64_t k = 0; k < pt; ++k) G[k] *= inverse;
    for (int64_t j = 0; j < p; ++j)
      for (int64_t k = 0; k < pt; ++k) R[j * pt + k] = difference_of_products(moment[j * pt + k], inverse, r[j], G[k]);
  }
  return softmax;
}

}  // namespace
}  // namespace vcr
