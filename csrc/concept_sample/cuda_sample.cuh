// Pass concept_sample (contract stage 2, Eq. 1 and 2), centred: l_i = yhat_i . v, a = softmax(l), r = sum_i a_i yhat_i, h = (s r + b) Wv,
// and for training R = Cov_a(yhat, yhat * s Wv). 1R, and where the tile of a block doesn't stay on chip a second one for the means.
//   A block owns some concepts of one image. Positions go through shared memory block by block; of each block the logits' maximum comes
//   first (as in every online softmax, what was summed before is scaled), then a warp per sum adds up positions, lanes side by side.
#pragma once
#include "../channel_stats/cuda_stats.cuh"
#include "../cuda/tile.h"
#include "args.h"

namespace vcr::cuda {

// Where the first batch norm's numbers come from. Written by the first image's blocks, where not null: mu, rstd, s (what the backward pass
// reads) and the batch's statistics.
template <class A>
struct NormArgs {
  Norm norm;
  double eps;
  const double *means, *partial;  // channel_stats, for batch statistics
  int64_t per_group;
  const A *mean, *var, *weight, *bias;  // [C p] or null
  A *mu, *rstd, *s, *batch_mean, *batch_var;
};

template <class T>
struct SampleArgs_ {
  using A = acc_t<T>;
  Problem problem;
  Sampler sampler;
  Map<const T> y;
  bool last;
  int concepts, block;  // concepts of a block of threads, positions that are worked on at a time
  bool resident;        // the tile has room for all positions
  bool shared_R;        // the covariance's sums fit into shared memory, too; else they are in to.R from the beginning
  NormArgs<A> norm;
  SampleWeights<A> weights;
  SampleState<A> to;  // arrays may be null
  A* attention;       // [N, C, S] or null
};

// What a block knows of its concepts: channel arrays begin with its first one's.
template <class T>
struct SampleShared {
  using A = acc_t<T>;
  SharedArray<T> tile;
  SharedArray<A> mu, s, b, v, mhat, u;  // [rows]
  SharedArray<A> mean, R;               // [rows]: sums of e (yhat - mhat), later their mean; [rows, pt]
  SharedArray<A> q, h;                  // [concepts, pt]
  SharedArray<A> e, g;                  // [concepts, block]; [concepts, pt, block]: (yhat - mhat) * s Wv
  // For R, of the positions that are staged: the weighted mean of yhat - mhat there and before [rows], the first and the difference of both
  // projected by s Wv [concepts, pt]; [concepts]: sum of e, and what the difference of the means counts.
  SharedArray<A> here, before, projected, apart, weight, share;
  SharedArray<A> top, factor, sum, ties;  // [concepts]
  template <class Args>
  VCR_BOTH SampleShared(SharedCarver& carve, const Args& a, bool covariance) {
    const int64_t pt = a.problem.pt, rows = a.concepts * a.problem.p, states = a.concepts * pt;
    tile = carve.take<T>(tile_elements<T>(a.last, int(rows), a.resident ? int(a.problem.S) : a.block));
    mu = carve.take<A>(rows), s = carve.take<A>(rows), b = carve.take<A>(rows), v = carve.take<A>(rows), mhat = carve.take<A>(rows);
    u = carve.take<A>(rows), mean = carve.take<A>(rows);
    q = carve.take<A>(states), h = carve.take<A>(states);
    top = carve.take<A>(a.concepts), factor = carve.take<A>(a.concepts), sum = carve.take<A>(a.concepts), ties = carve.take<A>(a.concepts);
    e = carve.take<A>(int64_t(a.concepts) * a.block);
    g = carve.take<A>(covariance ? states * a.block : 0);
    R = carve.take<A>(covariance && a.shared_R ? rows * pt : 0);
    here = carve.take<A>(covariance ? rows : 0), before = carve.take<A>(covariance ? rows : 0);
    projected = carve.take<A>(covariance ? states : 0), apart = carve.take<A>(covariance ? states : 0);
    weight = carve.take<A>(covariance ? a.concepts : 0), share = carve.take<A>(covariance ? a.concepts : 0);
  }
};

// A block's work on concepts [c0, c0 + count) of image n. Args has SampleArgs_'s fields.
template <class T, class Args>
struct SampleBlock {
  using A = acc_t<T>;
  static constexpr int at_once = 4;  // states that are summed in registers

  const Args& a;
  const SampleShared<T>& s;
  const int64_t n, c0;
  const int concepts, p, pt, rows;
  const int64_t S, CP, first;  // first: the block's first channel

  VCR_DEVICE SampleBlock(const Args& args, const SampleShared<T>& shared, int64_t image, int64_t c, int count)
      : a(args), s(shared), n(image), c0(c), concepts(count), p(int(args.problem.p)), pt(int(args.problem.pt)), rows(count * p),
        S(args.problem.S), CP(args.problem.C * args.problem.p), first(c * p) {}

  VCR_DEVICE Part<const T> part(int64_t begin, int count) const { return part_of(a.y, a.last, n, first, rows, begin, count); }
  VCR_DEVICE int room() const { return a.resident ? int(S) : a.block; }
  VCR_DEVICE int block_at(int64_t begin) const { return int(least(a.block, S - begin)); }
  // The positions from `begin` on, in shared memory.
  template <class Thread>
  VCR_DEVICE Tile<T> load(Thread& t, int64_t begin) const {
    if (a.resident) {
      Tile<T> tile = tile_of(s.tile.get(), part(0, int(S)), room());
      tile.data += begin * tile.column;
      return tile;
    }
    const Part<const T> from = part(begin, block_at(begin));
    const Tile<T> tile = tile_of(s.tile.get(), from, room());
    t.sync();  // nobody reads the last one any more
    stage(t, from, tile);
    t.sync();
    return tile;
  }

  // mu, s, b; mu and b are the image's mean where there is no batch norm.
  template <class Thread>
  VCR_DEVICE void normalise(Thread& t) const {
    const NormArgs<A>& norm = a.norm;
    const auto keep = [&](int j, A mu, double var) {
      const A rstd = A(1 / square_root(var + norm.eps)), scale = rstd * value_or(norm.weight, first + j, A(1));
      s.mu[j] = mu, s.s[j] = scale, s.b[j] = value_or(norm.bias, first + j, A(0));
      if (n == 0 && norm.mu != nullptr) norm.mu[first + j] = mu, norm.rstd[first + j] = rstd, norm.s[first + j] = scale;
    };
    if (norm.norm == Norm::batch) {
      for_warps(t, rows, [&](int j) {
        const MergedStats stats = merge_stats(t, norm.partial, a.problem, norm.per_group, first + j);
        if (t.lane() != 0) return;
        const A mu = A(stats.mean);
        keep(j, mu, stats.squares / stats.count);
        s.mhat[j] = A(norm.means[n * CP + first + j] - double(mu));
        if (n == 0) norm.batch_mean[first + j] = mu, norm.batch_var[first + j] = A(stats.squares / (stats.count - 1));
      });
    } else {
      for_threads(t, rows, [&](int j) {
        if (norm.norm == Norm::given)
          keep(j, norm.mean[first + j], double(norm.var[first + j]));
        else
          s.mu[j] = 0, s.s[j] = 1, s.b[j] = 0;
      });
    }
    if (a.resident) stage(t, part(0, int(S)), tile_of(s.tile.get(), part(0, int(S)), room()));
    t.sync();
    if (norm.norm != Norm::batch) means(t);
    if (a.to.m != nullptr) for_threads(t, rows, [&](int j) { a.to.m[n * CP + first + j] = norm.norm == Norm::none ? s.mu[j] : s.mhat[j]; });
  }
  template <class Thread>
  VCR_DEVICE void means(Thread& t) const {
    for_threads(t, rows, [&](int j) { s.mean[j] = 0; });
    for (int64_t begin = 0; begin < S; begin += a.block) {
      const Tile<T> tile = load(t, begin);
      const int count = block_at(begin);
      if (begin == 0) t.sync();
      for_warps(t, rows, [&](int j) {
        const A mu = s.mu[j], sum = warp_sum<A>(t, count, [&](int i) { return tile.at(int(j), int(i)) - mu; });
        if (t.lane() == 0) s.mean[j] += sum;
      });
    }
    t.sync();
    for_threads(t, rows, [&](int j) {
      A m = s.mean[j] / A(S);
      if (a.norm.norm == Norm::given) {
        s.mhat[j] = m;
        return;
      }
      if (a.sampler == Sampler::static_query && m - m != 0) m = 0;  // here it is a centre and nothing else
      s.mu[j] = s.b[j] = m;
      s.mhat[j] = 0;
    });
    t.sync();
  }

  // q, u and v.
  template <class Thread>
  VCR_DEVICE void score(Thread& t) const {
    if (a.sampler == Sampler::dynamic_query) {
      for_threads(t, concepts * pt, [&](int i) {
        const int c = i / pt, k = i % pt;
        const int64_t weight = (c0 + c) * p * pt + k;
        A q = 0;
        for (int j = 0; j < p; ++j) {
          const int at = c * p + j;
          q = multiply_add(multiply_add(s.s[at], s.mhat[at], s.b[at]), a.weights.query[weight + int64_t(j) * pt], q);
        }
        s.q[i] = q;
        if (a.to.q != nullptr) a.to.q[(n * a.problem.C + c0) * pt + i] = q;
      });
      t.sync();
    }
    for_threads(t, rows, [&](int j) {
      A u = 0;
      if (a.sampler == Sampler::dynamic_query) {
        for (int k = 0; k < pt; ++k) u = multiply_add(s.q[j / p * pt + k], a.weights.key[(first + j) * pt + k], u);
        u *= A(1) / square_root(A(pt));
      } else if (a.sampler == Sampler::static_query) {
        u = a.weights.logit[first + j];
      }
      s.u[j] = u;
      s.v[j] = s.s[j] * u;
      if (a.to.u != nullptr) a.to.u[n * CP + first + j] = u;
    });
    t.sync();
  }

  // One order of sums everywhere: later passes find the same bits.
  VCR_DEVICE A logit(const Tile<T>& tile, int c, int i) const {
    A l = 0;
    for (int j = c * p; j < (c + 1) * p; ++j) l = multiply_add(tile.at(j, i) - s.mu[j], s.v[j], l);
    return l;
  }

  template <class Thread>
  VCR_DEVICE void attend(Thread& t, bool covariance) const {
    A* const R = covariance ? sums_of_R() : nullptr;
    for_threads(t, concepts, [&](int c) {
      s.top[c] = -infinity<A>();
      s.sum[c] = 0;
      s.ties[c] = 0;
    });
    for_threads(t, rows, [&](int j) { s.mean[j] = 0; });
    if (covariance) for_threads(t, int64_t(rows) * pt, [&](int i) { R[i] = 0; });
    for (int64_t begin = 0; begin < S; begin += a.block) {
      const Tile<T> tile = load(t, begin);
      const int count = block_at(begin);
      for_threads(t, concepts * count, [&](int at) {
        const int c = int(at) / count, i = int(at) % count;
        s.e[c * a.block + i] = logit(tile, c, i);
      });
      t.sync();
      for_warps(t, concepts, [&](int c) {
        const A* l = s.e + c * a.block;
        A high = -infinity<A>();
        for (int i = t.lane(); i < count; i += warp_size) high = Maximum{}(high, l[i]);
        high = t.reduce(high, Maximum{});
        const A ties = warp_sum<A>(t, count, [&](int i) { return l[i] == high ? A(1) : A(0); });
        if (t.lane() != 0) return;
        const A before = s.top[c];
        if (high > before) {
          s.top[c] = high;
          s.ties[c] = ties;
        } else if (high == before) {
          s.ties[c] += ties;
        }
        s.factor[c] = begin == 0 ? A(0) : exponential(before - s.top[c]);
      });
      t.sync();
      for_threads(t, concepts * count, [&](int at) { weigh(tile, int(at) / count, int(at) % count, covariance); });
      t.sync();
      for_warps(t, rows + concepts, [&](int x) {
        if (x < rows) return add_row(t, tile, int(x), count, covariance);
        const int c = x - rows;
        const A sum = warp_sum<A>(t, count, [&](int i) { return s.e[c * a.block + i]; });
        if (t.lane() != 0) return;
        if (covariance)
          s.weight[c] = sum;  // s.sum is still needed
        else
          s.sum[c] = multiply_add(s.sum[c], s.factor[c], sum);
      });
      t.sync();
      if (!covariance) continue;
      for_threads(t, concepts * pt, [&](int i) { project_means(i / pt, i % pt); });
      for_threads(t, concepts, [&](int c) {
        const A old = s.sum[c] * s.factor[c], all = old + s.weight[c];
        s.share[c] = all > 0 ? old * s.weight[c] / all : A(0);
        s.sum[c] = all;
      });
      t.sync();
      for_warps(t, rows, [&](int j) { add_covariance(t, tile, int(j), count, R); });
      t.sync();
    }
  }
  // e of one position, and its products with the states' projection.
  VCR_DEVICE void weigh(const Tile<T>& tile, int c, int i, bool covariance) const {
    const A e = exponential(s.e[c * a.block + i] - s.top[c]);
    s.e[c * a.block + i] = e;
    if (!covariance) return;
    for (int k0 = 0; k0 < pt; k0 += at_once) {
      A g[at_once] = {};
      for (int j = c * p; j < (c + 1) * p; ++j) {
        const A x = (tile.at(j, i) - s.mu[j] - s.mhat[j]) * s.s[j];
        const A* weight = a.weights.value + (first + j) * pt + k0;
        VCR_UNROLL
        for (int k = 0; k < at_once; ++k)
          if (k0 + k < pt) g[k] = multiply_add(x, weight[k], g[k]);
      }
      VCR_UNROLL
      for (int k = 0; k < at_once; ++k)
        if (k0 + k < pt) s.g[int64_t(c * pt + k0 + k) * a.block + i] = g[k];
    }
  }
  VCR_DEVICE A centred(const Tile<T>& tile, int j, int i) const { return tile.at(j, i) - s.mu[j] - s.mhat[j]; }
  // By a warp: a channel's weighted sum over the block's positions.
  template <class Thread>
  VCR_DEVICE void add_row(Thread& t, const Tile<T>& tile, int j, int count, bool covariance) const {
    const int c = j / p;
    const A* e = s.e + c * a.block;
    const A sum = warp_sum<A>(t, count, [&](int i) { return e[i] * centred(tile, j, i); });
    const A weight = covariance ? warp_sum<A>(t, count, [&](int i) { return e[i]; }) : A(0);
    if (t.lane() != 0) return;
    if (covariance) {
      s.here[j] = weight > 0 ? sum / weight : A(0);
      s.before[j] = s.sum[c] > 0 ? s.mean[j] / s.sum[c] : A(0);
    }
    s.mean[j] = multiply_add(s.mean[j], s.factor[c], sum);
  }
  VCR_DEVICE void project_means(int c, int k) const {
    A here = 0, apart = 0;
    for (int j = 0; j < p; ++j) {
      const int at = c * p + j;
      const A value = s.s[at] * a.weights.value[int64_t(first + at) * pt + k];
      here = multiply_add(s.here[at], value, here);
      apart = multiply_add(s.here[at] - s.before[at], value, apart);
    }
    s.projected[c * pt + k] = here;
    s.apart[c * pt + k] = apart;
  }
  // By a warp: a channel's sums of e (x - its mean) (g - its mean), all means being of the block's positions, since sums about any other point
  // cancel where few positions have all the weight. Then the two means' part. `rest` is what rounding left of sum e (x - its mean) = 0.
  template <class Thread>
  VCR_DEVICE void add_covariance(Thread& t, const Tile<T>& tile, int j, int count, A* R) const {
    const int c = j / p;
    const A mean = s.here[j], factor = s.factor[c];
    const A* e = s.e + c * a.block;
    const A moved = s.share[c] * (mean - s.before[j]);
    const A rest = warp_sum<A>(t, count, [&](int i) { return e[i] * (centred(tile, j, i) - mean); });
    for (int k0 = 0; k0 < pt; k0 += at_once) {
      A sums[at_once] = {};
      const A* g = s.g + int64_t(c * pt + k0) * a.block;
      for (int i = t.lane(); i < count; i += warp_size) {
        const A weighed = e[i] * (centred(tile, j, i) - mean);
        VCR_UNROLL
        for (int k = 0; k < at_once; ++k)
          if (k0 + k < pt) sums[k] = multiply_add(weighed, g[int64_t(k) * a.block + i], sums[k]);
      }
      VCR_UNROLL
      for (int k = 0; k < at_once; ++k)
        if (k0 + k < pt) {
          const A total = t.reduce(sums[k], Sum{});
          if (t.lane() != 0) continue;
          const int state = c * pt + k0 + k;
          A& to = R[int64_t(j) * pt + k0 + k];
          to = multiply_add(to, factor, multiply_add(moved, s.apart[state], multiply_add(-rest, s.projected[state], total)));
        }
    }
  }
  VCR_DEVICE A* sums_of_R() const { return a.shared_R ? s.R.get() : a.to.R + (n * CP + first) * pt; }

  // r, R, the softmax and h, from the sums.
  template <class Thread>
  VCR_DEVICE void finish(Thread& t, bool covariance) const {
    const bool pool = a.sampler == Sampler::pool;
    for_threads(t, rows, [&](int j) {
      s.mean[j] = pool ? A(0) : s.mean[j] / s.sum[j / p];
      if (a.to.r != nullptr) a.to.r[n * CP + first + j] = s.mhat[j] + s.mean[j];
    });
    if (a.to.softmax != nullptr)
      for_threads(t, concepts, [&](int c) {
        A* to = reinterpret_cast<A*>(a.to.softmax + n * a.problem.C + c0 + c);
        to[0] = pool ? A(0) : s.top[c];
        to[1] = pool ? A(1) : s.sum[c];
        to[2] = pool ? A(1) : most_ties(s.ties[c]);
      });
    t.sync();
    for_threads(t, concepts * pt, [&](int i) {
      const int c = i / pt;
      const int64_t weight = (c0 + c) * p * pt + i % pt;
      A h = 0;
      for (int j = 0; j < p; ++j) {
        const int at = c * p + j;
        const A value = a.weights.value[weight + int64_t(j) * pt];
        h = multiply_add(multiply_add(s.s[at], s.mhat[at] + s.mean[at], s.b[at]), value, h);
      }
      s.h[i] = h;
      if (a.to.h != nullptr) a.to.h[(n * a.problem.C + c0) * pt + i] = h;
    });
    t.sync();
    if (!covariance) return;
    const A* sums = sums_of_R();
    A* to = a.to.R + (n * CP + first) * pt;
    for_threads(t, int64_t(rows) * pt, [&](int i) { to[i] = sums[i] / s.sum[i / pt / p]; });
  }
  static VCR_DEVICE A most_ties(A ties) { return ties > 0 ? ties : A(1); }  // none where every logit is NaN

  // The softmax itself.
  template <class Thread>
  VCR_DEVICE void store_attention(Thread& t) const {
    for (int64_t begin = 0; begin < S; begin += a.block) {
      const Tile<T> tile = load(t, begin);
      const int count = block_at(begin);
      for_threads(t, concepts * count, [&](int at) {
        const int c = int(at) / count, i = int(at) % count;
        const A x = a.sampler == Sampler::pool ? A(1) / A(S) : exponential(logit(tile, c, i) - s.top[c]) / s.sum[c];
        a.attention[(n * a.problem.C + c0 + c) * S + begin + i] = x;
      });
    }
  }
};

template <class T>
struct ConceptSample {
  using Args = SampleArgs_<T>;
  static constexpr int threads = 256, resident = sizeof(acc_t<T>) == 4 ? 2 : 1;
  VCR_BOTH static bool covariance(const Args& a) { return a.to.R != nullptr && a.sampler != Sampler::pool; }
  struct Shared : SampleShared<T> {
    VCR_BOTH Shared(SharedCarver& carve, const Args& a) : SampleShared<T>(carve, a, covariance(a)) {}
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.problem.N * quotient_up(a.problem.C, a.concepts); }

  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t unit) {
    SharedCarver carve{t.shared()};
    const Shared shared(carve, a);
    const int64_t blocks = quotient_up(a.problem.C, a.concepts), c0 = unit % blocks * a.concepts;
    const SampleBlock<T, Args> block(a, shared, unit / blocks, c0, int(least(a.concepts, a.problem.C - c0)));
    block.normalise(t);
    block.score(t);
    if (a.sampler != Sampler::pool) block.attend(t, covariance(a));
    block.finish(t, covariance(a));
    if (a.attention != nullptr) block.store_attention(t);
  }
};

}  // namespace vcr::cuda
