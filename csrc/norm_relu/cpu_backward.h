// The gradients of norm_relu with the batch's statistics. With g = grad_out where the ReLU let something through, yhat = y - mean,
// k = weight rstd and n positions:   dy = k (g - sum g / n - yhat rstd^2 sum (g yhat) / n),   dshortcut = g.
// Pass 1 takes the sums (2R; with a shortcut 3R + 1W, which is dshortcut), pass 2 writes dy (2R + 1W). Contiguous channels go through both
// while they are in cache.
#pragma once
#include "../concept_modulate/cpu.h"
#include "cpu.h"

namespace vcr {
namespace {

constexpr int64_t gated_rows_together = 2;

template <class T>
class NormReluBackwardCpu {
  using A = acc_t<T>;
  const NormReluBackward<T>& f;
  const bool shortcut_, stream_;
  Scratch<A> memory_;
  ChannelAffine<A> norm_;
  A *k0_, *k1_, *k2_;  // dy = k0 g + k1 + k2 yhat

  // ---- pass 1, of one image: E0 = sum g, E1 = sum g yhat

  // One contiguous row of a map with a shortcut; writes g.
  VCR_KERNEL void gated_row(int64_t n, int64_t j, A& E0, A& E1) const {
    constexpr int W = lanes<A>;
    const T *y = f.y.at(n, j, 0), *out = f.out.at(n, j, 0), *d = f.grad_out.at(n, j, 0);
    T* to = f.dshortcut.at(n, j, 0);
    const vec<A> mu = splat(norm_.centre[j]);
    double total0 = 0, total1 = 0;
    for (int64_t block = 0; block < f.S; block += sample_block) {
      const int64_t end = min(f.S, block + sample_block);
      vec<A> e0[2] = {}, e1[2] = {};
      const auto take = [&](auto K, int64_t i, auto whole, int some) {
        const vec<A> g = where_active<A>(load_some<whole()>(out + i, some), load_some<whole()>(d + i, some));
        store_some<whole()>(to + i, g, some);
        e0[K] += g;
        e1[K] = fma(g, only<whole(), A>(load_some<whole()>(y + i, some) - mu, some), e1[K]);
      };
      int64_t i = block;
      for (; i + 2 * W <= end; i += 2 * W) unroll<2>([&](auto K) { take(K, i + K * W, std::integral_constant<bool, true>{}, W); });
      for_vectors<A>(end - i, [&](int64_t at, auto whole, int some) { take(std::integral_constant<int, 0>{}, i + at, whole, some); });
      total0 += double(hsum<A>(e0[0] + e0[1]));
      total1 += double(hsum<A>(e1[0] + e1[1]));
    }
    E0 = A(total0);
    E1 = A(total1);
  }
  // Contiguous channels [begin, end).
  void contiguous_sums(int64_t n, int64_t begin, int64_t end, A* E0, A* E1) const {
    constexpr int W = lanes<A>;
    int64_t j = begin;
    if (!shortcut_ && f.S <= short_row<A>)
      for (; j + W <= end; j += W)
        backward_sums_short_rows(f.y.at(n, j, 0), f.y.channel, f.grad_out.at(n, j, 0), f.grad_out.channel, f.S, norm_.centre + j,
                                 norm_.slope + j, norm_.offset + j, E0 + j - begin, E1 + j - begin);
    for (; j < end; ++j) {
      A &e0 = E0[j - begin], &e1 = E1[j - begin];
      if (shortcut_)
        gated_row(n, j, e0, e1);
      else
        backward_sums_row(f.y.at(n, j, 0), f.grad_out.at(n, j, 0), f.S, norm_.centre[j], norm_.slope[j], norm_.offset[j], e0, e1);
    }
  }
  // Channels [j0, j0 + count) of a channels_last image with a shortcut; writes g. Two rows at a time: there are four maps, and more rows of
  // each would be more streams than memory delivers at its best.
  VCR_KERNEL void gated_rows(int64_t n, int64_t j0, int64_t count, A* E0, A* E1) const {
    const int64_t padded = round_up(count, lanes<A>);
    Scratch<A> running(2 * padded);
    Scratch<double> totals(2 * padded);
    A *run0 = running.get(), *run1 = run0 + padded;
    fill_zero(totals.get(), 2 * padded);
    for (int64_t i = 0; i < f.S; i += merged_rows) {
      const int64_t end = min(f.S, i + merged_rows);
      fill_zero(run0, 2 * padded);
      int64_t r = i;
      const auto block = [&](auto height) {
        const T *y = f.y.at(n, j0, r), *out = f.out.at(n, j0, r), *d = f.grad_out.at(n, j0, r);
        T* to = f.dshortcut.at(n, j0, r);
        const bool stream = stream_ && can_stream(to) && can_stream(to + f.dshortcut.position);
        for_vectors<A>(count, [&](int64_t j, auto whole, int some) {
          const vec<A> mu = load_some<whole()>(norm_.centre + j0 + j, some);
          vec<A> e0[2] = {}, e1[2] = {};
          unroll<height()>([&](auto R) {
            const vec<A> o = load_some<whole()>(out + R * f.out.position + j, some);
            const vec<A> g = where_active<A>(o, load_some<whole()>(d + R * f.grad_out.position + j, some));
            if (whole() && stream)
              store_stream(to + R * f.dshortcut.position + j, g);
            else
              store_some<whole()>(to + R * f.dshortcut.position + j, g, some);
            e0[R % 2] += g;
            e1[R % 2] = fma(g, load_some<whole()>(y + R * f.y.position + j, some) - mu, e1[R % 2]);
          });
          store(run0 + j, load(run0 + j) + (e0[0] + e0[1]));
          store(run1 + j, load(run1 + j) + (e1[0] + e1[1]));
        });
        r += height();
      };
      while (r + gated_rows_together <= end) block(std::integral_constant<int, gated_rows_together>{});
      while (r < end) block(std::integral_constant<int, 1>{});
      for (int64_t j = 0; j < 2 * padded; ++j) totals.get()[j] += double(run0[j]);
    }
    for (int64_t j = 0; j < count; ++j) E0[j] = A(totals.get()[j]), E1[j] = A(totals.get()[padded + j]);
  }
  void channels_last_sums(A* E0, A* E1) const {                            // [N, channels] each
    const int64_t width = 256, chunks = (f.channels + width - 1) / width;  // never by the number of threads
    for_each(f.pool, f.N * chunks, [&](int64_t i) {
      const int64_t n = i / chunks, j = i % chunks * width, count = min(width, f.channels - j), at = n * f.channels + j;
      if (shortcut_)
        gated_rows(n, j, count, E0 + at, E1 + at);
      else
        backward_sums_rows(f.y.at(n, j, 0), f.y.position, f.grad_out.at(n, j, 0), f.grad_out.position, f.S, count, norm_.centre + j,
                           norm_.slope + j, norm_.offset + j, E0 + at, E1 + at);
    });
  }

  // The parameters' gradients of channel j, and what dy is made of; an image's sums are `stride` from the next's.
  void finish_channel(int64_t j, int64_t stride, const A* E0, const A* E1) const {
    double e0 = 0, e1 = 0;
    for (int64_t n = 0; n < f.N; ++n) e0 += double(E0[n * stride]), e1 += double(E1[n * stride]);
    const double rstd = 1.0 / __builtin_sqrt(double(f.norm.var[j]) + f.norm.eps), count = double(f.N) * double(f.S);
    f.dweight[j] = A(e1 * rstd);
    f.dbias[j] = A(e0);
    const double k = f.norm.weight ? double(f.norm.weight[j]) * rstd : rstd;
    k0_[j] = A(k), k1_[j] = A(-k * (e0 / count)), k2_[j] = A(-k * rstd * rstd * (e1 / count));
  }

  // ---- pass 2

  template <bool shortcut>
  VCR_KERNEL void write_contiguous(int64_t n, int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; ++j) {
      const T *y = f.y.at(n, j, 0), *d = shortcut ? f.dshortcut.at(n, j, 0) : f.grad_out.at(n, j, 0);
      const vec<A> mu = splat(norm_.centre[j]), a = splat(norm_.slope[j]), b = splat(norm_.offset[j]);
      const vec<A> k0 = splat(k0_[j]), k1 = splat(k1_[j]), k2 = splat(k2_[j]);
      write_row(f.dy.at(n, j, 0), f.S, stream_, [&](int64_t i, auto whole, int some) {
        const vec<A> x = load_some<whole()>(y + i, some) - mu;
        vec<A> g = load_some<whole()>(d + i, some);
        if constexpr (!shortcut) g = where_active<A>(fma(a, x, b), g);
        return fma(k0, g, fma(k2, x, k1));
      });
    }
  }
  template <bool shortcut>
  VCR_KERNEL void write_channels_last(int64_t n, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const T *y = f.y.at(n, 0, i), *d = shortcut ? f.dshortcut.at(n, 0, i) : f.grad_out.at(n, 0, i);
      write_row(f.dy.at(n, 0, i), f.channels, stream_, [&](int64_t j, auto whole, int some) {
        const auto at = [&](const A* numbers) { return load_some<whole()>(numbers + j, some); };
        const vec<A> x = load_some<whole()>(y + j, some) - at(norm_.centre);
        vec<A> g = load_some<whole()>(d + j, some);
        if constexpr (!shortcut) g = where_active<A>(fma(at(norm_.slope), x, at(norm_.offset)), g);
        return fma(at(k0_), g, fma(at(k2_), x, at(k1_)));
      });
    }
  }

  void contiguous_channels() const {
    const int64_t size = channels_together<T>(f.N, f.S, shortcut_ ? 3 : 2), groups = (f.channels + size - 1) / size;
    for_ranges(f.pool, groups, [&](int64_t first, int64_t last) {
      Scratch<A> sums(2 * f.N * size);
      A *E0 = sums.get(), *E1 = E0 + f.N * size;
      for (int64_t g = first; g < last; ++g) {
        const int64_t begin = g * size, end = min(f.channels, begin + size);
        for (int64_t n = 0; n < f.N; ++n) contiguous_sums(n, begin, end, E0 + n * size, E1 + n * size);
        for (int64_t j = begin; j < end; ++j) finish_channel(j, size, E0 + j - begin, E1 + j - begin);
        for (int64_t n = 0; n < f.N; ++n) shortcut_ ? write_contiguous<true>(n, begin, end) : write_contiguous<false>(n, begin, end);
      }
      if (stream_) finish_stream();
    });
  }
  void channels_last_batch() const {
    Scratch<A> sums(2 * f.N * f.channels);
    A *E0 = sums.get(), *E1 = E0 + f.N * f.channels;
    channels_last_sums(E0, E1);
    for_each(f.pool, f.channels, [&](int64_t j) { finish_channel(j, f.channels, E0 + j, E1 + j); });
    const int64_t size = max(1, 32768 / max(1, f.channels)), chunks = (f.S + size - 1) / size;
    for_each(f.pool, f.N * chunks, [&](int64_t i) {
      const int64_t n = i / chunks, begin = i % chunks * size, end = min(f.S, begin + size);
      shortcut_ ? write_channels_last<true>(n, begin, end) : write_channels_last<false>(n, begin, end);
      if (stream_) finish_stream();
    });
  }

 public:
  explicit NormReluBackwardCpu(const NormReluBackward<T>& args)
      : f(args), shortcut_(args.dshortcut.data != nullptr), stream_(streams<T>(args.N * args.channels * args.S)),
        memory_(6 * args.channels), norm_(memory_.get(), args.channels), k0_(memory_.get() + 3 * args.channels), k1_(k0_ + args.channels),
        k2_(k1_ + args.channels) {}

  void run() const {
    norm_.set(f.norm, 0, f.channels);
    if (f.y.layout() == Layout::contiguous)
      contiguous_channels();
    else
      channels_last_batch();
  }
};

template <class T>
void norm_relu_backward(const NormReluBackward<T>& args) {
  NormReluBackwardCpu<T>(args).run();
}

}  // namespace
}  // namespace vcr
