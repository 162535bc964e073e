// The fused middle backward: 4R + 1W. Pass 1 sums over the map what the parameters need, then all gradients of size (p, pt) or
// (C, C), then pass 2 writes the map's.
#pragma once
#include "../concept_modulate/cpu_backward.h"
#include "../concept_reason/cpu.h"
#include "../concept_sample/cpu_backward.h"
#include "../concept_sample/cpu_forward.h"
#include "cpu_view.h"

namespace vcr {
namespace {

template <class T, int P, int PT>
struct MiddleBackwardCpu {
  using A = acc_t<T>;
  const MiddleBackward<T>& f;
  const Problem& pr;
  const MiddleOptions& o;
  const MiddleParams<A>& w;
  MiddleSaved<A> saved;
  const int64_t CP, NC, per_group, groups;
  const bool pixel;
  Scratch<A> constants, memory;
  NormView<A> view;
  // [N, C p] each: the modulator's coefficients and sums, what the input's gradient is made of; K1 for pixel modulation.
  A *coefficients, *E0, *E1, *F0, *F1, *K1, *v, *dr, *constant;
  A *rdr, *K0;           // [N, C]
  A *dstate, *dh;        // [N, C, pt]
  A* c1;                 // [C p]
  A *ds, *db;            // [C p]
  A *summed, *attended;  // where these stand, as MiddleBackwardWork has them

  explicit MiddleBackwardCpu(const MiddleBackward<T>& args)
      : f(args), pr(f.problem), o(f.options), w(f.params), saved(pr, f.saved, f.late), CP(pr.channels()), NC(pr.N * pr.C),
        per_group(concepts_per_gather(pr)), groups(concept_groups(pr)), pixel(o.modulation == Modulation::pixel), constants(2 * CP),
        memory(12 * pr.N * CP + 2 * NC + 2 * NC * pr.pt + 3 * CP) {
    view = norm_view(pr, o.norm, saved, w, constants.get());
    A* at = memory.get();
    const auto take = [&at](int64_t count) {
      A* here = at;
      at += count;
      return here;
    };
    coefficients = take(4 * pr.N * CP), v = take(pr.N * CP), dh = take(NC * pr.pt), c1 = take(CP);
    summed = take(MiddleBackwardWork::summed(pr)), attended = take(MiddleBackwardWork::attended(pr));
    at = summed;
    E0 = take(pr.N * CP), E1 = take(pr.N * CP), F0 = take(pr.N * CP), F1 = take(pr.N * CP), K1 = take(pr.N * CP);
    K0 = take(NC), dstate = take(NC * pr.pt), ds = take(CP), db = take(CP);
    at = attended;
    dr = take(pr.N * CP), constant = take(pr.N * CP), rdr = take(NC);
    if (!pixel) F0 = E0, F1 = E1;
  }

  void tick(Pass pass) const {
    if (f.clock != nullptr) f.clock(pass);
  }
  ModulateArgs<A> modulate_args(int64_t n, int64_t c) const {
    const A* at = coefficients + n * CP + c * pr.p;
    const int64_t stride = pr.N * CP;
    return {view.mu + n * view.image_stride + c * pr.p, at, at + stride, at + 2 * stride, at + 3 * stride};
  }
  void recompute_coefficients(int64_t n, int64_t c) const {
    const int64_t at = n * CP + c * pr.p;
    const SampleArgs<A> a = view.concept_args(pr, n, c, nullptr);
    modulate_coefficients<P>(pr.p, pixel, a, saved.abar + at, saved.bbar + at, w.scale_bias + c * pr.p, w.shift_bias + c * pr.p, pr.N * CP,
                             coefficients + at);
    for (int64_t j = 0; j < pr.p; ++j) v[at + j] = a.s[j] * saved.u[at + j];
  }

  // visit(c, y tile, grad_out tile) over positions [begin, begin + count) of concepts [c0, c1); buffer: two sets of rows grad_row apart.
  template <class F>
  void for_block(int64_t n, int64_t c0, int64_t c1, int64_t begin, int64_t count, A* buffer, F visit) const {
    if (f.y.layout() == Layout::contiguous) {
      for (int64_t c = c0; c < c1; ++c)
        visit(c, Tile<T>{f.y.at(n, c * pr.p, begin), f.y.channel}, Tile<T>{f.grad_out.at(n, c * pr.p, begin), f.grad_out.channel});
    } else {
      A* other = buffer + per_group * pr.p * grad_row;
      gather(f.y.at(n, c0 * pr.p, begin), f.y.position, count, (c1 - c0) * pr.p, buffer, grad_row);
      gather(f.grad_out.at(n, c0 * pr.p, begin), f.grad_out.position, count, (c1 - c0) * pr.p, other, grad_row);
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t at = (c - c0) * pr.p * grad_row;
        visit(c, Tile<A>{buffer + at, grad_row}, Tile<A>{other + at, grad_row});
      }
    }
  }
  int64_t block_memory() const { return 2 * per_group * pr.p * grad_row; }

  // Pass 1, channel modulation.
  void sums() const {
    if (f.y.layout() == Layout::contiguous) {
      constexpr int W = lanes<A>;
      for_each(f.pool, NC, [&](int64_t i) {
        const int64_t n = i / pr.C, first = i % pr.C * pr.p, at = n * CP;
        const ModulateArgs<A> m = modulate_args(n, 0);
        int64_t j = first;
        if (pr.S <= short_row<A> && pr.p % W == 0)
          for (; j < first + pr.p; j += W)
            backward_sums_short_rows(f.y.at(n, j, 0), f.y.channel, f.grad_out.at(n, j, 0), f.grad_out.channel, pr.S, m.mu + j, m.A0 + j,
                                     m.B0 + j, E0 + at + j, E1 + at + j);
        for (; j < first + pr.p; ++j)
          backward_sums_row(f.y.at(n, j, 0), f.grad_out.at(n, j, 0), pr.S, m.mu[j], m.A0[j], m.B0[j], E0[at + j], E1[at + j]);
      });
    } else {
      // an image is divided only as far as its shape asks, never by the number of threads
      const int64_t width = 256, chunks = (CP + width - 1) / width;
      for_each(f.pool, pr.N * chunks, [&](int64_t i) {
        const int64_t n = i / chunks, j = i % chunks * width, count = min(width, CP - j), at = n * CP + j;
        const ModulateArgs<A> m = modulate_args(n, 0);
        backward_sums_rows(f.y.at(n, j, 0), f.y.position, f.grad_out.at(n, j, 0), f.grad_out.position, pr.S, count, m.mu + j, m.A0 + j,
                           m.B0 + j, E0 + at, E1 + at);
      });
    }
  }

  // Pass 1, pixel modulation: F0, F1, K0 and K1 = sum k_i yhat_i - K0 (mean of yhat over the maxima), too.
  void pixel_sums_group(int64_t n, int64_t c0, int64_t c1, double* totals, A* attention, A* k, A* buffer) const {
    const int64_t rows = (c1 - c0) * pr.p, stride = per_group * pr.p;
    double *e0 = totals, *e1 = e0 + stride, *f0 = e1 + stride, *f1 = f0 + stride, *k1 = f1 + stride, *top_mean = k1 + stride,
           *k0 = top_mean + stride;
    for (int64_t j = 0; j < 7 * stride; ++j) totals[j] = 0;
    for (int64_t begin = 0, step = sizeof(A) == 4 ? block_of(f.y) : moment_block<A>; begin < pr.S; begin += step) {
      const int64_t count = min(step, pr.S - begin);
      for_block(n, c0, c1, begin, count, buffer, [&](int64_t c, auto y, auto d) {
        const int64_t at = (c - c0) * pr.p;
        const ModulateArgs<A> m = modulate_args(n, c);
        const Softmax<A>& softmax = saved.softmax[n * pr.C + c];
        logits<P>(y, 0, count, pr.p, m.mu, v + n * CP + c * pr.p, attention);
        for (int64_t i = 0; i < count; ++i)
          if (attention[i] == softmax.maximum)
            for (int64_t j = 0; j < pr.p; ++j) top_mean[at + j] += double(widen(y.data[j * y.row + i])) - double(m.mu[j]);
        for (int64_t i = 0; i < count; i += lanes<A>) store(attention + i, exp_nonpositive(load(attention + i) - splat(softmax.maximum)));
        backward_sums_pixel_block(y, d, count, pr.p, m, attention, e0 + at, e1 + at, f0 + at, f1 + at, k);
        double total = 0;
        for (int64_t i = 0; i < count; ++i) {
          k[i] *= attention[i];
          total += double(k[i]);
        }
        k0[c - c0] += total;
        for (int64_t j = 0; j < pr.p; ++j) {
          vec<A> acc = zeros<A>();
          for_vectors<A>(count, [&](int64_t i, auto whole, int some) {
            const vec<A> x = only<whole(), A>(load_some<whole()>(y.data + j * y.row + i, some) - splat(m.mu[j]), some);
            acc = fma(load(k + i), x, acc);
          });
          k1[at + j] += double(hsum<A>(acc));
        }
      });
    }
    for (int64_t j = 0; j < rows; ++j) {
      const int64_t c = j / pr.p, at = n * CP + c0 * pr.p + j;
      const double ties = double(saved.softmax[n * pr.C + c0 + c].ties);
      E0[at] = A(e0[j]), E1[at] = A(e1[j]), F0[at] = A(f0[j]), F1[at] = A(f1[j]);
      K1[at] = A(k1[j] - k0[c] * (top_mean[j] / ties));
    }
    for (int64_t c = c0; c < c1; ++c) K0[n * pr.C + c] = A(k0[c - c0]);
  }
  void pixel_sums() const {
    for_ranges(f.pool, pr.N * groups, [&](int64_t begin, int64_t end) {
      Scratch<double> totals(7 * per_group * pr.p);
      Scratch<A> scratch(2 * in_place_block + block_memory());
      A* at = scratch.get();
      for (int64_t i = begin; i < end; ++i)
        pixel_sums_group(i / groups, i % groups * per_group, min(pr.C, (i % groups + 1) * per_group), totals.get(), at, at + in_place_block,
                         at + 2 * in_place_block);
    });
  }

  // The modulator's parameters and dL/dstate of concept c, and its share of the batch norm's gradients.
  void modulator_gradients_of(int64_t c) const {
    const int64_t p = pr.p, weights = c * p * pr.pt;
    const ModulatorGrads<A> g{offset(f.grads.scale_weight, weights), offset(f.grads.shift_weight, weights), f.grads.scale_bias + c * p,
                              f.grads.shift_bias + c * p};
    for (int64_t j = c * p; j < (c + 1) * p; ++j) ds[j] = db[j] = 0;
    for (int64_t n = 0; n < pr.N; ++n) {
      const int64_t at = n * CP + c * p, k = (n * pr.C + c) * pr.pt;
      modulator_backward<P, PT>(pr, view.concept_args(pr, n, c, nullptr), ModulatorSums<A>{E0 + at, E1 + at, F0 + at, F1 + at},
                                saved.state + k, offset(w.scale_weight, weights), offset(w.shift_weight, weights), g,
                                ModulatorNormGrads<A>{saved.abar + at, w.scale_bias + c * p, ds + c * p, db + c * p}, dstate + k);
      for (int64_t i = 0; i < pr.pt; ++i)
        if (saved.state[k + i] <= 0) dstate[k + i] = 0;  // the state's ReLU; NaN passes
    }
  }

  void state_norm_gradients() const {
    Scratch<double> memory(2 * pr.pt);
    const StateNorm norm{memory.get(), memory.get() + pr.pt};
    saved_state_norm(pr.pt, saved.state_norm, norm);
    normalise_states_backward(NC, pr.pt, o.state_batch, saved.g, norm, w.state_weight, dstate, f.grads.state_weight, f.grads.state_bias);
  }
  void edge_gradients() const {
    Scratch<A> partial(o.edges == Edges::dynamic_edges ? NC * pr.pt : 0);
    reasoner_edges_backward(f.pool, pr.N, pr.C, pr.pt, o.edges, saved.h, w.edge, saved.edges, dstate, dh, f.grads.edge, partial.get());
  }

  // The sampler's parameters and the batch norm's of concept c; what pass 2 needs per (image, channel).
  void sampler_gradients(int64_t c, A* scratch) const {
    const Width<P, PT> size(pr);
    const int64_t p = size.p(), pt = size.pt(), weights = c * p * pt;
    const SampleGrads<A> g{f.grads.value + weights,
                           offset(f.grads.query, weights),
                           offset(f.grads.key, weights),
                           offset(f.grads.logit, c * p),
                           ds + c * p,
                           db + c * p};
    for (int64_t n = 0; n < pr.N; ++n) {
      const int64_t at = n * CP + c * p, k = (n * pr.C + c) * pt;
      sample_backward<P, PT>(pr, o.sampler, view.concept_args(pr, n, c, nullptr), w.value + weights, offset(w.query, weights),
                             offset(w.key, weights), dh + k, saved.u + at, saved.r + at, saved.q + k, saved.R + at * pt,
                             pixel ? K1 + at : nullptr, g, dr + at, v + at, constant + at, rdr[n * pr.C + c], scratch);
    }
    if (o.norm == Norm::none) return;
    const A count = A(pr.N) * A(pr.S);
    for (int64_t j = c * p; j < (c + 1) * p; ++j) {
      if (f.grads.norm_weight != nullptr) f.grads.norm_weight[j] = saved.rstd[j] * ds[j];
      if (f.grads.norm_bias != nullptr) f.grads.norm_bias[j] = db[j];
    }
    if (o.norm != Norm::batch) return;
    for (int64_t j = c * p; j < (c + 1) * p; ++j) {
      c1[j] = -saved.s[j] * saved.rstd[j] * saved.rstd[j] * ds[j] / count;
      db[j] *= -saved.s[j] / count;  // c0
    }
    add_c0(c, db);
  }
  void add_c0(int64_t c, const A* c0) const {
    for (int64_t n = 0; n < pr.N; ++n)
      for (int64_t j = c * pr.p; j < (c + 1) * pr.p; ++j) constant[n * CP + j] += c0[j];
  }

  template <bool pixel_modulation>
  void input_grad(int64_t n, int64_t c0, int64_t c1_, A* scratch, A* buffer) const {
    for (int64_t begin = 0, step = block_of(f.y); begin < pr.S; begin += step) {
      const int64_t count = min(step, pr.S - begin);
      for_block(n, c0, c1_, begin, count, buffer, [&](int64_t c, auto y, auto d) {
        const int64_t at = n * CP + c * pr.p;
        const InputGradArgs<A> g{modulate_args(n, c),
                                 v + at,
                                 dr + at,
                                 constant + at,
                                 c1 + c * pr.p,
                                 nullptr,
                                 saved.softmax[n * pr.C + c],
                                 rdr[n * pr.C + c],
                                 pixel ? K0[n * pr.C + c] : A(0),
                                 o.sampler != Sampler::pool,
                                 streams<T>(pr) && f.y.layout() == Layout::contiguous};
        if (f.y.layout() == Layout::contiguous)
          input_grad_block<P, pixel_modulation, true>(y, d, f.dy.at(n, c * pr.p, begin), f.dy.channel, begin, count, pr.S, pr.p, g,
                                                      scratch);
        else  // over the gathered grad_out, which is read at the same place just before
          input_grad_block<P, pixel_modulation, true>(y, d, const_cast<A*>(reinterpret_cast<const A*>(d.data)), grad_row, begin, count,
                                                      pr.S, pr.p, g, scratch);
      });
      if (f.y.layout() != Layout::contiguous)
        scatter(buffer + per_group * pr.p * grad_row, grad_row, count, (c1_ - c0) * pr.p, f.dy.at(n, c0 * pr.p, begin), f.dy.position);
    }
  }
  // Pass 2 of a channels_last map with the paper's widths, where nothing needs to be transposed.
  void input_grad_channels_last() const {
    Scratch<A> repeated(3 * pr.N * CP);
    A *maximum = repeated.get(), *inverse = maximum + pr.N * CP, *rdr_ = inverse + pr.N * CP;
    for (int64_t i = 0; i < NC; ++i)
      for (int64_t j = i * pr.p; j < (i + 1) * pr.p; ++j) {
        maximum[j] = saved.softmax[i].maximum;
        inverse[j] = A(1) / saved.softmax[i].sum;
        rdr_[j] = rdr[i];
      }
    const int64_t size = max(16, round_up(16384 / CP, 16)), chunks = (pr.S + size - 1) / size;
    for_each(f.pool, pr.N * chunks, [&](int64_t i) {
      const int64_t n = i / chunks, begin = i % chunks * size, at = n * CP;
      const ModulateArgs<A> m = modulate_args(n, 0);
      const NaturalInputGrad<A> g{m.mu, m.A0, m.B0, v + at, dr + at, constant + at, c1, maximum + at, inverse + at, rdr_ + at};
      input_grad_natural<P>(f.y, f.grad_out, f.dy, n, begin, min(pr.S, begin + size), CP, g, streams<T>(pr));
      if (streams<T>(pr)) finish_stream();
    });
  }
  void input_grad_all() const {
    if constexpr (natural_channels_last<A, P>)
      if (f.y.layout() == Layout::channels_last && !pixel && o.sampler != Sampler::pool && CP % max(P, lanes<A>) == 0)
        return input_grad_channels_last();
    for_ranges(f.pool, pr.N * groups, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(input_grad_scratch() + block_memory());
      A* buffer = scratch.get() + input_grad_scratch();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / groups, c0 = i % groups * per_group, c_end = min(pr.C, c0 + per_group);
        if (pixel)
          input_grad<true>(n, c0, c_end, scratch.get(), buffer);
        else
          input_grad<false>(n, c0, c_end, scratch.get(), buffer);
        if (streams<T>(pr)) finish_stream();
      }
    });
  }

  void zero_gradients() const {
    const int64_t weights = CP * pr.pt;
    for (A* to : {f.grads.value, f.grads.query, f.grads.key, f.grads.scale_weight, f.grads.shift_weight}) fill_zero(to, weights);
    for (A* to : {f.grads.logit, f.grads.scale_bias, f.grads.shift_bias, c1}) fill_zero(to, CP);
  }

  void coefficients_and_sums() const {
    recompute_all();
    if (pixel)
      pixel_sums();
    else
      sums();
    tick(Pass::modulate_backward_sums);
    zero_gradients();
    for_each(f.pool, pr.C, [&](int64_t c) { modulator_gradients_of(c); });
  }
  void recompute_all() const {
    for_each(f.pool, NC, [&](int64_t i) { recompute_coefficients(i / pr.C, i % pr.C); });
  }
  void edges_and_sampler() const {
    edge_gradients();
    for_ranges(f.pool, pr.C, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(sample_backward_scratch(pr));
      for (int64_t c = begin; c < end; ++c) sampler_gradients(c, scratch.get());
    });
    tick(Pass::small_gradients);
  }

  // Of several ops, each with what the one before it left.
  static void copy(const A* from, int64_t count, A* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
  StateNorm given_norm() const { return {const_cast<double*>(f.state_norm), const_cast<double*>(f.state_norm) + pr.pt}; }
  void run_sums() const {
    coefficients_and_sums();
    state_norm_sums(NC, pr.pt, saved.g, given_norm(), dstate, f.state_sums, f.state_sums + pr.pt);
    copy(summed, MiddleBackwardWork::summed(pr), f.summed);
  }
  void run_states() const {
    copy(f.summed, MiddleBackwardWork::summed(pr), summed);
    zero_gradients();
    state_norm_input_grad(NC, pr.pt, saved.g, given_norm(), w.state_weight, f.state_shares, f.state_shares + pr.pt, dstate);
    edges_and_sampler();
    copy(ds, CP, f.norm_sums);
    copy(db, CP, f.norm_sums + CP);
    copy(attended, MiddleBackwardWork::attended(pr), f.attended);
  }
  void run_input() const {
    copy(f.summed, MiddleBackwardWork::summed(pr), summed);
    copy(f.attended, MiddleBackwardWork::attended(pr), attended);
    recompute_all();
    fill_zero(c1, CP);
    if (f.norm_shares != nullptr) {
      for (int64_t j = 0; j < CP; ++j) {
        c1[j] = -saved.s[j] * saved.rstd[j] * saved.rstd[j] * f.norm_shares[j];
        db[j] = -saved.s[j] * f.norm_shares[CP + j];
      }
      for (int64_t c = 0; c < pr.C; ++c) add_c0(c, db);
    }
    input_grad_all();
    tick(Pass::middle_input_grad);
  }

  void run() const {
    switch (f.step) {
      case BackwardStep::sums: return run_sums();
      case BackwardStep::states: return run_states();
      case BackwardStep::input: return run_input();
      case BackwardStep::whole: break;
    }
    coefficients_and_sums();
    state_norm_gradients();
    edges_and_sampler();
    input_grad_all();
    tick(Pass::middle_input_grad);
  }
};

}  // namespace
}  // namespace vcr
