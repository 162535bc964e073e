// A tile: some channels by some positions, a channel's positions adjacent. A contiguous map holds its tiles as they are; of a
// channels_last map they are transposed into cache, and the same kernel bodies serve both layouts.
#pragma once
#include "parallel.h"

namespace vcr {
namespace {

template <class T>
struct Tile {
  const T* data;
  int64_t row;  // elements from one channel to the next
};

// from[i * stride + j] -> to[j * row + i] for i < positions, j < channels.
template <class T, class A>
VCR_KERNEL void gather(const T* from, int64_t stride, int64_t positions, int64_t channels, A* to, int64_t row) {
  int64_t i = 0;
  if constexpr (sizeof(A) == 4) {
    constexpr int W = lanes<float>;
    const int64_t whole = channels / W * W;
    for (; i + W <= positions; i += W) {
      const T* base = from + i * stride;
      for (int64_t j = 0; j < whole; j += W) {
        vec<float> rows[W];
        for (int k = 0; k < W; ++k) {
          rows[k] = load(base + k * stride + j);
          prefetch(base + (k + 2 * W) * stride + j);
        }
        transpose(rows);
        for (int k = 0; k < W; ++k) store(to + (j + k) * row + i, rows[k]);
      }
      for (int64_t j = whole; j < channels; ++j)
        for (int k = 0; k < W; ++k) to[j * row + i + k] = widen(base[k * stride + j]);
    }
  }
  for (; i < positions; ++i)
    for (int64_t j = 0; j < channels; ++j) to[j * row + i] = widen(from[i * stride + j]);
}

// The way back: from[j * row + i] -> to[i * stride + j].
template <class T, class A>
VCR_KERNEL void scatter(const A* from, int64_t row, int64_t positions, int64_t channels, T* to, int64_t stride) {
  int64_t i = 0;
  if constexpr (sizeof(A) == 4) {
    constexpr int W = lanes<float>;
    const int64_t whole = channels / W * W;
    for (; i + W <= positions; i += W) {
      T* base = to + i * stride;
      for (int64_t j = 0; j < whole; j += W) {
        vec<float> rows[W];
        for (int k = 0; k < W; ++k) rows[k] = load(from + (j + k) * row + i);
        transpose(rows);
        for (int k = 0; k < W; ++k) store(base + k * stride + j, rows[k]);
      }
      for (int64_t j = whole; j < channels; ++j)
        for (int k = 0; k < W; ++k) base[k * stride + j] = narrow<T>(from[j * row + i + k]);
    }
  }
  for (; i < positions; ++i)
    for (int64_t j = 0; j < channels; ++j) to[i * stride + j] = narrow<T>(from[j * row + i]);
}

// Widths whose channels_last maps the float kernels take as they lie: a concept's channels are a vector's lanes, or some whole vectors.
template <class A, int P>
inline constexpr bool natural_channels_last = sizeof(A) == 4 && (P == 4 || P == 8 || P == 16 || P == 32);

constexpr int64_t natural_near = 1 << 19;  // bytes of an image that need no prefetching

// Concepts whose channels are gathered together, so that every line of a channels_last row is used whole.
VCR_INLINE int64_t concepts_per_gather(const Problem& pr) { return min(pr.C, max(1, 64 / int64_t(sizeof(float)) / pr.p)); }

// Calls f(load, i, count) for each vector of a row of S: whole ones with a plain load, the last with a partial one.
template <class A, class F>
VCR_INLINE void for_vectors(int64_t S, F f) {
  int64_t i = 0;
  for (; i + lanes<A> <= S; i += lanes<A>) f(i, std::integral_constant<bool, true>{}, lanes<A>);
  if (i < S) f(i, std::integral_constant<bool, false>{}, int(S - i));
}
template <bool whole, class T>
VCR_INLINE vec<acc_t<T>> load_some(const T* from, int count) {
  if constexpr (whole)
    return load(from);
  else
    return load_partial(from, count);
}
template <bool whole, class T>
VCR_INLINE void store_some(T* to, vec<acc_t<T>> x, int count) {
  if constexpr (whole)
    store(to, x);
  else
    store_partial(to, x, count);
}
// value(i, whole, count) for each vector of a row of S, written to `to`.
template <class T, class F>
VCR_INLINE void write_vectors(T* to, int64_t S, F value) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  constexpr std::integral_constant<bool, true> yes;
  int64_t i = 0;
  if constexpr (sizeof(T) == 2)
    for (; i + 2 * W <= S; i += 2 * W) {
      const vec<A> first = value(i, yes, W), second = value(i + W, yes, W);
      store_two(to + i, first, second);
    }
  for_vectors<A>(S - i, [&](int64_t at, auto whole, int some) { store_some<whole()>(to + i + at, value(i + at, whole, some), some); });
}
// Whether a map of this many elements is written past the caches: where the maps of a pass are larger than they are (by measurement;
// it costs 10 % on small ones and spares up to a fourth of the traffic of large ones).
constexpr int64_t stream_bytes = int64_t(16) << 20;
template <class T>
VCR_INLINE bool streams(int64_t elements) {
  return sizeof(T) == 4 && elements * int64_t(sizeof(T)) >= stream_bytes;
}
template <class T>
VCR_INLINE bool streams(const Problem& pr) {
  return streams<T>(pr.N * pr.channels() * pr.S);
}
// The same for a map's row, with a last vector that overlaps what has been written, with the same values.
template <class T, class F>
VCR_INLINE void write_row(T* to, int64_t S, bool stream, F value) {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  constexpr std::integral_constant<bool, true> yes;
  constexpr std::integral_constant<bool, false> no;
  if (stream && can_stream(to)) {
    int64_t i = 0;
    for (; i + W <= S; i += W) store_stream(to + i, value(i, yes, W));
    if (i < S) store_partial(to + i, value(i, no, int(S - i)), int(S - i));
  } else if (S >= W) {
    write_vectors(to, (S - 1) / W * W, value);
    store(to + (S - W), value(S - W, yes, W));
  } else if (S > 0) {
    store_partial(to, value(0, no, int(S)), int(S));
  }
}
// Lanes past the end of a row must not reach a sum: a partial load gave them 0, and 0 - mean is not 0.
template <bool whole, class A>
VCR_INLINE vec<A> only(vec<A> x, int count) {
  if constexpr (whole)
    return x;
  else
    return keep_first<A>(x, count);
}

// f(c, tile) for concepts [c0, c1) of image n; buffer holds (c1 - c0) * p rows of padded_row(S).
template <class T, class F>
VCR_INLINE void visit_tiles(const Problem& pr, const Map<const T>& y, int64_t n, int64_t c0, int64_t c1, acc_t<T>* buffer, F f) {
  if (y.layout() == Layout::contiguous) {
    for (int64_t c = c0; c < c1; ++c) f(c, Tile<T>{y.at(n, c * pr.p, 0), y.channel});
  } else {
    const int64_t row = padded_row(pr.S);
    gather(y.at(n, c0 * pr.p, 0), y.position, pr.S, (c1 - c0) * pr.p, buffer, row);
    for (int64_t c = c0; c < c1; ++c) f(c, Tile<acc_t<T>>{buffer + (c - c0) * pr.p * row, row});
  }
}
template <class T>
VCR_INLINE int64_t visit_scratch(const Problem& pr, const Map<const T>& y) {
  return y.layout() == Layout::contiguous ? 0 : concepts_per_gather(pr) * pr.p * padded_row(pr.S);
}

}  // namespace
}  // namespace vcr
