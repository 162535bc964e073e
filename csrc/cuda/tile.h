// Parts of a map, in global memory and in shared memory, for both layouts. A run is what is adjacent in memory: a channel's positions, or
// in channels_last a position's channels. Runs are read and written 16 bytes at a time, whatever their alignment; only their ends are not.
#pragma once
#include <cstring>

#include "thread.h"

namespace vcr::cuda {

template <class T>
constexpr int span_size = 16 / int(sizeof(T));

template <class X>
struct alignas(16) Pack {
  X x[16 / sizeof(X)];
};
// p is aligned. On the host by bytes: gcc moves an aligned load above the question whether it is one.
template <class X>
VCR_DEVICE Pack<X> load_pack(const X* p) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const Pack<X>*>(p);
#else
  Pack<X> pack;
  std::memcpy(&pack, p, sizeof pack);
  return pack;
#endif
}
template <class X>
VCR_DEVICE void store_pack(X* p, const Pack<X>& pack) {
#if defined(__CUDACC__)
  *reinterpret_cast<Pack<X>*>(p) = pack;
#else
  std::memcpy(p, &pack, sizeof pack);
#endif
}
template <class X>
VCR_DEVICE int misalignment(const X* p) {  // elements past the last 16-byte boundary
  return int(reinterpret_cast<uintptr_t>(p) / sizeof(X)) & (16 / int(sizeof(X)) - 1);
}

// Elements [lo, hi) of the V that begin at some pointer.
template <int V>
struct Span {
  int lo, hi;
  VCR_DEVICE bool whole() const { return lo == 0 && hi == V; }
};

// What is computed at a time, so that eight 16-bit features need no more registers than four floats.
template <int V>
constexpr int piece_size = V < 4 ? V : 4;
template <int V>
VCR_DEVICE Span<piece_size<V>> piece_of(Span<V> span, int first) {
  constexpr int W = piece_size<V>;
  const int lo = span.lo - first, hi = span.hi - first;
  return {lo < 0 ? 0 : lo > W ? W : lo, hi < 0 ? 0 : hi > W ? W : hi};
}

// out[e] = p[e] for the elements of the span, 0 for others.
template <int V, class X>
VCR_DEVICE void read(const X* p, Span<V> span, X (&out)[V]) {
  constexpr int W = 16 / int(sizeof(X));
  if (V % W == 0 && span.whole() && misalignment(p) == 0) {
    VCR_UNROLL
    for (int k = 0; k < V / W; ++k) {
      const Pack<X> pack = load_pack(p + k * W);
      VCR_UNROLL
      for (int e = 0; e < W; ++e) out[k * W + e] = pack.x[e];
    }
  } else {
    VCR_UNROLL
    for (int e = 0; e < V; ++e) out[e] = e >= span.lo && e < span.hi ? p[e] : X{};
  }
}

// A span's features as they lie in memory: 16-bit ones stay two to a register until they are used.
template <class T>
struct Features {
  static constexpr int count = span_size<T>;
  uint32_t words[4];
  VCR_DEVICE T operator[](int e) const {
    T x;
    if constexpr (sizeof(T) == 2)
      x.bits = uint16_t(words[e / 2] >> (e % 2 * 16));
    else
      std::memcpy(&x, words + e * int(sizeof(T) / 4), sizeof x);
    return x;
  }
  // Elements are set in order, from the first.
  VCR_DEVICE void set(int e, T x) {
    if constexpr (sizeof(T) == 2)
      words[e / 2] = e % 2 == 0 ? uint32_t(x.bits) : words[e / 2] | uint32_t(x.bits) << 16;
    else
      std::memcpy(words + e * int(sizeof(T) / 4), &x, sizeof x);
  }
};
template <class T>
VCR_DEVICE Features<T> read_features(const T* p, Span<span_size<T>> span) {
  Features<T> x;
  if (span.whole() && misalignment(p) == 0) {
    const Pack<uint32_t> pack = load_pack(reinterpret_cast<const uint32_t*>(p));
    VCR_UNROLL
    for (int i = 0; i < 4; ++i) x.words[i] = pack.x[i];
  } else {
    VCR_UNROLL
    for (int e = 0; e < span_size<T>; ++e) x.set(e, e >= span.lo && e < span.hi ? p[e] : T{});
  }
  return x;
}
template <class T>
VCR_DEVICE void write_features(T* p, Span<span_size<T>> span, const Features<T>& x) {
  if (span.whole() && misalignment(p) == 0) {
    Pack<uint32_t> pack;
    VCR_UNROLL
    for (int i = 0; i < 4; ++i) pack.x[i] = x.words[i];
    store_pack(reinterpret_cast<uint32_t*>(p), pack);
  } else {
    VCR_UNROLL
    for (int e = 0; e < span_size<T>; ++e)
      if (e >= span.lo && e < span.hi) p[e] = x[e];
  }
}

// Some channels at some positions of one image.
template <class T>
struct Part {
  T* data;         // the first of them
  int64_t stride;  // from one run to the next
  int channels, positions;
  bool last;  // channels_last
  VCR_DEVICE int runs() const { return last ? positions : channels; }
  VCR_DEVICE int length() const { return last ? channels : positions; }
  VCR_DEVICE T* run(int r) const { return data + int64_t(r) * stride; }
};
template <class T>
VCR_DEVICE Part<T> part_of(const Map<T>& map, bool last, int64_t n, int64_t channel, int channels, int64_t position, int positions) {
  T* data = map.data + n * map.image + channel * (last ? 1 : map.channel) + position * (last ? map.position : 1);
  return {data, last ? map.position : map.channel, channels, positions, last};
}

// use(run, k, span, loaded) for every span of the part, k being its first element's index in the run (below 0 where the run begins within
// it). load(run, k, span) comes first for `ahead` spans at a time, so that as many loads are in flight.
template <int ahead, class T, class Thread, class Load, class Use>
VCR_DEVICE void for_spans(Thread& t, const Part<T>& part, Load load, Use use) {
  constexpr int V = span_size<T>;
  const int length = part.length(), per_run = (length + 2 * V - 2) / V, total = part.runs() * per_run;
  for (int first = t.index(); first < total; first += ahead * t.count()) {
    decltype(load(0, 0, Span<V>{})) loaded[ahead] = {};
    VCR_UNROLL
    for (int u = 0; u < ahead; ++u) {
      const int q = first + u * t.count(), r = q / per_run;
      if (q >= total) break;
      const int k = (q - r * per_run) * V - misalignment(part.run(r));
      const Span<V> span{k < 0 ? -k : 0, length - k < V ? length - k : V};
      if (span.lo < span.hi) loaded[u] = load(r, k, span);
    }
    VCR_UNROLL
    for (int u = 0; u < ahead; ++u) {
      const int q = first + u * t.count(), r = q / per_run;
      if (q >= total) break;
      const int k = (q - r * per_run) * V - misalignment(part.run(r));
      const Span<V> span{k < 0 ? -k : 0, length - k < V ? length - k : V};
      if (span.lo < span.hi) use(r, k, span, loaded[u]);
    }
  }
}

// A part in shared memory: channel j at position i stands at j * row + i * column. Lanes that go along positions meet no bank twice.
template <class T>
struct Tile {
  T* data;
  int row, column;
  VCR_DEVICE acc_t<T> at(int j, int i) const { return widen(data[j * row + i * column]); }
};
// From one position to the next in channels_last: an odd number of 4-byte words (or of elements that are larger).
VCR_BOTH int tile_column(int channels, int bytes) {
  if (bytes >= 4) return channels | 1;
  const int even = (channels + 1) / 2 * 2;
  return even % 4 == 2 ? even : even + 2;
}
template <class T>
VCR_BOTH int64_t tile_row(int positions) {  // with room for a shift
  constexpr int V = 16 / int(sizeof(T));
  return (positions + 2 * V - 2) / V * V;
}
template <class T>
VCR_BOTH int64_t tile_elements(bool last, int channels, int positions) {
  return last ? int64_t(tile_column(channels, int(sizeof(T)))) * positions : tile_row<T>(positions) * channels;
}
// How far a channel's positions are shifted in shared memory, so that they are aligned as in global memory, where that goes for all channels.
template <class T>
VCR_DEVICE int shift_of(const Part<T>& part) {
  return !part.last && part.stride % span_size<T> == 0 ? misalignment(part.data) : 0;
}
template <class T>
VCR_DEVICE Tile<T> tile_of(T* shared, const Part<const T>& part, int room) {  // room: positions that the tile was made for
  if (part.last) return {shared, 1, tile_column(part.channels, int(sizeof(T)))};
  return {shared + shift_of(part), int(tile_row<T>(room)), 1};
}

template <class T, class Thread>
VCR_DEVICE void stage(Thread& t, const Part<const T>& part, const Tile<T>& tile) {
  constexpr int V = span_size<T>;
  const int to_run = part.last ? tile.column : tile.row;
  for_spans<4>(
      t, part, [&](int r, int k, Span<V> span) { return read_features(part.run(r) + k, span); },
      [&](int r, int k, Span<V> span, const Features<T>& x) { write_features(tile.data + r * to_run + k, span, x); });
}

}  // namespace vcr::cuda
