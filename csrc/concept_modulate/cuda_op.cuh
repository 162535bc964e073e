// The op concept_modulate alone, with an attention that is given: forward 1R + 1W, backward 2R + 1W (a block's sums and its gradient while it
// is on chip).
#pragma once
#include "../vcr_middle/cuda_backward.cuh"

namespace vcr::cuda {

struct MaximumOrNaN {
  template <class V>
  VCR_DEVICE V operator()(V a, V b) const {
    return a != a ? a : b != b ? b : b > a ? b : a;
  }
};
// By a warp: the largest attention, NaN where one of them is.
template <class A, class Thread>
VCR_DEVICE A largest(Thread& t, const A* attention, int64_t S) {
  A top = attention[0];
  for (int64_t i = t.lane(); i < S; i += warp_size) top = MaximumOrNaN{}(top, attention[i]);
  return t.reduce(top, MaximumOrNaN{});
}

template <class T>
struct GivenModulation {  // what both directions take
  using A = acc_t<T>;
  Problem problem;
  Map<const T> z;
  bool last;
  int concepts, block;
  ModulatorWeights<A> weights;
  const A *state, *attention;  // attention null: channel modulation
};
// A block's coefficients, with s = 1 and mu = b = 0, and its concepts' largest attention.
template <class T, class Thread>
VCR_DEVICE void given_coefficients(Thread& t, const GivenModulation<T>& a, int64_t n, int64_t c0, int concepts,
                                   const ModulatorShared<acc_t<T>>& m, acc_t<T>* top) {
  using A = acc_t<T>;
  const Problem& pr = a.problem;
  const int p = int(pr.p);
  for_threads(t, concepts * p, [&](int i) {
    const int c = i / p;
    const int64_t j = c0 * p + i, weight = (c0 + c) * p * pr.pt;
    const A* state = a.state + (n * pr.C + c0 + c) * pr.pt;
    const A abar = project_state(state, offset(a.weights.scale_weight, weight), p, pr.pt, i % p);
    const A bbar = project_state(state, offset(a.weights.shift_weight, weight), p, pr.pt, i % p);
    const bool pixel = a.attention != nullptr;
    m.keep(i, true, A(0),
           modulator_coefficients(pixel, Normalised<A>{0, 1, 0, 0}, abar, bbar, a.weights.scale_bias[j], a.weights.shift_bias[j]));
  });
  if (a.attention != nullptr)
    for_warps(t, concepts, [&](int c) {
      const A x = largest(t, a.attention + (n * pr.C + c0 + c) * pr.S, pr.S);
      if (t.lane() == 0) top[c] = x;
    });
  t.sync();
}

template <class T>
struct ModulateAlone {
  using A = acc_t<T>;
  static constexpr int threads = 256, resident = sizeof(A) == 4 ? 3 : 1;
  struct Args {
    GivenModulation<T> given;
    Map<T> out;
    int chunk;
  };
  struct Shared {
    SharedArray<T> tile;
    ModulatorShared<A> m;
    SharedArray<A> top, M;
    VCR_BOTH Shared(SharedCarver& carve, const Args& a)
        : tile(carve.take<T>(
              a.given.attention != nullptr ? tile_elements<T>(a.given.last, a.given.concepts * int(a.given.problem.p), a.given.block) : 0)),
          m(carve, a.given.concepts * a.given.problem.p) {
      top = carve.take<A>(a.given.concepts);
      M = carve.take<A>(a.given.attention != nullptr ? int64_t(a.given.concepts) * a.given.block : 0);
    }
  };
  VCR_BOTH static int64_t units(const Args& a) {
    const Problem& pr = a.given.problem;
    return pr.N * quotient_up(pr.C, a.given.concepts) * quotient_up(pr.S, a.chunk);
  }
  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& args, int64_t unit) {
    const GivenModulation<T>& a = args.given;
    const Problem& pr = a.problem;
    SharedCarver carve{t.shared()};
    const Shared s(carve, args);
    const int64_t blocks = quotient_up(pr.C, a.concepts), chunks = quotient_up(pr.S, args.chunk), chunk = unit % chunks;
    const int64_t c0 = unit / chunks % blocks * a.concepts, n = unit / chunks / blocks, first = c0 * pr.p;
    const int concepts = int(least(a.concepts, pr.C - c0)), p = int(pr.p), rows = concepts * p;
    given_coefficients(t, a, n, c0, concepts, s.m, s.top.get());
    const int64_t end = least(pr.S, (chunk + 1) * args.chunk);
    if (a.attention == nullptr) {
      const int64_t begin = chunk * args.chunk;
      const Part<const T> z = part_of(a.z, a.last, n, first, rows, begin, int(end - begin));
      modulate_channels<4>(t, s.m, part_of(args.out, a.last, n, first, rows, begin, int(end - begin)), [&](int r) { return z.run(r); });
      return;
    }
    for (int64_t begin = chunk * args.chunk; begin < end; begin += a.block) {
      const int count = int(least(a.block, end - begin));
      const Part<const T> z = part_of(a.z, a.last, n, first, rows, begin, count);
      const Tile<T> tile = tile_of(s.tile.get(), z, a.block);
      stage(t, z, tile);
      for_threads(t, concepts * count, [&](int at) {
        const int c = at / count, i = at % count;
        s.M[c * a.block + i] = a.attention[(n * pr.C + c0 + c) * pr.S + begin + i] / s.top[c];
      });
      t.sync();
      modulate_pixels(t, s.m, p, s.M, a.block, part_of(args.out, a.last, n, first, rows, begin, count), tile);
      t.sync();
    }
  }
};

template <class T>
struct ModulateAloneBackward {
  using A = acc_t<T>;
  static constexpr int threads = 256, resident = 1;
  struct Args {
    GivenModulation<T> given;
    Map<const T> grad_out;
    Map<T> dz;
    ModulatorSums_<A> to;  // E0, E1, F0, F1
    A* dattention;         // or null
  };
  struct Shared {
    SharedArray<T> z, d;
    ModulatorShared<A> m;
    SharedArray<A> top, M;
    SharedArray<double> E0, E1, F0, F1;
    VCR_BOTH Shared(SharedCarver& carve, const Args& args)
        : z(carve.take<T>(tile_elements<T>(args.given.last, args.given.concepts * int(args.given.problem.p), args.given.block))),
          d(carve.take<T>(tile_elements<T>(args.given.last, args.given.concepts * int(args.given.problem.p), args.given.block))),
          m(carve, args.given.concepts * args.given.problem.p) {
      const int64_t rows = args.given.concepts * args.given.problem.p;
      top = carve.take<A>(args.given.concepts), M = carve.take<A>(int64_t(args.given.concepts) * args.given.block);
      E0 = carve.take<double>(rows), E1 = carve.take<double>(rows), F0 = carve.take<double>(rows), F1 = carve.take<double>(rows);
    }
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.given.problem.N * quotient_up(a.given.problem.C, a.given.concepts); }

  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& args, int64_t unit) {
    const GivenModulation<T>& a = args.given;
    const Problem& pr = a.problem;
    SharedCarver carve{t.shared()};
    const Shared s(carve, args);
    const int64_t blocks = quotient_up(pr.C, a.concepts), n = unit / blocks, c0 = unit % blocks * a.concepts, first = c0 * pr.p;
    const int concepts = int(least(a.concepts, pr.C - c0)), p = int(pr.p), rows = concepts * p;
    const bool pixel = a.attention != nullptr;
    for_threads(t, rows, [&](int j) { s.E0[j] = s.E1[j] = s.F0[j] = s.F1[j] = 0; });
    given_coefficients(t, a, n, c0, concepts, s.m, s.top.get());
    for (int64_t begin = 0; begin < pr.S; begin += a.block) {
      const int count = int(least(a.block, pr.S - begin));
      const Part<const T> z = part_of(a.z, a.last, n, first, rows, begin, count),
                          d = part_of(args.grad_out, a.last, n, first, rows, begin, count);
      const Tile<T> zs = tile_of(s.z.get(), z, a.block), ds = tile_of(s.d.get(), d, a.block);
      stage(t, z, zs);
      stage(t, d, ds);
      for_threads(t, concepts * count, [&](int at) {
        const int c = at / count, i = at % count;
        s.M[c * a.block + i] = pixel ? a.attention[(n * pr.C + c0 + c) * pr.S + begin + i] / s.top[c] : A(0);
      });
      t.sync();
      if (pixel) for_threads(t, concepts * count, [&](int at) { through(args, s, zs, ds, n, c0, begin, at / count, at % count); });
      for_warps(t, rows, [&](int j) { add_row(t, a, s, zs, ds, j, count); });
      store(t, a, s, zs, ds, part_of(args.dz, a.last, n, first, rows, begin, count));
      t.sync();
    }
    for_threads(t, rows, [&](int j) {
      const int64_t at = n * pr.C * pr.p + first + j;
      args.to.E0[at] = A(s.E0[j]), args.to.E1[at] = A(s.E1[j]);
      args.to.F0[at] = A(pixel ? s.F0[j] : s.E0[j]), args.to.F1[at] = A(pixel ? s.F1[j] : s.E1[j]);
    });
    if (pixel) for_warps(t, concepts, [&](int c) { attention_gradient(t, a, args.dattention, s.top[c], n * pr.C + c0 + c); });
  }
  // dL/dM~ of one position.
  VCR_DEVICE static void through(const Args& args, const Shared& s, const Tile<T>& z, const Tile<T>& d, int64_t n, int64_t c0,
                                 int64_t begin, int c, int i) {
    const GivenModulation<T>& a = args.given;
    const int p = int(a.problem.p);
    const A M = s.M[c * a.block + i];
    A k = 0;
    for (int j = c * p; j < (c + 1) * p; ++j) {
      const Coefficients<A> m = s.m.at(j);
      const A x = z.at(j, i);
      k = multiply_add(where_active(pre_activation(m, M, slope_at(m, M), x), d.at(j, i)), multiply_add(m.A1, x, m.B1), k);
    }
    args.dattention[(n * a.problem.C + c0 + c) * a.problem.S + begin + i] = k;
  }
  VCR_DEVICE static A active(const GivenModulation<T>& a, const Coefficients<A>& m, A M, A x, A grad) {
    return where_active(a.attention != nullptr ? pre_activation(m, M, slope_at(m, M), x) : multiply_add(m.A0, x, m.B0), grad);
  }
  template <class Thread>
  VCR_DEVICE static void add_row(Thread& t, const GivenModulation<T>& a, const Shared& s, const Tile<T>& z, const Tile<T>& d, int j,
                                 int count) {
    const Coefficients<A> m = s.m.at(j);
    const A* M = s.M + j / int(a.problem.p) * a.block;
    A e0 = 0, e1 = 0, f0 = 0, f1 = 0;
    for (int i = t.lane(); i < count; i += warp_size) {
      const A x = z.at(j, i), e = active(a, m, M[i], x, d.at(j, i)), weighed = M[i] * e;
      e0 += e;
      e1 = multiply_add(e, x, e1);
      f0 += weighed;
      f1 = multiply_add(weighed, x, f1);
    }
    e0 = t.reduce(e0, Sum{}), e1 = t.reduce(e1, Sum{}), f0 = t.reduce(f0, Sum{}), f1 = t.reduce(f1, Sum{});
    if (t.lane() == 0) s.E0[j] += double(e0), s.E1[j] += double(e1), s.F0[j] += double(f0), s.F1[j] += double(f1);
  }
  template <class Thread>
  VCR_DEVICE static void store(Thread& t, const GivenModulation<T>& a, const Shared& s, const Tile<T>& z, const Tile<T>& d,
                               const Part<T>& dz) {
    constexpr int V = span_size<T>;
    const int p = int(a.problem.p);
    const bool last = a.last, pixel = a.attention != nullptr;
    for_spans<1>(
        t, dz, [](int, int, Span<V>) { return 0; },
        [&](int r, int k, Span<V> span, int) {
          Features<T> to;
          VCR_UNROLL
          for (int e = 0; e < V; ++e) {
            T out{};
            if (e >= span.lo && e < span.hi) {
              const int j = last ? k + e : r, i = last ? r : k + e;
              const Coefficients<A> m = s.m.at(j);
              const A M = s.M[j / p * a.block + i];
              out = narrow<T>((pixel ? slope_at(m, M) : m.A0) * active(a, m, M, z.at(j, i), d.at(j, i)));
            }
            to.set(e, out);
          }
          write_features(dz.run(r) + k, span, to);
        });
  }
  // dL/dM = dL/dM~ / max M, less the maximum's share, which ties share evenly. By a warp.
  template <class Thread>
  VCR_DEVICE static void attention_gradient(Thread& t, const GivenModulation<T>& a, A* dattention, A top, int64_t image) {
    const int64_t S = a.problem.S;
    const A* M = a.attention + image * S;
    A* to = dattention + image * S;
    double sum = 0, ties = 0;
    for (int64_t i = t.lane(); i < S; i += warp_size) {
      sum += double(M[i]) * double(to[i]);
      ties += M[i] == top ? 1 : 0;
    }
    sum = t.reduce(sum, Sum{}), ties = t.reduce(ties, Sum{});
    const A share = A(sum / (double(top) * double(top) * (ties > 0 ? ties : 1)));
    for (int64_t i = t.lane(); i < S; i += warp_size) to[i] = to[i] / top - (M[i] == top ? share : A(0));
  }
};

// One concept's gradients, over all images in order. Grid: concepts.
template <class A>
struct ModulateGradients {
  static constexpr int threads = 256, resident = 2;
  struct Args {
    Problem problem;
    ModulatorWeights<A> weights;
    ModulatorSums_<A> sums;
    const A* state;
    A *dstate, *dscale_weight, *dshift_weight, *dscale_bias, *dshift_bias;  // weights' null where affine leaves them out
  };
  struct Shared {
    VCR_BOTH Shared(SharedCarver&, const Args&) {}
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.problem.C; }
  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t c) {
    const Problem& pr = a.problem;
    const int p = int(pr.p), pt = int(pr.pt);
    const int64_t CP = pr.C * p, first = c * p, weight = c * p * pt;
    for_threads(t, pr.N * pt, [&](int x) {
      const int k = x % pt;
      const int64_t n = x / pt;
      A d = 0;
      for (int j = 0; j < p; ++j) {
        const int64_t at = n * CP + first + j;
        if (a.weights.scale_weight != nullptr) d = multiply_add(a.sums.F1[at], a.weights.scale_weight[weight + k * p + j], d);
        if (a.weights.shift_weight != nullptr) d = multiply_add(a.sums.F0[at], a.weights.shift_weight[weight + k * p + j], d);
      }
      a.dstate[(n * pr.C + c) * pt + k] = d;
    });
    for_threads(t, pt * p, [&](int x) {
      const int k = x / p, j = x % p;
      A scale = 0, shift = 0;
      for (int64_t n = 0; n < pr.N; ++n) {
        const A state = a.state[(n * pr.C + c) * pt + k];
        const int64_t at = n * CP + first + j;
        scale = multiply_add(a.sums.F1[at], state, scale);
        shift = multiply_add(a.sums.F0[at], state, shift);
      }
      if (a.dscale_weight != nullptr) a.dscale_weight[weight + x] = scale;
      if (a.dshift_weight != nullptr) a.dshift_weight[weight + x] = shift;
    });
    for_threads(t, p, [&](int j) {
      A scale = 0, shift = 0;
      for (int64_t n = 0; n < pr.N; ++n) scale += a.sums.E1[n * CP + first + j], shift += a.sums.E0[n * CP + first + j];
      a.dscale_bias[first + j] = scale;
      a.dshift_bias[first + j] = shift;
    });
  }
};

}  // namespace vcr::cuda
