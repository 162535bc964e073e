// Attention pooling of a channels_last image as it lies, where no backward pass will follow: nothing is transposed. 2R, of which the
// second read finds the image in cache where it fits.
//
// Rows are swept along their channels. A few rows' logits come out of the lanes by a transposed reduction, so that one exp serves as many
// positions as a vector has lanes. The softmax runs along, see softmax_slack.
#pragma once
#include "../cpu/tile.h"
#include "cpu_small.h"

namespace vcr {
namespace {

constexpr int64_t natural_mean_rows = 64;  // of a float sum; such sums are added up in double
constexpr int64_t natural_block = 16;      // positions between two looks at the maximum; a float sum runs over them,
constexpr int64_t natural_merged = 512;    // then over the blocks of this many positions, then over these
constexpr int64_t natural_width = 256;     // channels of a block of rows that stay in L1

// The means of channels [0, count) of one image less their pivots (null: 0); count is a multiple of a vector. Two rows at a time: more
// would be more streams than memory delivers at its best.
template <class T>
VCR_KERNEL void natural_means(const T* y, int64_t stride, int64_t S, int64_t count, const float* pivot, float* running, double* total,
                              float* mean) {
  constexpr int W = lanes<float>;
  for (int64_t j = 0; j < count; ++j) total[j] = 0;
  for (int64_t i = 0; i < S; i += natural_mean_rows) {
    const int64_t end = min(S, i + natural_mean_rows);
    for (int64_t j = 0; j < count; ++j) running[j] = 0;
    int64_t r = i;
    const auto add = [&](auto rows) {
      for (int64_t j = 0; j < count; j += W) {
        const vec<float> m = pivot ? load(pivot + j) : zeros<float>();
        vec<float> sum = load(y + r * stride + j) - m;
        if constexpr (rows() == 2) sum += load(y + (r + 1) * stride + j) - m;
        store(running + j, load(running + j) + sum);
      }
      r += rows();
    };
    while (r + 2 <= end) add(std::integral_constant<int, 2>{});
    if (r < end) add(std::integral_constant<int, 1>{});
    for (int64_t j = 0; j < count; ++j) total[j] += double(running[j]);
  }
  for (int64_t j = 0; j < count; ++j) mean[j] = float(total[j] / double(S));
}

// The centred weighted means r of an image's channels [0, channels), whole concepts and whole vectors; v: scores in units of log2.
template <int P>
class NaturalAttention {
  static constexpr int W = lanes<float>;
  static constexpr int G = P < W ? P : W;       // lanes of a concept in a vector, and the positions whose logits a vector holds
  static constexpr int NV = P > W ? P / W : 1;  // vectors of a concept
  static constexpr int slot = NV * W;           // channels whose softmax is kept in one vector
  using V = vec<float>;

  const int64_t channels_;
  const float *mu_, *v_;
  // By slots: the largest logit so far, the same for all lanes of a concept, and the sums of weights, lane by lane. By channels: the
  // weighted sums. `total` is without the running sums.
  float *top_, *weight_, *total_weight_, *sum_, *total_, *logits_, *centred_;

  static constexpr int64_t at(int64_t channel) { return channel / NV; }

  // The largest logit of a slot has grown.
  void __attribute__((noinline)) raise(int64_t c, V high) {
    V top = maximum<float>(high, load(top_ + at(c)));
    unroll<4>([&](auto K) {
      if constexpr ((1 << K()) < G) top = maximum<float>(top, exchange<(1 << K()) % W>(top));
    });
    const V factor = power_of_two(load(top_ + at(c)) - top);
    store(top_ + at(c), top);
    for (float* to : {weight_ + at(c), total_weight_ + at(c)}) store(to, load(to) * factor);
    unroll<NV>([&](auto K) {
      for (float* to : {sum_ + c + K * W, total_ + c + K * W}) store(to, load(to) * factor);
    });
  }

  // `steps` times G positions of channels [begin, end); of the last G, only the first `some` where not `whole`.
  template <int steps, bool whole, class T>
  VCR_KERNEL void block(const T* y, int64_t stride, int64_t begin, int64_t end, int some, bool far) {
    const float *mus = mu_, *vs = v_;
    float *const logits = logits_, *const centred = centred_, *const tops = top_, *const weights = weight_, *const sums = sum_;
    for (int64_t c = begin; c < end; c += slot) {
      float *to = logits + at(c - begin) * steps, *x = centred + (c - begin) * (steps * G);
      const T* rows = y + c;
      for (int k = 0; k < steps; ++k, rows += G * stride, to += W, x += G * slot) {
        V score[G] = {};
        unroll<NV>([&](auto J) {
          constexpr int j = J() * W;
          const V mu = load(mus + c + j), v = load(vs + c + j);
          unroll<G>([&](auto I) {
            if (!whole && I >= some) return;
            const V centred_row = load(rows + I * stride + j) - mu;
            store(x + I * slot + j, centred_row);
            score[I] = fma(centred_row, v, score[I]);
          });
        });
        V l = sum_within<G>(score);
        if constexpr (!whole) {
          mask_t<float> index;
          for (int i = 0; i < W; ++i) index[i] = i % G;
          l = index < decltype(index[0] + 0)(some) ? l : splat(-__builtin_inff());
        }
        store(to, l);
      }
    }
    for (int64_t c = begin; c < end; c += slot) {
      float* l = logits + at(c - begin) * steps;
      if (far)  // the next block's rows arrive while the exponentials keep the core busy
        for (int64_t j = c; j < c + slot; j += 64 / int64_t(sizeof(T)))
          if (j * sizeof(T) % 64 == 0)
            for (int k = 0; k < steps * G; ++k) prefetch_second_level(y + (steps * G + k) * stride + j);
      V high = load(l);
      unroll<steps - 1>([&](auto K) { high = maximum<float>(high, load(l + (K + 1) * W)); });
      if (any_greater<float>(high, load(tops + at(c)) + softmax_slack)) raise(c, high);
      const V top = load(tops + at(c));
      V weight = load(weights + at(c));
      unroll<steps>([&](auto K) {
        const V e = power_of_two(load(l + K * W) - top);
        weight += e;
        store(l + K * W, e);
      });
      store(weights + at(c), weight);
    }
    for (int64_t c = begin; c < end; c += slot) {
      const float *weight = logits + at(c - begin) * steps, *x = centred + (c - begin) * (steps * G);
      V sum[NV][2] = {};
      for (int k = 0; k < steps; ++k, weight += W, x += G * slot) {
        const V e = load(weight);
        unroll<G>([&](auto I) {
          if (!whole && I >= some) return;
          const V w = G == W ? splat(weight[I]) : broadcast_within<G, I()>(e);
          unroll<NV>([&](auto J) { sum[J][I % 2] = fma(load(x + I * slot + J * W), w, sum[J][I % 2]); });
        });
      }
      unroll<NV>([&](auto J) { store(sums + c + J * W, load(sums + c + J * W) + (sum[J][0] + sum[J][1])); });
    }
  }

  void merge() {
    for (int64_t j = 0; j < at(channels_); ++j) total_weight_[j] += weight_[j], weight_[j] = 0;
    for (int64_t j = 0; j < channels_; ++j) total_[j] += sum_[j], sum_[j] = 0;
  }

 public:
  static int64_t scratch(int64_t channels) { return 5 * channels + 2 * natural_width * natural_block; }
  // Whether an image of so many channels can go this way.
  static bool fits(int64_t channels) { return channels % slot == 0; }

  NaturalAttention(int64_t channels, const float* mu, const float* v, float* memory)
      : channels_(channels), mu_(mu), v_(v), top_(memory), weight_(top_ + channels), total_weight_(weight_ + channels),
        sum_(total_weight_ + channels), total_(sum_ + channels), logits_(total_ + channels),
        centred_(logits_ + natural_width * natural_block / G) {}

  template <class T>
  void run(const T* y, int64_t stride, int64_t S, float* r) {
    constexpr int steps = natural_block / G;
    for (int64_t j = 0; j < at(channels_); ++j) top_[j] = -__builtin_inff();
    fill_zero(weight_, 4 * channels_);
    const bool far = S * stride * int64_t(sizeof(T)) > natural_near;
    int64_t i = 0;
    const auto rows = [&](auto count, auto whole, int some) {
      for (int64_t c = 0; c < channels_; c += natural_width)
        block<count(), whole()>(y + i * stride, stride, c, min(channels_, c + natural_width), some, far);
    };
    using yes = std::integral_constant<bool, true>;
    using no = std::integral_constant<bool, false>;
    for (; i + natural_block <= S; i += natural_block) {
      if (i % natural_merged == 0) merge();
      rows(std::integral_constant<int, steps>{}, yes{}, G);
    }
    for (; i + G <= S; i += G) rows(std::integral_constant<int, 1>{}, yes{}, G);
    if (i < S) rows(std::integral_constant<int, 1>{}, no{}, int(S - i));
    merge();
    for (int64_t c = 0; c < channels_ / P; ++c) {
      const float* weights = total_weight_ + at(c * P);
      float weight = 0;
      for (int k = 0; k < G; ++k) weight += weights[k];
      for (int64_t j = c * P; j < (c + 1) * P; ++j) r[j] = total_[j] * (1 / weight);
    }
  }
};

}  // namespace
}  // namespace vcr
