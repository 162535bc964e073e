// Batch norm, the shortcut and ReLU in one pass over the map: 1R + 1W, with a shortcut 2R + 1W; the batch's statistics take one read more,
// which finds a contiguous map's channels in cache.
#pragma once
#include "../channel_stats/cpu_batch.h"
#include "args.h"

namespace vcr {
namespace {

// slope * (y - centre) + offset, [channels] each.
template <class A>
struct ChannelAffine {
  A *centre, *slope, *offset;

  ChannelAffine(A* memory, int64_t channels) : centre(memory), slope(memory + channels), offset(memory + 2 * channels) {}
  void set(const ChannelNorm<A>& norm, int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; ++j) {
      const bool none = norm.mean == nullptr;
      centre[j] = none ? A(0) : norm.mean[j];
      slope[j] = none ? A(1) : A(1.0 / __builtin_sqrt(double(norm.var[j]) + norm.eps)) * (norm.weight ? norm.weight[j] : A(1));
      offset[j] = norm.bias ? norm.bias[j] : A(0);
    }
  }
  // Of one channel, or (channels_last) of a vector of channels from i on.
  vec<A> of(vec<A> x, int64_t j) const { return fma(splat(slope[j]), x - splat(centre[j]), splat(offset[j])); }
  template <bool whole>
  vec<A> of(vec<A> x, int64_t i, int some) const {
    return fma(load_some<whole>(slope + i, some), x - load_some<whole>(centre + i, some), load_some<whole>(offset + i, some));
  }
};

// Contiguous channels that are taken together through all passes of a batch, so that the later ones find the parts of `maps` maps in cache;
// where rows are short, whole vectors of channels, whose lanes are added up together.
template <class T>
VCR_INLINE int64_t channels_together(int64_t N, int64_t S, int maps) {
  constexpr int64_t W = lanes<acc_t<T>>, cached = int64_t(256) << 10;  // bytes
  const int64_t fit = min(2 * W, cached / max(1, N * S * maps * int64_t(sizeof(T))));
  return S <= short_row<acc_t<T>> ? max(W, fit / W * W) : max(1, fit);
}
VCR_INLINE Problem as_problem(int64_t N, int64_t channels, int64_t S) { return {N, channels, 1, 1, S}; }

template <class T>
class NormReluCpu {
  using A = acc_t<T>;
  enum class Shortcut { none, plain, normed };
  const NormRelu<T>& f;
  Scratch<A> memory_;
  ChannelAffine<A> norm_, shortcut_norm_;
  const bool in_place_, stream_;

  // What has been written in place can't be read again by an overlapping last vector; and its lines are in cache.
  template <class F>
  void write(T* to, int64_t count, F value) const {
    if (in_place_)
      write_vectors(to, count, value);
    else
      write_row(to, count, stream_, value);
  }
  template <Shortcut kind>
  void contiguous_row(int64_t n, int64_t j) const {
    const T *y = f.y.at(n, j, 0), *shortcut = kind == Shortcut::none ? nullptr : f.shortcut.at(n, j, 0);
    write(f.out.at(n, j, 0), f.S, [&](int64_t i, auto whole, int some) {
      vec<A> x = norm_.of(load_some<whole()>(y + i, some), j);
      if constexpr (kind == Shortcut::plain) x += load_some<whole()>(shortcut + i, some);
      if constexpr (kind == Shortcut::normed) x += shortcut_norm_.of(load_some<whole()>(shortcut + i, some), j);
      return relu<A>(x);
    });
  }
  template <Shortcut kind>
  void channels_last_row(int64_t n, int64_t i) const {
    const T *y = f.y.at(n, 0, i), *shortcut = kind == Shortcut::none ? nullptr : f.shortcut.at(n, 0, i);
    write(f.out.at(n, 0, i), f.channels, [&](int64_t j, auto whole, int some) {
      vec<A> x = norm_.template of<whole()>(load_some<whole()>(y + j, some), j, some);
      if constexpr (kind == Shortcut::plain) x += load_some<whole()>(shortcut + j, some);
      if constexpr (kind == Shortcut::normed) x += shortcut_norm_.template of<whole()>(load_some<whole()>(shortcut + j, some), j, some);
      return relu<A>(x);
    });
  }
  // Of image n channels [begin, end), or (channels_last) positions.
  template <Shortcut kind>
  VCR_KERNEL void rows(int64_t n, int64_t begin, int64_t end) const {
    if (f.y.layout() == Layout::contiguous)
      for (int64_t j = begin; j < end; ++j) contiguous_row<kind>(n, j);
    else
      for (int64_t i = begin; i < end; ++i) channels_last_row<kind>(n, i);
  }
  void apply(int64_t n, int64_t begin, int64_t end) const {
    if (f.shortcut.data == nullptr) return rows<Shortcut::none>(n, begin, end);
    if (f.shortcut_norm.mean == nullptr) return rows<Shortcut::plain>(n, begin, end);
    rows<Shortcut::normed>(n, begin, end);
  }
  void apply_all() const {
    const bool contiguous = f.y.layout() == Layout::contiguous;
    const int64_t rows = contiguous ? f.channels : f.S, size = max(1, 32768 / max(1, contiguous ? f.S : f.channels));
    const int64_t chunks = (rows + size - 1) / size;
    for_each(f.pool, f.N * chunks, [&](int64_t i) {
      apply(i / chunks, i % chunks * size, min(rows, (i % chunks + 1) * size));
      if (stream_) finish_stream();
    });
  }

  // The batch's statistics of channel j, of which an image's numbers are `stride` from the next's.
  void set_statistics(int64_t j, int64_t stride, const Total* totals, const double* squares) const {
    const Moments moments = merge_images<A>(f.N, f.S, stride, totals, squares);
    const double count = double(f.N) * double(f.S);
    f.mean[j] = A(moments.mean);
    f.var[j] = A(moments.squares / count);
    f.unbiased[j] = A(moments.squares / (count - 1));
    norm_.set(f.norm, j, j + 1);
  }
  void contiguous_channels() const {
    const int64_t size = channels_together<T>(f.N, f.S, f.shortcut.data == nullptr ? 2 : 3), groups = (f.channels + size - 1) / size;
    for_ranges(f.pool, groups, [&](int64_t first, int64_t last) {
      Scratch<Total> totals(f.N * size);
      Scratch<double> squares(f.N * size);
      for (int64_t g = first; g < last; ++g) {
        const int64_t begin = g * size, end = min(f.channels, begin + size);
        for (int64_t n = 0; n < f.N; ++n)
          rows_stats(f.y.at(n, begin, 0), f.y.channel, end - begin, f.S, totals.get() + n * size, squares.get() + n * size);
        for (int64_t j = begin; j < end; ++j) set_statistics(j, size, totals.get() + j - begin, squares.get() + j - begin);
        for (int64_t n = 0; n < f.N; ++n) apply(n, begin, end);
      }
      if (stream_) finish_stream();
    });
  }
  void channels_last_batch() const {
    Scratch<Total> totals(f.N * f.channels);
    Scratch<double> squares(f.N * f.channels);
    channel_totals(as_problem(f.N, f.channels, f.S), f.y, f.pool, totals.get(), squares.get());
    for_each(f.pool, f.channels, [&](int64_t j) { set_statistics(j, f.channels, totals.get() + j, squares.get() + j); });
    apply_all();
  }

 public:
  explicit NormReluCpu(const NormRelu<T>& args)
      : f(args), memory_(6 * args.channels), norm_(memory_.get(), args.channels),
        shortcut_norm_(memory_.get() + 3 * args.channels, args.channels), in_place_(args.out.data == args.y.data),
        stream_(!in_place_ && streams<T>(args.N * args.channels * args.S)) {}

  void run() const {
    shortcut_norm_.set(f.shortcut_norm, 0, f.channels);
    if (f.mean == nullptr) {
      norm_.set(f.norm, 0, f.channels);
      apply_all();
    } else if (f.y.layout() == Layout::contiguous) {
      contiguous_channels();
    } else {
      channels_last_batch();
    }
  }
};

template <class T>
void norm_relu(const NormRelu<T>& args) {
  NormReluCpu<T>(args).run();
}

}  // namespace
}  // namespace vcr
