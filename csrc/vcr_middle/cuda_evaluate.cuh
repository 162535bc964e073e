// Evaluation in one launch, 1R + 1W: a block keeps its concepts' tile in shared memory from the sampler to the modulator. Concepts that
// exchange messages are all in one block, in one cluster, whose blocks read each other's states in distributed shared memory, or, for a few
// images, in one grid whose blocks are all there at once: that occupies most multiprocessors.
#pragma once
#include "../concept_modulate/cuda_modulate.cuh"
#include "../concept_sample/cuda_sample.cuh"
#include "args.h"

namespace vcr::cuda {

template <class T>
struct MiddleEvaluate {
  using A = acc_t<T>;
  static constexpr int threads = 256, resident = sizeof(A) == 4 ? 2 : 1;
  struct Args {
    SampleArgs_<T> sample;  // resident; nothing of `to` is kept
    Map<T> out;
    bool pixel;
    Edges edges;
    int cluster;   // blocks of an image that exchange states; 1: one block, no messages, or through `exchanged`
    A* exchanged;  // [N, C, pt] in memory, for a grid whose blocks wait for each other, one unit each; or null
    StateNormArgs<A> state_norm;
    const A *edge, *state_weight, *state_bias;
    ModulatorWeights<A> weights;
  };
  struct Shared {
    SampleShared<T> sample;
    ModulatorShared<A> m;
    SharedArray<A> states, g;  // all states of the image; G and then the states of the block's concepts
    VCR_BOTH Shared(SharedCarver& carve, const Args& a) : sample(carve, a.sample, false), m(carve, a.sample.concepts * a.sample.problem.p) {
      const Problem& pr = a.sample.problem;
      states = carve.take<A>(a.edges == Edges::none ? 0 : pr.C * pr.pt);
      g = carve.take<A>(a.sample.concepts * pr.pt);
    }
  };
  VCR_BOTH static int64_t blocks_per_image(const Args& a) {
    return a.cluster > 1 ? a.cluster : quotient_up(a.sample.problem.C, a.sample.concepts);
  }
  VCR_BOTH static int64_t units(const Args& a) { return a.sample.problem.N * blocks_per_image(a); }

  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t unit) {
    const Problem& pr = a.sample.problem;
    SharedCarver carve{t.shared()};
    const Shared s(carve, a);
    const int64_t blocks = blocks_per_image(a), n = unit / blocks, c0 = least(pr.C, unit % blocks * a.sample.concepts);
    const int concepts = int(least(a.sample.concepts, pr.C - c0)), p = int(pr.p), rows = concepts * p, S = int(pr.S);
    const SampleBlock<T, SampleArgs_<T>> block(a.sample, s.sample, n, c0, concepts);
    block.normalise(t);
    block.score(t);
    if (a.sample.sampler != Sampler::pool) block.attend(t, false);
    block.finish(t, false);
    reason(t, a, s, n, c0, concepts);
    for_threads(t, rows, [&](int i) {
      const int c = i / p;
      const int64_t j = c0 * pr.p + i, weight = (c0 + c) * pr.p * pr.pt;
      const A* state = s.g + c * pr.pt;
      const A abar = project_state(state, offset(a.weights.scale_weight, weight), pr.p, pr.pt, i % p);
      const A bbar = project_state(state, offset(a.weights.shift_weight, weight), pr.p, pr.pt, i % p);
      const Normalised<A> z{s.sample.mu[i], s.sample.s[i], s.sample.b[i], s.sample.mhat[i]};
      s.m.keep(i, a.pixel, z.mu, modulator_coefficients(a.pixel, z, abar, bbar, a.weights.scale_bias[j], a.weights.shift_bias[j]));
    });
    t.sync();
    if (!a.pixel) {
      const Tile<T> tile = block.load(t, 0);
      const int to_run = a.sample.last ? tile.column : tile.row;
      modulate_channels<1>(t, s.m, part_of(a.out, a.sample.last, n, c0 * p, rows, 0, S), [&](int r) { return tile.data + r * to_run; });
      return;
    }
    for (int begin = 0; begin < S; begin += a.sample.block) {
      const Tile<T> tile = block.load(t, begin);
      const int count = block.block_at(begin), row = a.sample.block;
      for_threads(t, concepts * count, [&](int at) {
        const int c = int(at) / count, i = int(at) % count;
        s.sample.e[c * row + i] = exponential(block.logit(tile, c, i) - s.sample.top[c]);
      });
      t.sync();
      modulate_pixels(t, s.m, p, s.sample.e, row, part_of(a.out, a.sample.last, n, c0 * p, rows, begin, count), tile);
      t.sync();
    }
  }

  // From h to the states.
  template <class Thread>
  VCR_DEVICE static void reason(Thread& t, const Args& a, const Shared& s, int64_t n, int64_t c0, int concepts) {
    const Problem& pr = a.sample.problem;
    if (a.edges == Edges::none) {
      for_threads(t, concepts * pr.pt, [&](int i) { s.g[i] = s.sample.h[i]; });
    } else if (a.exchanged != nullptr) {
      A* image = a.exchanged + n * pr.C * pr.pt;
      for_threads(t, concepts * pr.pt, [&](int i) { image[c0 * pr.pt + i] = s.sample.h[i]; });
      t.grid_sync();
      for_threads(t, pr.C * pr.pt, [&](int i) { s.states[i] = image[i]; });
      t.sync();
      exchange(t, a.edges, pr.C, pr.pt, s.states.get(), a.edge, c0, concepts, static_cast<A*>(nullptr), s.g.get());
    } else {
      if (a.cluster > 1) t.cluster_sync();  // every block has its h
      for_threads(t, pr.C * pr.pt, [&](int i) {
        const int rank = i / (a.sample.concepts * int(pr.pt));
        const A* h = a.cluster > 1 ? t.peer(s.sample.h.get(), rank) : s.sample.h.get();
        s.states[i] = h[i - rank * a.sample.concepts * int(pr.pt)];
      });
      t.sync();
      if (a.cluster > 1) t.cluster_sync();  // nobody writes or ends while another still reads
      exchange(t, a.edges, pr.C, pr.pt, s.states.get(), a.edge, c0, concepts, static_cast<A*>(nullptr), s.g.get());
    }
    t.sync();
    for_threads(t, concepts * pr.pt, [&](int i) {
      const int k = i % int(pr.pt);
      const StateNormValues norm = given_state_norm(a.state_norm.given_mean, a.state_norm.given_var, a.state_norm.eps, k);
      s.g[i] = relu(normalised_state(s.g[i], norm, a.state_weight, a.state_bias, k));
    });
    t.sync();
  }
};

}  // namespace vcr::cuda
