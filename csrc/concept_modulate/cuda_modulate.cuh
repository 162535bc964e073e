// Concept modulator (contract stage 4): out = relu((M~ A1 + A0) yhat + M~ B1 + B0), M~ = exp(l - max l); for channel modulation
// relu(A0 (y - centre) + B0). 1R + 1W.
#pragma once
#include <type_traits>

#include "../concept_reason/cuda_reason.cuh"
#include "../concept_sample/args.h"
#include "../cuda/tile.h"
#include "args.h"

namespace vcr::cuda {

// How image n sees the norm before the sampler: z = s (y - mu) + b, and the mean of y - mu. Without a batch norm, s = 1 and each image is
// centred on its own mean.
template <class A>
struct Normalised {
  A mu, s, b, mhat;
};
template <class A>
struct NormSeen {
  bool none;
  const A *mu, *s, *bias, *m;  // [C p]; m [N, C p]
  VCR_DEVICE Normalised<A> at(int64_t n, int64_t j, int64_t CP) const {
    const A mean = m[n * CP + j];
    if (none) return {mean, A(1), mean, A(0)};
    return {mu[j], s[j], value_or(bias, j, A(0)), mean};
  }
};

// Channel modulation's third is the centre: mu, but where alpha is infinite mu - b / s, so that alpha z is alpha s (y - centre) and not a
// difference of infinities.
template <class A>
struct Coefficients {
  A A0, B0, A1, B1;
};
template <class A>
VCR_DEVICE Coefficients<A> modulator_coefficients(bool pixel, const Normalised<A>& z, A abar, A bbar, A scale_bias, A shift_bias) {
  if (pixel) {
    const A B1 = z.b == 0 ? bbar : multiply_add(abar, z.b, bbar);
    return {scale_bias * z.s, multiply_add(scale_bias, z.b, shift_bias), abar * z.s, B1};
  }
  const A alpha = abar + scale_bias, beta = bbar + shift_bias;
  if (alpha - alpha == 0) return {alpha * z.s, multiply_add(alpha, z.b, beta), z.mu, A(0)};
  return {alpha * z.s, beta, z.mu - z.b / z.s, A(0)};
}
template <class A>
VCR_DEVICE A slope_at(const Coefficients<A>& m, A M) {
  return multiply_add(M, m.A1, m.A0);
}
template <class A>
VCR_DEVICE A pre_activation(const Coefficients<A>& m, A M, A slope, A x) {
  return multiply_add(slope, x, multiply_add(M, m.B1, m.B0));
}

// abar[j] = sum_k state[k] w[k, j]; 0 where affine leaves the weight out (null).
template <class A>
VCR_DEVICE A project_state(const A* state, const A* weight, int64_t p, int64_t pt, int64_t j) {
  A x = 0;
  if (weight != nullptr)
    for (int64_t k = 0; k < pt; ++k) x = multiply_add(state[k], weight[k * p + j], x);
  return x;
}

// A block's channels in shared memory.
template <class A>
struct ModulatorShared {
  SharedArray<A> mu, A0, B0, A1, B1;  // [rows]; for channel modulation mu is the centre
  VCR_BOTH ModulatorShared(SharedCarver& carve, int64_t rows) {
    mu = carve.take<A>(rows), A0 = carve.take<A>(rows), B0 = carve.take<A>(rows), A1 = carve.take<A>(rows), B1 = carve.take<A>(rows);
  }
  VCR_DEVICE void keep(int64_t j, bool pixel, A mean, const Coefficients<A>& m) const {
    mu[j] = pixel ? mean : m.A1, A0[j] = m.A0, B0[j] = m.B0, A1[j] = m.A1, B1[j] = m.B1;
  }
  VCR_DEVICE Coefficients<A> at(int j) const { return {A0[j], B0[j], A1[j], B1[j]}; }
};
// What a span's elements take of an array of channels, or of an array of positions.
template <bool along, int V, class A>
VCR_DEVICE void spread(const given<A>* array, int r, int k, Span<V> span, A (&out)[V]) {
  if constexpr (along) {
    read(array + k, span, out);
  } else {
    const A x = array[r];
    VCR_UNROLL
    for (int e = 0; e < V; ++e) out[e] = x;
  }
}

// The same of an array of positions [concepts, row]; p channels share one.
template <bool last, int V, class A>
VCR_DEVICE void share(const given<A>* array, int row, int p, int r, int k, Span<V> span, A (&out)[V]) {
  if constexpr (!last) {
    read(array + r / p * row + k, span, out);
  } else {
    const int first = k + span.lo;
    int c = first / p, left = p - (first - c * p);
    VCR_UNROLL
    for (int e = 0; e < V; ++e) {
      out[e] = 0;
      if (e < span.lo || e >= span.hi) continue;
      out[e] = array[c * row + r];
      if (--left == 0) left = p, ++c;
    }
  }
}
// A span of a tile.
template <bool last, class T>
VCR_DEVICE Features<T> read_tile(const Tile<T>& tile, int r, int k, Span<span_size<T>> span) {
  return read_features<T>(tile.data + r * (last ? tile.column : tile.row) + k, span);
}
// f(true or false): the layout as a constant, so that what a run's elements have in common is kept once.
template <class F>
VCR_DEVICE void with_layout(bool last, F f) {
  if (last)
    f(std::integral_constant<bool, true>{});
  else
    f(std::integral_constant<bool, false>{});
}

// Writes a part. run(r): its features, in global or in shared memory. Of a partial span all is computed and only what is there is written.
template <int ahead, class T, class Thread, class Run>
VCR_DEVICE void modulate_channels(Thread& t, const ModulatorShared<acc_t<T>>& m, const Part<T>& out, Run run) {
  using A = acc_t<T>;
  constexpr int V = span_size<T>, W = piece_size<V>;
  with_layout(out.last, [&](auto layout) {
    constexpr bool last = decltype(layout)::value;
    for_spans<ahead>(
        t, out, [&](int r, int k, Span<V> span) { return read_features<T>(run(r) + k, span); },
        [&](int r, int k, Span<V> span, const Features<T>& y) {
          Features<T> to;
          VCR_UNROLL
          for (int first = 0; first < V; first += W) {
            const Span<W> piece = piece_of(span, first);
            A mu[W], A0[W], B0[W];
            spread<last>(m.mu, r, k + first, piece, mu), spread<last>(m.A0, r, k + first, piece, A0);
            spread<last>(m.B0, r, k + first, piece, B0);
            VCR_UNROLL
            for (int e = 0; e < W; ++e) to.set(first + e, narrow<T>(relu(multiply_add(A0[e], widen(y[first + e]) - mu[e], B0[e]))));
          }
          write_features(out.run(r) + k, span, to);
        });
  });
}
// M [concepts, row] of the part's positions.
template <class T, class Thread>
VCR_DEVICE void modulate_pixels(Thread& t, const ModulatorShared<acc_t<T>>& m, int p, const acc_t<T>* M, int row, const Part<T>& out,
                                const Tile<T>& tile) {
  using A = acc_t<T>;
  constexpr int V = span_size<T>, W = piece_size<V>;
  with_layout(out.last, [&](auto layout) {
    constexpr bool last = decltype(layout)::value;
    for_spans<1>(
        t, out, [](int, int, Span<V>) { return 0; },
        [&](int r, int k, Span<V> span, int) {
          const Features<T> y = read_tile<last>(tile, r, k, span);
          Features<T> to;
          VCR_UNROLL
          for (int first = 0; first < V; first += W) {
            const Span<W> piece = piece_of(span, first);
            const int at = k + first;
            A mu[W], A0[W], B0[W], A1[W], B1[W], weight[W];
            spread<last>(m.mu, r, at, piece, mu), spread<last>(m.A0, r, at, piece, A0), spread<last>(m.B0, r, at, piece, B0);
            spread<last>(m.A1, r, at, piece, A1), spread<last>(m.B1, r, at, piece, B1);
            share<last>(M, row, p, r, at, piece, weight);
            VCR_UNROLL
            for (int e = 0; e < W; ++e) {
              const Coefficients<A> c{A0[e], B0[e], A1[e], B1[e]};
              to.set(first + e, narrow<T>(relu(pre_activation(c, weight[e], slope_at(c, weight[e]), widen(y[first + e]) - mu[e]))));
            }
          }
          write_features(out.run(r) + k, span, to);
        });
  });
}

// ---- the modulator after a reasoner: of the middle

template <class T>
struct ConceptModulate {
  using A = acc_t<T>;
  static constexpr int threads = 256, resident = sizeof(A) == 8 ? 1 : sizeof(T) == 2 ? 2 : 3;
  struct Args {
    Problem problem;
    Map<const T> y;
    Map<T> out;
    bool last, pixel;
    int concepts, block, chunk;  // concepts and positions (chunk) of a block of threads, of which `block` are staged at a time
    Edges edges;
    bool reasoned;  // G is there; else the prologue makes it of h
    NormSeen<A> norm;
    StateNormArgs<A> state_norm;
    const A *edge, *state_weight, *state_bias;
    ModulatorWeights<A> weights;
    const A *u, *h, *g;         // [N, C p]; [N, C, pt]
    const Softmax<A>* softmax;  // [N, C]
    A *state, *abar, *bbar;     // kept for the backward pass, or null
  };
  struct Shared {
    SharedArray<T> tile;
    ModulatorShared<A> m;
    SharedArray<A> v, g, M;
    SharedArray<double> mean, rstd;
    VCR_BOTH Shared(SharedCarver& carve, const Args& a)
        : tile(carve.take<T>(a.pixel ? tile_elements<T>(a.last, a.concepts * int(a.problem.p), a.block) : 0)),
          m(carve, a.concepts * a.problem.p) {
      v = carve.take<A>(a.concepts * a.problem.p);
      g = carve.take<A>(a.concepts * a.problem.pt);
      M = carve.take<A>(a.pixel ? int64_t(a.concepts) * a.block : 0);
      mean = carve.take<double>(a.problem.pt), rstd = carve.take<double>(a.problem.pt);
    }
  };
  VCR_BOTH static int64_t units(const Args& a) {
    return a.problem.N * quotient_up(a.problem.C, a.concepts) * quotient_up(a.problem.S, a.chunk);
  }

  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t unit) {
    const Problem& pr = a.problem;
    SharedCarver carve{t.shared()};
    const Shared s(carve, a);
    const int64_t blocks = quotient_up(pr.C, a.concepts), chunks = quotient_up(pr.S, a.chunk);
    const int64_t chunk = unit % chunks, c0 = unit / chunks % blocks * a.concepts, n = unit / chunks / blocks, first = c0 * pr.p;
    const int concepts = int(least(a.concepts, pr.C - c0)), p = int(pr.p), rows = concepts * p;
    prologue(t, a, s, n, c0, concepts, unit == 0, chunk == 0);
    const int64_t end = least(pr.S, (chunk + 1) * a.chunk);
    if (!a.pixel) {
      const int64_t begin = chunk * a.chunk;
      const Part<const T> y = part_of(a.y, a.last, n, first, rows, begin, int(end - begin));
      modulate_channels<4>(t, s.m, part_of(a.out, a.last, n, first, rows, begin, int(end - begin)), [&](int r) { return y.run(r); });
      return;
    }
    for (int64_t begin = chunk * a.chunk; begin < end; begin += a.block) {
      const int count = int(least(a.block, end - begin));
      const Part<const T> y = part_of(a.y, a.last, n, first, rows, begin, count);
      const Tile<T> tile = tile_of(s.tile.get(), y, a.block);
      stage(t, y, tile);
      t.sync();
      for_threads(t, concepts * count, [&](int at) {
        const int c = int(at) / count, i = int(at) % count;
        A l = 0;
        for (int j = c * p; j < (c + 1) * p; ++j) l = multiply_add(tile.at(j, i) - s.m.mu[j], s.v[j], l);
        s.M[c * a.block + i] = exponential(l - a.softmax[n * pr.C + c0 + c].maximum);
      });
      t.sync();
      modulate_pixels(t, s.m, p, s.M, a.block, part_of(a.out, a.last, n, first, rows, begin, count), tile);
      t.sync();
    }
  }

  // From G, or h, to the coefficients.
  template <class Thread>
  VCR_DEVICE static void prologue(Thread& t, const Args& a, const Shared& s, int64_t n, int64_t c0, int concepts, bool first_block,
                                  bool keep) {
    const Problem& pr = a.problem;
    const int64_t CP = pr.C * pr.p, states = (n * pr.C + c0) * pr.pt;
    find_state_norm(t, a.state_norm, pr.N, pr.C, pr.pt, first_block, s.mean, s.rstd);
    if (a.reasoned)
      for_threads(t, concepts * pr.pt, [&](int i) { s.g[i] = a.g[states + i]; });
    else
      exchange(t, a.edges, pr.C, pr.pt, a.h + n * pr.C * pr.pt, a.edge, c0, concepts, static_cast<A*>(nullptr), s.g.get());
    t.sync();
    for_threads(t, concepts * pr.pt, [&](int i) {
      const int k = i % int(pr.pt);
      s.g[i] = relu(normalised_state(s.g[i], {s.mean[k], s.rstd[k]}, a.state_weight, a.state_bias, k));
      if (keep && a.state != nullptr) a.state[states + i] = s.g[i];
    });
    t.sync();
    for_threads(t, concepts * pr.p, [&](int i) {
      const int p = int(pr.p), c = i / p;
      const int64_t j = c0 * pr.p + i, at = n * CP + j, weight = (c0 + c) * pr.p * pr.pt;
      const A* state = s.g + c * pr.pt;
      const A abar = project_state(state, offset(a.weights.scale_weight, weight), pr.p, pr.pt, i % p);
      const A bbar = project_state(state, offset(a.weights.shift_weight, weight), pr.p, pr.pt, i % p);
      if (keep && a.abar != nullptr) a.abar[at] = abar, a.bbar[at] = bbar;
      const Normalised<A> z = a.norm.at(n, j, CP);
      s.m.keep(i, a.pixel, z.mu, modulator_coefficients(a.pixel, z, abar, bbar, a.weights.scale_bias[j], a.weights.shift_bias[j]));
      if (a.pixel) s.v[i] = z.s * a.u[at];
    });
    t.sync();
  }
};

}  // namespace vcr::cuda
