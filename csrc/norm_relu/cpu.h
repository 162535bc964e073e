// Batch norm with known statistics, the shortcut and ReLU in one pass over the map: 1R + 1W, with a shortcut 2R + 1W.
#pragma once
#include "../cpu/tile.h"
#include "args.h"

namespace vcr {
namespace {

// slope * (y - centre) + offset, [channels] each.
template <class A>
struct ChannelAffine {
  A *centre, *slope, *offset;

  ChannelAffine(A* memory, int64_t channels) : centre(memory), slope(memory + channels), offset(memory + 2 * channels) {}
  void set(const ChannelNorm<A>& norm, int64_t channels) {
    for (int64_t j = 0; j < channels; ++j) {
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

template <class T>
class NormReluCpu {
  using A = acc_t<T>;
  enum class Shortcut { none, plain, normed };
  const NormRelu<T>& f;
  Scratch<A> memory_;
  ChannelAffine<A> norm_, shortcut_norm_;
  const bool stream_;

  template <Shortcut kind>
  void contiguous_row(int64_t n, int64_t j) const {
    const T *y = f.y.at(n, j, 0), *shortcut = kind == Shortcut::none ? nullptr : f.shortcut.at(n, j, 0);
    write_row(f.out.at(n, j, 0), f.S, stream_, [&](int64_t i, auto whole, int some) {
      vec<A> x = norm_.of(load_some<whole()>(y + i, some), j);
      if constexpr (kind == Shortcut::plain) x += load_some<whole()>(shortcut + i, some);
      if constexpr (kind == Shortcut::normed) x += shortcut_norm_.of(load_some<whole()>(shortcut + i, some), j);
      return relu<A>(x);
    });
  }
  template <Shortcut kind>
  void channels_last_row(int64_t n, int64_t i) const {
    const T *y = f.y.at(n, 0, i), *shortcut = kind == Shortcut::none ? nullptr : f.shortcut.at(n, 0, i);
    write_row(f.out.at(n, 0, i), f.channels, stream_, [&](int64_t j, auto whole, int some) {
      vec<A> x = norm_.template of<whole()>(load_some<whole()>(y + j, some), j, some);
      if constexpr (kind == Shortcut::plain) x += load_some<whole()>(shortcut + j, some);
      if constexpr (kind == Shortcut::normed) x += shortcut_norm_.template of<whole()>(load_some<whole()>(shortcut + j, some), j, some);
      return relu<A>(x);
    });
  }
  // Rows [begin, end) of all images: channels of a contiguous map, positions of a channels_last one.
  template <Shortcut kind>
  VCR_KERNEL void rows(int64_t begin, int64_t end) const {
    if (f.y.layout() == Layout::contiguous)
      for (int64_t r = begin; r < end; ++r) contiguous_row<kind>(r / f.channels, r % f.channels);
    else
      for (int64_t r = begin; r < end; ++r) channels_last_row<kind>(r / f.S, r % f.S);
    if (stream_) finish_stream();
  }

 public:
  explicit NormReluCpu(const NormRelu<T>& args)
      : f(args), memory_(6 * args.channels), norm_(memory_.get(), args.channels),
        shortcut_norm_(memory_.get() + 3 * args.channels, args.channels), stream_(streams<T>(args.N * args.channels * args.S)) {
    norm_.set(f.norm, f.channels);
    shortcut_norm_.set(f.shortcut_norm, f.channels);
  }

  void run() const {
    const bool contiguous = f.y.layout() == Layout::contiguous;
    const int64_t all = f.N * (contiguous ? f.channels : f.S), size = max(1, 32768 / max(1, contiguous ? f.S : f.channels));
    for_each(f.pool, (all + size - 1) / size, [&](int64_t i) {
      const int64_t begin = i * size, end = min(all, begin + size);
      if (f.shortcut.data == nullptr) return rows<Shortcut::none>(begin, end);
      if (f.shortcut_norm.mean == nullptr) return rows<Shortcut::plain>(begin, end);
      rows<Shortcut::normed>(begin, end);
    });
  }
};

template <class T>
void norm_relu(const NormRelu<T>& args) {
  NormReluCpu<T>(args).run();
}

}  // namespace
}  // namespace vcr
