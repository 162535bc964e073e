// The middle's backward pass but for the last kernel: modulate_backward_sums (2R), then what is small. Two barriers stand between, one for
// each batch norm: state_gradients gives the sums that the states' norm needs, state_norm_backward uses them, and small_gradients takes
// them to the parameters and to the sums that the map's norm needs, by groups of images that the last kernel adds up.
#pragma once
#include "../concept_modulate/cuda_modulate.cuh"
#include "args.h"

namespace vcr::cuda {

// What one pass over y and grad_out finds: e = grad_out where the ReLU let through, sums over an image's positions.
template <class A>
struct ModulatorSums_ {
  A *E0, *E1;  // [N, C p] sum e, sum e yhat
  A *F0, *F1;  // the same weighted by M~; for channel modulation the same arrays
  A* K1;       // [N, C p] pixel: sum k yhat - K0 (mean of yhat over the maxima), k_i = M~_i sum_ch e_i (A1 yhat_i + B1)
  A* K0;       // [N, C] pixel: sum k
};

// What the map-sized backward kernels know of the forward pass.
template <class T>
struct BackwardView {
  using A = acc_t<T>;
  Problem problem;
  Map<const T> y, grad_out;
  bool last, pixel;
  NormSeen<A> norm;
  const A *u, *abar, *bbar;  // [N, C p]
  const Softmax<A>* softmax;
  const A *scale_bias, *shift_bias;
};
// A channel's coefficients as the forward pass had them, and v.
template <class T>
VCR_DEVICE void modulator_of(const BackwardView<T>& a, int64_t n, int64_t first, int64_t i, const ModulatorShared<acc_t<T>>& m,
                             acc_t<T>* v) {
  using A = acc_t<T>;
  const int64_t CP = a.problem.C * a.problem.p, j = first + i, at = n * CP + j;
  const Normalised<A> z = a.norm.at(n, j, CP);
  m.keep(i, true, z.mu, modulator_coefficients(a.pixel, z, a.abar[at], a.bbar[at], a.scale_bias[j], a.shift_bias[j]));
  v[i] = z.s * a.u[at];
}
template <class A>
VCR_DEVICE A where_active(A pre, A grad) {
  return pre <= 0 ? A(0) : grad;  // NaN passes
}

template <class T>
struct ModulateBackwardSums {
  using A = acc_t<T>;
  static constexpr int threads = 256, resident = sizeof(A) == 4 ? 3 : 2;
  struct Args {
    BackwardView<T> view;
    int concepts, block;
    ModulatorSums_<A> to;
  };
  struct Shared {
    SharedArray<T> y, d;
    ModulatorShared<A> m;
    SharedArray<A> v, M, k, l;                        // [rows]; [concepts, block] each
    SharedArray<double> E0, E1, F0, F1, K1, top, K0;  // [rows]; top: sum of yhat over the maxima; K0 [concepts]
    VCR_BOTH Shared(SharedCarver& carve, const Args& a)
        : y(carve.take<T>(tile_elements<T>(a.view.last, a.concepts * int(a.view.problem.p), a.block))),
          d(carve.take<T>(tile_elements<T>(a.view.last, a.concepts * int(a.view.problem.p), a.block))),
          m(carve, a.concepts * a.view.problem.p) {
      const int64_t rows = a.concepts * a.view.problem.p, weights = a.view.pixel ? int64_t(a.concepts) * a.block : 0;
      v = carve.take<A>(rows), M = carve.take<A>(weights), k = carve.take<A>(weights), l = carve.take<A>(weights);
      E0 = carve.take<double>(rows), E1 = carve.take<double>(rows);
      const int64_t more = a.view.pixel ? rows : 0;
      F0 = carve.take<double>(more), F1 = carve.take<double>(more), K1 = carve.take<double>(more), top = carve.take<double>(more);
      K0 = carve.take<double>(a.view.pixel ? a.concepts : 0);
    }
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.view.problem.N * quotient_up(a.view.problem.C, a.concepts); }

  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t unit) {
    const BackwardView<T>& view = a.view;
    const Problem& pr = view.problem;
    SharedCarver carve{t.shared()};
    const Shared s(carve, a);
    const int64_t blocks = quotient_up(pr.C, a.concepts), n = unit / blocks, c0 = unit % blocks * a.concepts, first = c0 * pr.p;
    const int64_t CP = pr.C * pr.p;
    const int concepts = int(least(a.concepts, pr.C - c0)), p = int(pr.p), rows = concepts * p;
    for_threads(t, rows, [&](int i) {
      modulator_of(view, n, first, i, s.m, s.v.get());
      s.E0[i] = s.E1[i] = 0;
      if (view.pixel) s.F0[i] = s.F1[i] = s.K1[i] = s.top[i] = 0;
    });
    if (view.pixel) for_threads(t, concepts, [&](int c) { s.K0[c] = 0; });
    for (int64_t begin = 0; begin < pr.S; begin += a.block) {
      const int count = int(least(a.block, pr.S - begin));
      const Part<const T> y = part_of(view.y, view.last, n, first, rows, begin, count);
      const Part<const T> d = part_of(view.grad_out, view.last, n, first, rows, begin, count);
      const Tile<T> ys = tile_of(s.y.get(), y, a.block), ds = tile_of(s.d.get(), d, a.block);
      stage(t, y, ys);
      stage(t, d, ds);
      t.sync();
      if (view.pixel) {
        for_threads(t, concepts * count, [&](int at) { weigh(a, s, ys, ds, n, c0, int(at) / count, int(at) % count); });
        t.sync();
      }
      for_warps(t, rows + (view.pixel ? concepts : 0), [&](int x) {
        if (x >= rows)
          add_concept(t, a, s, int(x - rows), count);
        else if (view.pixel)
          add_pixel_row(t, a, s, ys, ds, n, c0, int(x), count);
        else
          add_row(t, s, ys, ds, int(x), count);
      });
      t.sync();
    }
    for_threads(t, rows, [&](int i) {
      const int64_t at = n * CP + first + i;
      a.to.E0[at] = A(s.E0[i]), a.to.E1[at] = A(s.E1[i]);
      if (!view.pixel) return;
      a.to.F0[at] = A(s.F0[i]), a.to.F1[at] = A(s.F1[i]);
      const int c = i / p;
      a.to.K1[at] = A(s.K1[i] - s.K0[c] * (s.top[i] / double(view.softmax[n * pr.C + c0 + c].ties)));
    });
    if (view.pixel) for_threads(t, concepts, [&](int c) { a.to.K0[n * pr.C + c0 + c] = A(s.K0[c]); });
  }

  template <class Thread>
  VCR_DEVICE static void add_row(Thread& t, const Shared& s, const Tile<T>& y, const Tile<T>& d, int j, int count) {
    const Coefficients<A> m = s.m.at(j);
    const A mu = s.m.mu[j];
    A e0 = 0, e1 = 0;
    for (int i = t.lane(); i < count; i += warp_size) {
      const A x = y.at(j, i) - mu, e = where_active(multiply_add(m.A0, x, m.B0), d.at(j, i));
      e0 += e;
      e1 = multiply_add(e, x, e1);
    }
    e0 = t.reduce(e0, Sum{});
    e1 = t.reduce(e1, Sum{});
    if (t.lane() == 0) s.E0[j] += double(e0), s.E1[j] += double(e1);
  }
  // M~ and k of one position.
  VCR_DEVICE static void weigh(const Args& a, const Shared& s, const Tile<T>& y, const Tile<T>& d, int64_t n, int64_t c0, int c, int i) {
    const int p = int(a.view.problem.p), at = c * a.block + i;
    A l = 0;
    for (int j = c * p; j < (c + 1) * p; ++j) l = multiply_add(y.at(j, i) - s.m.mu[j], s.v[j], l);
    const A M = exponential(l - a.view.softmax[n * a.view.problem.C + c0 + c].maximum);
    A k = 0;
    for (int j = c * p; j < (c + 1) * p; ++j) {
      const Coefficients<A> m = s.m.at(j);
      const A x = y.at(j, i) - s.m.mu[j], e = where_active(pre_activation(m, M, slope_at(m, M), x), d.at(j, i));
      k = multiply_add(e, multiply_add(m.A1, x, m.B1), k);
    }
    s.l[at] = l;
    s.M[at] = M;
    s.k[at] = k * M;
  }
  template <class Thread>
  VCR_DEVICE static void add_concept(Thread& t, const Args& a, const Shared& s, int c, int count) {
    const A k = warp_sum<A>(t, count, [&](int i) { return s.k[c * a.block + i]; });
    if (t.lane() == 0) s.K0[c] += double(k);
  }
  template <class Thread>
  VCR_DEVICE static void add_pixel_row(Thread& t, const Args& a, const Shared& s, const Tile<T>& y, const Tile<T>& d, int64_t n, int64_t c0,
                                       int j, int count) {
    const int c = j / int(a.view.problem.p);
    const Coefficients<A> m = s.m.at(j);
    const A mu = s.m.mu[j], maximum = a.view.softmax[n * a.view.problem.C + c0 + c].maximum;
    A e0 = 0, e1 = 0, f0 = 0, f1 = 0, k1 = 0, top = 0;
    for (int i = t.lane(); i < count; i += warp_size) {
      const int at = c * a.block + i;
      const A M = s.M[at], x = y.at(j, i) - mu, e = where_active(pre_activation(m, M, slope_at(m, M), x), d.at(j, i)), weighed = M * e;
      e0 += e;
      e1 = multiply_add(e, x, e1);
      f0 += weighed;
      f1 = multiply_add(weighed, x, f1);
      k1 = multiply_add(s.k[at], x, k1);
      if (s.l[at] == maximum) top += x;
    }
    e0 = t.reduce(e0, Sum{}), e1 = t.reduce(e1, Sum{}), f0 = t.reduce(f0, Sum{}), f1 = t.reduce(f1, Sum{});
    k1 = t.reduce(k1, Sum{}), top = t.reduce(top, Sum{});
    if (t.lane() != 0) return;
    s.E0[j] += double(e0), s.E1[j] += double(e1), s.F0[j] += double(f0), s.F1[j] += double(f1);
    s.K1[j] += double(k1), s.top[j] += double(top);
  }
};

// Image n: dL/d(state before its ReLU), and what the states' batch norm needs of it. Grid: images.
template <class A>
struct StateGradients {
  static constexpr int threads = 256, resident = 2;
  struct Args {
    Problem problem;
    NormSeen<A> norm;
    const A *F0, *F1, *state, *g;          // sums; [N, C, pt]
    const A* kept;                         // see kept_state_norm
    const A *scale_weight, *shift_weight;  // [C, pt, p] or null
    A* dstate;                             // [N, C, pt]
    double* parts;                         // [N, 2, pt]: sums of dstate and of dstate (G - mean)
  };
  struct Shared {
    VCR_BOTH Shared(SharedCarver&, const Args&) {}
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.problem.N; }
  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t n) {
    const Problem& pr = a.problem;
    const int64_t CP = pr.C * pr.p, p = pr.p, pt = pr.pt, states = n * pr.C * pt;
    for_threads(t, pr.C * pt, [&](int i) {
      const int c = i / int(pt);
      const int64_t weight = i * p;
      A d = 0;
      for (int64_t j = 0; j < p; ++j) {
        const int64_t at = n * CP + c * p + j;
        if (a.scale_weight != nullptr) {
          const Normalised<A> z = a.norm.at(n, c * p + j, CP);
          d = multiply_add(multiply_add(z.s, a.F1[at], z.b * a.F0[at]), a.scale_weight[weight + j], d);
        }
        if (a.shift_weight != nullptr) d = multiply_add(a.F0[at], a.shift_weight[weight + j], d);
      }
      a.dstate[states + i] = a.state[states + i] <= 0 ? A(0) : d;  // NaN passes
    });
    t.sync();
    state_sums(t, pr.C, pt, a.kept, a.g + states, a.dstate + states, a.parts + 2 * n * pt);
  }
  template <class Thread>
  VCR_DEVICE static void state_sums(Thread& t, int64_t C, int64_t pt, const A* kept, const A* g, const A* dstate, double* parts) {
    for_warps(t, pt, [&](int k) {
      const double mean = kept_state_norm(kept, pt, k).mean;
      const double d = warp_sum<double>(t, C, [&](int c) { return double(dstate[c * pt + k]); });
      const double product = warp_sum<double>(t, C, [&](int c) { return double(dstate[c * pt + k]) * (double(g[c * pt + k]) - mean); });
      if (t.lane() == 0) parts[k] = d, parts[pt + k] = product;
    });
  }
};

// Image n: dL/dG through the states' batch norm. Grid: images.
template <class A>
struct StateNormBackward {
  static constexpr int threads = 256, resident = 2;
  struct Args {
    int64_t N, C, pt;
    bool batch;
    const A *dstate, *g;
    const double* parts;      // of StateGradients
    const A *weight, *kept;   // see kept_state_norm
    A *dg, *dweight, *dbias;  // the last two may be null
  };
  struct Shared {
    SharedArray<double> mean, rstd, sum, product;  // [pt]
    VCR_BOTH Shared(SharedCarver& carve, const Args& a) {
      mean = carve.take<double>(a.pt), rstd = carve.take<double>(a.pt), sum = carve.take<double>(a.pt), product = carve.take<double>(a.pt);
    }
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.N; }
  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t n) {
    SharedCarver carve{t.shared()};
    const Shared s(carve, a);
    const int64_t pt = a.pt;
    const double count = double(a.N) * double(a.C);
    for_warps(t, pt, [&](int k) {
      const auto [mean, rstd] = kept_state_norm(a.kept, pt, k);
      const double sum = warp_sum<double>(t, a.N, [&](int i) { return a.parts[2 * i * pt + k]; });
      const double product = warp_sum<double>(t, a.N, [&](int i) { return a.parts[(2 * i + 1) * pt + k]; }) * rstd;
      if (t.lane() != 0) return;
      s.mean[k] = mean, s.rstd[k] = rstd, s.sum[k] = sum, s.product[k] = product;
      if (n != 0) return;
      if (a.dweight != nullptr) a.dweight[k] = A(product);
      if (a.dbias != nullptr) a.dbias[k] = A(sum);
    });
    t.sync();
    for_threads(t, a.C * pt, [&](int i) {
      const int k = i % int(pt);
      const int64_t at = n * a.C * pt + i;
      double d = double(a.dstate[at]);
      if (a.batch) d -= s.sum[k] / count + (double(a.g[at]) - s.mean[k]) * s.rstd[k] * (s.product[k] / count);
      a.dg[at] = A(d * double(value_or(a.weight, k, A(1))) * s.rstd[k]);
    });
  }
};

// dL/dh of concept c in one image, by a warp: dh [pt]. dg, h [C, pt], edges [C, C] are the image's; dynamic: the image's share of column c of
// dL/dWe goes to dedge [pt] (times a stride).
template <class A, class Thread>
VCR_DEVICE void reasoner_backward(Thread& t, Edges kind, int64_t C, int64_t pt, int64_t c, const A* dg, const A* h, const A* edge,
                                  const A* edges, A* dh, A* dedge) {
  for (int64_t k = 0; k < pt; ++k) {
    A sum = 0, into = 0;
    if (kind != Edges::none)
      for (int64_t d = t.lane(); d < C; d += warp_size) {
        if (kind == Edges::static_edges) {
          sum = multiply_add(edge[d * C + c], dg[d * pt + k], sum);
          continue;
        }
        const A row = edges[c * C + d], column = edges[d * C + c];
        A from = 0, to = 0;
        for (int64_t x = 0; x < pt; ++x) {
          from = multiply_add(dg[c * pt + x], h[d * pt + x], from);
          to = multiply_add(dg[d * pt + x], h[c * pt + x], to);
        }
        sum = multiply_add(column, dg[d * pt + k], multiply_add(from * (1 - row * row), edge[k * C + d], sum));
        into = multiply_add(to * (1 - column * column), h[d * pt + k], into);
      }
    sum = t.reduce(sum, Sum{});
    into = t.reduce(into, Sum{});
    if (t.lane() == 0) {
      dh[k] = dg[c * pt + k] + sum;
      if (kind == Edges::dynamic_edges) dedge[k] = into;
    }
  }
}

// Concept c's part of the edges' gradient, summed over images [n0, n1): a column of dL/dWe from the images' shares [N, C, pt], or a row of the
// learned matrix's.
template <class A, class Thread>
VCR_DEVICE void edge_gradient(Thread& t, Edges kind, int64_t n0, int64_t n1, int64_t C, int64_t pt, int64_t c, const A* dg, const A* h,
                              const A* shares, A* dedge) {
  if (kind == Edges::dynamic_edges)
    for_threads(t, pt, [&](int k) {
      A sum = 0;
      for (int64_t n = n0; n < n1; ++n) sum += shares[(n * C + c) * pt + k];
      dedge[k * C + c] = sum;
    });
  if (kind == Edges::static_edges)
    for_threads(t, C, [&](int d) {
      double sum = 0;
      for (int64_t n = n0; n < n1; ++n) {
        A x = 0;
        for (int64_t k = 0; k < pt; ++k) x = multiply_add(dg[(n * C + c) * pt + k], h[(n * C + d) * pt + k], x);
        sum += double(x);
      }
      dedge[c * C + d] = A(sum);
    });
}

// What small_gradients finds of every image, besides the sums.
template <class A>
struct ImageGradients {
  A *dr, *constant;    // [N, C p]: s drbar; what every position of a channel gets: s dzbar / S, for `pool` dr / S
  A *x, *dv, *dzbar;   // [N, C p]: drbar; the gradients of v = s u and of the mean of z
  A *dh, *dq, *dedge;  // [N, C, pt]; dedge: an image's share of column c of dL/dWe
  A* rdr;              // [N, C] r . dr
};
template <class A>
VCR_BOTH ImageGradients<A> image_gradients(Carver& carve, const Problem& pr) {
  const int64_t map = pr.N * pr.C * pr.p, states = pr.N * pr.C * pr.pt;
  ImageGradients<A> to;
  to.dr = carve.take<A>(map), to.constant = carve.take<A>(map);
  to.x = carve.take<A>(map), to.dv = carve.take<A>(map), to.dzbar = carve.take<A>(map);
  to.dh = carve.take<A>(states), to.dq = carve.take<A>(states), to.dedge = carve.take<A>(states);
  to.rdr = carve.take<A>(pr.N * pr.C);
  return to;
}
template <class A>
struct SamplerBackward {
  Problem problem;
  Sampler sampler;
  NormSeen<A> norm;
  SampleWeights<A> weights;
  SampleState<A> saved;  // u, r, q, R are read
  const A* K1;           // [N, C p]: what else reaches v, or null
  ImageGradients<A> to;
};
// One (image, concept) by a warp, from to.dh. Lanes write what other lanes read, so warps are synchronised between.
template <class A, class Thread>
VCR_DEVICE void sampler_backward(Thread& t, const SamplerBackward<A>& a, int64_t n, int64_t c) {
  const Problem& pr = a.problem;
  const int64_t p = pr.p, pt = pr.pt, CP = pr.C * p, channels = n * CP + c * p, states = (n * pr.C + c) * pt, weights = c * p * pt;
  const A* dh = a.to.dh + states;
  A dot = 0;
  for (int64_t j = t.lane(); j < p; j += warp_size) {
    const Normalised<A> z = a.norm.at(n, c * p + j, CP);
    const int64_t at = channels + j;
    A x = 0;
    for (int64_t k = 0; k < pt; ++k) x = multiply_add(a.weights.value[weights + j * pt + k], dh[k], x);
    const A dr = z.s * x;
    a.to.x[at] = x;
    a.to.dr[at] = dr;
    dot = multiply_add(a.saved.r[at], dr, dot);
    if (a.sampler == Sampler::pool) {
      a.to.constant[at] = dr / A(pr.S);
      continue;
    }
    A dv = a.K1 != nullptr ? a.K1[at] : A(0);
    for (int64_t k = 0; k < pt; ++k) dv = multiply_add(a.saved.R[at * pt + k], dh[k], dv);
    a.to.constant[at] = 0;
    a.to.dv[at] = dv;
  }
  dot = t.reduce(dot, Sum{});
  if (t.lane() == 0) a.to.rdr[n * pr.C + c] = dot;
  if (a.sampler != Sampler::dynamic_query) return;
  t.sync_warp();
  const A scale = A(1) / square_root(A(pt));
  for (int64_t k = t.lane(); k < pt; k += warp_size) {
    A dq = 0;
    for (int64_t j = 0; j < p; ++j) {
      const A du = a.norm.at(n, c * p + j, CP).s * a.to.dv[channels + j];
      dq = multiply_add(a.weights.key[weights + j * pt + k], du * scale, dq);
    }
    a.to.dq[states + k] = dq;
  }
  t.sync_warp();
  for (int64_t j = t.lane(); j < p; j += warp_size) {
    A dzbar = 0;
    for (int64_t k = 0; k < pt; ++k) dzbar = multiply_add(a.weights.query[weights + j * pt + k], a.to.dq[states + k], dzbar);
    a.to.dzbar[channels + j] = dzbar;
    a.to.constant[channels + j] = a.norm.at(n, c * p + j, CP).s * dzbar / A(pr.S);
  }
}
// The sums over images [n0, n1) of the gradients of value, query and key, entry (j, k) of concept c, and of the logit's, s's and b's.
template <class A>
struct WeightSums {
  A value, query, key;
};
template <class A>
VCR_DEVICE WeightSums<A> sampler_weight_sums(const SamplerBackward<A>& a, int64_t n0, int64_t n1, int64_t c, int64_t j, int64_t k) {
  const Problem& pr = a.problem;
  const int64_t CP = pr.C * pr.p, channel = c * pr.p + j;
  const A scale = A(1) / square_root(A(pr.pt));
  WeightSums<A> sums{0, 0, 0};
  for (int64_t n = n0; n < n1; ++n) {
    const int64_t at = n * CP + channel, state = (n * pr.C + c) * pr.pt + k;
    const Normalised<A> z = a.norm.at(n, channel, CP);
    sums.value = multiply_add(multiply_add(z.s, a.saved.r[at], z.b), a.to.dh[state], sums.value);
    if (a.sampler != Sampler::dynamic_query) continue;
    sums.query = multiply_add(multiply_add(z.s, z.mhat, z.b), a.to.dq[state], sums.query);
    sums.key = multiply_add(z.s * a.to.dv[at] * scale, a.saved.q[state], sums.key);
  }
  return sums;
}

// Where a group's sums stand in its row of `partial`.
struct PartialRow {
  int64_t weights, channels, edges;  // C p pt; C p; pt C, C C or 0
  VCR_BOTH int64_t size() const { return 5 * weights + 5 * channels + edges; }
  // value, query, key, scale_weight, shift_weight; logit, scale_bias, shift_bias, ds, db
  VCR_BOTH int64_t weight(int which) const { return which * weights; }
  VCR_BOTH int64_t vector(int which) const { return 5 * weights + which * channels; }
  VCR_BOTH int64_t edge() const { return 5 * weights + 5 * channels; }
};
VCR_BOTH PartialRow partial_row(const Problem& pr, Edges edges) {
  return {pr.C * pr.p * pr.pt, pr.C * pr.p, edges == Edges::dynamic_edges ? pr.pt * pr.C : edges == Edges::static_edges ? pr.C * pr.C : 0};
}

// Concept c over a group of images. A warp takes an image as far as the vectors that its gradients are products of; then threads sum the
// products over the images in order. Grid: groups of images, concepts.
template <class A>
struct SmallGradients {
  static constexpr int threads = 128, resident = 3;
  struct Args {
    SamplerBackward<A> sampler;
    Edges edges;
    int64_t per_group;
    const A *dg, *h, *edge, *kept_edges;  // [N, C, pt]; [N, C, C]
    ModulatorSums_<A> sums;
    const A *abar, *state, *scale_bias;
    A* partial;  // [groups, PartialRow]
  };
  struct Shared {
    VCR_BOTH Shared(SharedCarver&, const Args&) {}
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.sampler.problem.C * quotient_up(a.sampler.problem.N, a.per_group); }

  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t unit) {
    const SamplerBackward<A>& sampler = a.sampler;
    const Problem& pr = sampler.problem;
    const int64_t c = unit % pr.C, group = unit / pr.C, n0 = group * a.per_group, n1 = least(pr.N, n0 + a.per_group);
    const int64_t p = pr.p, pt = pr.pt, CP = pr.C * p;
    for_warps(t, n1 - n0, [&](int i) {
      const int64_t n = n0 + i, image = n * pr.C * pt, mine = image + c * pt;
      reasoner_backward(t, a.edges, pr.C, pt, c, a.dg + image, a.h + image, a.edge, offset(a.kept_edges, n * pr.C * pr.C),
                        sampler.to.dh + mine, sampler.to.dedge + mine);
      t.sync_warp();
      sampler_backward(t, sampler, n, c);
    });
    t.sync();
    const PartialRow row = partial_row(pr, a.edges);
    A* to = a.partial + group * row.size();
    for_threads(t, p * pt, [&](int i) {
      const int j = i / int(pt), k = i % int(pt);
      const int64_t at = c * p * pt + i, back = c * p * pt + k * p + j;
      const WeightSums<A> sums = sampler_weight_sums(sampler, n0, n1, c, j, k);
      A scale = 0, shift = 0;
      for (int64_t n = n0; n < n1; ++n) {
        const int64_t channel = n * CP + c * p + j;
        const Normalised<A> z = sampler.norm.at(n, c * p + j, CP);
        const A state = a.state[(n * pr.C + c) * pt + k];
        scale = multiply_add(multiply_add(z.s, a.sums.F1[channel], z.b * a.sums.F0[channel]), state, scale);
        shift = multiply_add(a.sums.F0[channel], state, shift);
      }
      to[row.weight(0) + at] = sums.value, to[row.weight(1) + at] = sums.query, to[row.weight(2) + at] = sums.key;
      to[row.weight(3) + back] = scale, to[row.weight(4) + back] = shift;
    });
    for_threads(t, p, [&](int j) { channel_sums(a, to, row, n0, n1, c * p + j); });
    edge_gradient(t, a.edges, n0, n1, pr.C, pt, c, a.dg, a.h, sampler.to.dedge, to + row.edge());
  }
  VCR_DEVICE static void channel_sums(const Args& a, A* to, const PartialRow& row, int64_t n0, int64_t n1, int64_t j) {
    const SamplerBackward<A>& sampler = a.sampler;
    const int64_t CP = sampler.problem.C * sampler.problem.p;
    A logit = 0, scale_bias = 0, shift_bias = 0, ds = 0, db = 0;
    for (int64_t n = n0; n < n1; ++n) {
      const int64_t at = n * CP + j;
      const Normalised<A> z = sampler.norm.at(n, j, CP);
      const A x = sampler.to.x[at], E0 = a.sums.E0[at], E1 = a.sums.E1[at];
      ds += multiply_add(a.abar[at], a.sums.F1[at], a.scale_bias[j] * E1) + sampler.saved.r[at] * x;
      db += multiply_add(a.abar[at], a.sums.F0[at], a.scale_bias[j] * E0) + x;
      scale_bias += multiply_add(z.s, E1, z.b * E0);
      shift_bias += E0;
      if (sampler.sampler == Sampler::pool) continue;
      const A dv = sampler.to.dv[at];
      ds += sampler.saved.u[at] * dv;
      if (sampler.sampler == Sampler::static_query) {
        logit += z.s * dv;
      } else {
        ds += z.mhat * sampler.to.dzbar[at];
        db += sampler.to.dzbar[at];
      }
    }
    to[row.vector(0) + j] = logit, to[row.vector(1) + j] = scale_bias, to[row.vector(2) + j] = shift_bias;
    to[row.vector(3) + j] = ds, to[row.vector(4) + j] = db;
  }
};

}  // namespace vcr::cuda
