// The op concept_sample alone, backward: what the middle's kernels don't have.
#pragma once
#include "../vcr_middle/cuda_backward.cuh"

namespace vcr::cuda {

// Where the returned attention has a gradient of its own: attended = sum a da and K1 = sum a (da - attended) yhat. 1R.
template <class T>
struct AttentionSums {
  using A = acc_t<T>;
  static constexpr int threads = 256, resident = sizeof(A) == 4 ? 3 : 1;
  struct Args {
    Problem problem;
    Map<const T> z;
    bool last;
    int concepts, block;
    const A *m, *u, *r;         // [N, C p]
    const Softmax<A>* softmax;  // [N, C]
    const A* dattention;        // [N, C, S]
    A *attended, *K1;           // [N, C]; [N, C p]
  };
  struct Shared {
    SharedArray<T> z;
    SharedArray<A> e;             // [concepts, block]: a da
    SharedArray<double> sum, K1;  // [concepts]; [rows]
    VCR_BOTH Shared(SharedCarver& carve, const Args& a) {
      const int64_t rows = a.concepts * a.problem.p;
      z = carve.take<T>(tile_elements<T>(a.last, int(rows), a.block));
      e = carve.take<A>(int64_t(a.concepts) * a.block);
      sum = carve.take<double>(a.concepts), K1 = carve.take<double>(rows);
    }
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.problem.N * quotient_up(a.problem.C, a.concepts); }

  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t unit) {
    const Problem& pr = a.problem;
    SharedCarver carve{t.shared()};
    const Shared s(carve, a);
    const int64_t blocks = quotient_up(pr.C, a.concepts), n = unit / blocks, c0 = unit % blocks * a.concepts, image = n * pr.C + c0;
    const int concepts = int(least(a.concepts, pr.C - c0)), p = int(pr.p), rows = concepts * p;
    const int64_t first = n * pr.C * pr.p + c0 * pr.p;
    for_threads(t, rows, [&](int j) { s.K1[j] = 0; });
    for_threads(t, concepts, [&](int c) { s.sum[c] = 0; });
    for (int64_t begin = 0; begin < pr.S; begin += a.block) {
      const int count = int(least(a.block, pr.S - begin));
      const Part<const T> part = part_of(a.z, a.last, n, c0 * pr.p, rows, begin, count);
      const Tile<T> tile = tile_of(s.z.get(), part, a.block);
      stage(t, part, tile);
      t.sync();
      for_threads(t, concepts * count, [&](int at) {
        const int c = at / count, i = at % count;
        A l = 0;
        for (int j = c * p; j < (c + 1) * p; ++j) l = multiply_add(tile.at(j, i) - a.m[first + j], a.u[first + j], l);
        const Softmax<A> softmax = a.softmax[image + c];
        s.e[c * a.block + i] = exponential(l - softmax.maximum) / softmax.sum * a.dattention[(image + c) * pr.S + begin + i];
      });
      t.sync();
      for_warps(t, rows + concepts, [&](int x) {
        const int c = x < rows ? x / p : x - rows;
        const A mu = x < rows ? a.m[first + x] : A(0);
        const A sum = warp_sum<A>(t, count, [&](int i) {
          const A e = s.e[c * a.block + i];
          return x < rows ? e * (tile.at(x, i) - mu) : e;
        });
        if (t.lane() == 0) (x < rows ? s.K1[x] : s.sum[c]) += double(sum);
      });
      t.sync();
    }
    for_threads(t, rows, [&](int j) { a.K1[first + j] = A(s.K1[j] - s.sum[j / p] * double(a.r[first + j])); });
    for_threads(t, concepts, [&](int c) { a.attended[image + c] = A(s.sum[c]); });
  }
};

// The parameters' gradients of one concept, over all images in order, and what the last pass needs of each. Grid: concepts.
template <class A>
struct SampleGradients {
  static constexpr int threads = 256, resident = 2;
  struct Args {
    SamplerBackward<A> sampler;
    A *dvalue, *dquery, *dkey, *dlogit;
  };
  struct Shared {
    VCR_BOTH Shared(SharedCarver&, const Args&) {}
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.sampler.problem.C; }
  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t c) {
    const Problem& pr = a.sampler.problem;
    const int p = int(pr.p), pt = int(pr.pt);
    for_warps(t, pr.N, [&](int n) { sampler_backward(t, a.sampler, n, c); });
    t.sync();
    for_threads(t, int64_t(p) * pt, [&](int i) {
      const int64_t at = c * p * pt + i;
      const WeightSums<A> sums = sampler_weight_sums(a.sampler, 0, pr.N, c, i / pt, i % pt);
      a.dvalue[at] = sums.value;
      if (a.sampler.sampler == Sampler::dynamic_query) a.dquery[at] = sums.query, a.dkey[at] = sums.key;
    });
    if (a.sampler.sampler == Sampler::static_query)
      for_threads(t, p, [&](int j) {
        A sum = 0;
        for (int64_t n = 0; n < pr.N; ++n) sum += a.sampler.to.dv[n * pr.C * p + c * p + j];
        a.dlogit[c * p + j] = sum;
      });
  }
};

}  // namespace vcr::cuda
