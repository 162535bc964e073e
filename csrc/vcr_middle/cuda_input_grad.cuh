// The middle's last pass, middle_input_grad; 2R + 1W, or 1R + 1W where nothing was modulated (the sampler alone). With e = grad_out where the
// ReLU let through:
//   dy_i = s (M~_i abar + b_scale) e_i + a_i dr + dl_i v + constant + c0 + c1 yhat_i,
//   dl_i = a_i (yhat_i . dr - r . dr) [+ M~_i k_i - (i is a maximum) K0 / ties] [+ a_i (da_i - sum a da): the attention's own gradient]
// Its blocks also finish the parameters' gradients, a slice each.
#pragma once
#include "cuda_backward.cuh"

namespace vcr::cuda {

// The groups' sums, and where their totals go (null: nobody asks). Empty for the sampler alone.
template <class A>
struct FinishGradients {
  PartialRow row;
  const A* partial;  // [groups, row] or null
  int64_t groups;
  const A* rstd;
  MiddleGrads<A> to;

  VCR_DEVICE A total(int64_t at) const {
    A x = 0;
    for (int64_t g = 0; g < groups; ++g) x += partial[g * row.size() + at];
    return x;
  }
  VCR_DEVICE void finish(int64_t at) const {
    if (at < row.vector(0)) {
      const int which = int(at / row.weights);
      A* out = which == 0 ? to.value : which == 1 ? to.query : which == 2 ? to.key : which == 3 ? to.scale_weight : to.shift_weight;
      if (out != nullptr) out[at % row.weights] = total(at);
    } else if (at < row.edge()) {
      const int which = int((at - row.vector(0)) / row.channels);
      const int64_t j = (at - row.vector(0)) % row.channels;
      A* out = which == 0 ? to.logit : which == 1 ? to.scale_bias : which == 2 ? to.shift_bias : which == 3 ? to.norm_weight : to.norm_bias;
      if (out != nullptr) out[j] = total(at) * (which == 3 ? rstd[j] : A(1));
    } else if (to.edge != nullptr) {
      to.edge[at - row.edge()] = total(at);
    }
  }
};

template <class T, bool modulated>
struct MiddleInputGrad {
  using A = acc_t<T>;
  static constexpr int threads = 256, resident = sizeof(A) == 4 ? 2 : 1;
  struct Args {
    BackwardView<T> view;  // without modulation: problem, y, last, norm and softmax; pixel is not set
    Map<T> dy;
    int concepts, block, chunk;
    Sampler sampler;
    const A *u, *dr, *constant, *rdr;  // u: view.u, which is there without modulation, too
    const A* K0;                       // [N, C], pixel
    const A *dattention, *attended;    // [N, C, S] and its sum weighted by the attention [N, C]; or null
    bool batch;                        // the norm's statistics are the batch's: its gradient reaches every position
    FinishGradients<A> gradients;
  };
  struct Shared {
    SharedArray<T> y, d;
    ModulatorShared<A> m;
    SharedArray<A> v, dr, constant, c1;  // [rows]
    SharedArray<A> a, dl, M;             // [concepts, block]
    VCR_BOTH Shared(SharedCarver& carve, const Args& g)
        : y(carve.take<T>(tile_elements<T>(g.view.last, g.concepts * int(g.view.problem.p), g.block))),
          d(carve.take<T>(g.view.pixel ? tile_elements<T>(g.view.last, g.concepts * int(g.view.problem.p), g.block) : 0)),
          m(carve, g.concepts * g.view.problem.p) {
      const int64_t rows = g.concepts * g.view.problem.p, positions = int64_t(g.concepts) * g.block;
      v = carve.take<A>(rows), dr = carve.take<A>(rows), constant = carve.take<A>(rows), c1 = carve.take<A>(rows);
      a = carve.take<A>(positions), dl = carve.take<A>(positions), M = carve.take<A>(g.view.pixel ? positions : 0);
    }
  };
  VCR_BOTH static int64_t units(const Args& g) {
    return g.view.problem.N * quotient_up(g.view.problem.C, g.concepts) * quotient_up(g.view.problem.S, g.chunk);
  }

  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& g, int64_t unit) {
    const BackwardView<T>& view = g.view;
    const Problem& pr = view.problem;
    SharedCarver carve{t.shared()};
    const Shared s(carve, g);
    const int64_t blocks = quotient_up(pr.C, g.concepts), chunks = quotient_up(pr.S, g.chunk);
    const int64_t chunk = unit % chunks, c0 = unit / chunks % blocks * g.concepts, n = unit / chunks / blocks, first = c0 * pr.p;
    const int concepts = int(least(g.concepts, pr.C - c0)), p = int(pr.p), rows = concepts * p;
    for_threads(t, rows, [&](int i) { prologue(g, s, n, first, i); });
    const int64_t end = least(pr.S, (chunk + 1) * g.chunk);
    for (int64_t begin = chunk * g.chunk; begin < end; begin += g.block) {
      const int count = int(least(g.block, end - begin));
      const Part<const T> y = part_of(view.y, view.last, n, first, rows, begin, count);
      const Tile<T> ys = tile_of(s.y.get(), y, g.block);
      Tile<T> ds{nullptr, 0, 0};
      Part<const T> d{nullptr, 0, 0, 0, view.last};
      if constexpr (modulated) d = part_of(view.grad_out, view.last, n, first, rows, begin, count);
      if (modulated || g.sampler != Sampler::pool) stage(t, y, ys);  // else the features don't matter
      if (view.pixel) {
        ds = tile_of(s.d.get(), d, g.block);
        stage(t, d, ds);
      }
      t.sync();
      if (g.sampler != Sampler::pool) {
        for_threads(t, concepts * count, [&](int at) { weigh(g, s, ys, ds, n, c0, begin, int(at) / count, int(at) % count); });
        t.sync();
      }
      const Part<T> dy = part_of(g.dy, view.last, n, first, rows, begin, count);
      if (view.pixel)
        store<true>(t, g, s, ys, ds, d, dy);
      else
        store<false>(t, g, s, ys, ds, d, dy);
      t.sync();
    }
    if (g.gradients.partial == nullptr) return;
    const int64_t all = units(g) * t.count();
    for (int64_t at = unit * t.count() + t.index(); at < g.gradients.row.size(); at += all) g.gradients.finish(at);
  }

  VCR_DEVICE static void prologue(const Args& g, const Shared& s, int64_t n, int64_t first, int64_t i) {
    const BackwardView<T>& view = g.view;
    const int64_t CP = view.problem.C * view.problem.p, j = first + i, at = n * CP + j;
    const Normalised<A> z = view.norm.at(n, j, CP);
    if constexpr (modulated) {
      modulator_of(view, n, first, i, s.m, s.v.get());
    } else {
      s.m.keep(i, true, z.mu, Coefficients<A>{0, 0, 0, 0});
      s.v[i] = z.s * g.u[at];
    }
    s.dr[i] = g.dr[at];
    A constant = g.constant[at], c1 = 0;
    if (g.batch) {
      const A rstd = g.gradients.rstd[j], count = A(view.problem.N) * A(view.problem.S);
      constant -= z.s * g.gradients.total(g.gradients.row.vector(4) + j) / count;
      c1 = -z.s * rstd * rstd * g.gradients.total(g.gradients.row.vector(3) + j) / count;
    }
    s.constant[i] = constant;
    s.c1[i] = c1;
  }
  // a, dl and M~ of one position.
  VCR_DEVICE static void weigh(const Args& g, const Shared& s, const Tile<T>& y, const Tile<T>& d, int64_t n, int64_t c0, int64_t begin,
                               int c, int i) {
    const int p = int(g.view.problem.p), at = c * g.block + i;
    const int64_t image = n * g.view.problem.C + c0 + c;
    const Softmax<A> softmax = g.view.softmax[image];
    A l = 0, through = 0;
    for (int j = c * p; j < (c + 1) * p; ++j) {
      const A x = y.at(j, i) - s.m.mu[j];
      l = multiply_add(x, s.v[j], l);
      through = multiply_add(x, s.dr[j], through);
    }
    const A M = exponential(l - softmax.maximum), a = M / softmax.sum;
    through -= g.rdr[image];
    if (g.dattention != nullptr) through += g.dattention[image * g.view.problem.S + begin + i] - g.attended[image];
    A dl = a * through;
    if (g.view.pixel) {
      A k = 0;
      for (int j = c * p; j < (c + 1) * p; ++j) {
        const Coefficients<A> m = s.m.at(j);
        const A x = y.at(j, i) - s.m.mu[j], e = where_active(pre_activation(m, M, slope_at(m, M), x), d.at(j, i));
        k = multiply_add(e, multiply_add(m.A1, x, m.B1), k);
      }
      dl = multiply_add(M, k, dl);
      if (l == softmax.maximum) dl -= g.K0[image] / softmax.ties;
      s.M[at] = M;
    }
    s.a[at] = a;
    s.dl[at] = dl;
  }
  template <bool pixel, class Thread>
  VCR_DEVICE static void store(Thread& t, const Args& g, const Shared& s, const Tile<T>& y, const Tile<T>& ds, const Part<const T>& d,
                               const Part<T>& dy) {
    constexpr int V = span_size<T>, W = piece_size<V>;
    const int p = int(g.view.problem.p), row = g.block;
    with_layout(dy.last, [&](auto layout) {
      constexpr bool last = decltype(layout)::value;
      for_spans<sizeof(T) == 2 ? 1 : 2>(
          t, dy,
          [&](int r, int k, Span<V> span) {
            if constexpr (pixel)
              return read_tile<last>(ds, r, k, span);
            else if constexpr (modulated)
              return read_features<T>(d.run(r) + k, span);
            else
              return Features<T>{};
          },
          [&](int r, int k, Span<V> span, const Features<T>& grad) {
            const Features<T> features = read_tile<last>(y, r, k, span);
            Features<T> to;
            VCR_UNROLL
            for (int first = 0; first < V; first += W) {
              const Span<W> piece = piece_of(span, first);
              const int at = k + first;
              A x[W], out[W];
              {
                A mu[W], constant[W], c1[W];
                spread<last>(s.m.mu, r, at, piece, mu), spread<last>(s.constant, r, at, piece, constant);
                spread<last>(s.c1, r, at, piece, c1);
                VCR_UNROLL
                for (int e = 0; e < W; ++e) {
                  x[e] = widen(features[first + e]) - mu[e];
                  out[e] = g.batch ? multiply_add(c1[e], x[e], constant[e]) : constant[e];
                }
              }
              if (g.sampler != Sampler::pool) {
                A a[W], dl[W], dr[W], v[W];
                share<last>(s.a, row, p, r, at, piece, a), share<last>(s.dl, row, p, r, at, piece, dl);
                spread<last>(s.dr, r, at, piece, dr), spread<last>(s.v, r, at, piece, v);
                VCR_UNROLL
                for (int e = 0; e < W; ++e) out[e] = multiply_add(a[e], dr[e], multiply_add(dl[e], v[e], out[e]));
              }
              if constexpr (modulated) {
                A A0[W], B0[W], A1[W] = {}, B1[W] = {}, M[W] = {};
                spread<last>(s.m.A0, r, at, piece, A0), spread<last>(s.m.B0, r, at, piece, B0);
                if constexpr (pixel) {
                  spread<last>(s.m.A1, r, at, piece, A1), spread<last>(s.m.B1, r, at, piece, B1);
                  share<last>(s.M, row, p, r, at, piece, M);
                }
                VCR_UNROLL
                for (int e = 0; e < W; ++e) {
                  const Coefficients<A> m{A0[e], B0[e], A1[e], B1[e]};
                  const A slope = pixel ? slope_at(m, M[e]) : A0[e];
                  const A pre = pixel ? pre_activation(m, M[e], slope, x[e]) : multiply_add(slope, x[e], B0[e]);
                  out[e] = multiply_add(slope, where_active(pre, widen(grad[first + e])), out[e]);
                }
              }
              VCR_UNROLL
              for (int e = 0; e < W; ++e) to.set(first + e, narrow<T>(out[e]));
            }
            write_features(dy.run(r) + k, span, to);
          });
    });
  }
};

}  // namespace vcr::cuda
