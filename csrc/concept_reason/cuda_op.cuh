// The op concept_reason alone: what the middle's kernels don't have.
#pragma once
#include "../vcr_middle/cuda_backward.cuh"

namespace vcr::cuda {

// state = relu(BN(G)) of one image. Grid: images.
template <class A>
struct NormaliseStates {
  static constexpr int threads = 256, resident = 2;
  struct Args {
    int64_t N, C, pt;
    StateNormArgs<A> norm;
    const A *g, *weight, *bias;
    A* state;
  };
  struct Shared {
    SharedArray<double> mean, rstd;
    VCR_BOTH Shared(SharedCarver& carve, const Args& a) { mean = carve.take<double>(a.pt), rstd = carve.take<double>(a.pt); }
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.N; }
  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t n) {
    SharedCarver carve{t.shared()};
    const Shared s(carve, a);
    find_state_norm(t, a.norm, a.N, a.C, a.pt, n == 0, s.mean, s.rstd);
    t.sync();
    for_threads(t, a.C * a.pt, [&](int i) {
      const int k = i % int(a.pt);
      const int64_t at = n * a.C * a.pt + i;
      a.state[at] = relu(normalised_state(a.g[at], {s.mean[k], s.rstd[k]}, a.weight, a.bias, k));
    });
  }
};

// The ReLU's mask on dstate, and what the batch norm needs of it. Grid: images.
template <class A>
struct StateReluBackward {
  static constexpr int threads = 256, resident = 2;
  struct Args {
    int64_t N, C, pt;
    const A *dstate, *g, *weight, *bias, *kept;
    A* masked;      // [N, C, pt]
    double* parts;  // [N, 2, pt], of StateGradients
  };
  struct Shared {
    VCR_BOTH Shared(SharedCarver&, const Args&) {}
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.N; }
  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t n) {
    const int64_t pt = a.pt, states = n * a.C * pt;
    for_threads(t, a.C * pt, [&](int i) {
      const int k = i % int(pt);
      const A state = normalised_state(a.g[states + i], kept_state_norm(a.kept, pt, k), a.weight, a.bias, k);
      a.masked[states + i] = state <= 0 ? A(0) : a.dstate[states + i];  // NaN passes
    });
    t.sync();
    StateGradients<A>::state_sums(t, a.C, pt, a.kept, a.g + states, a.masked + states, a.parts + 2 * n * pt);
  }
};

// dL/dh of one concept in every image, and its part of the edges' gradient. A warp takes an image; sums over images go in order. Grid: concepts.
template <class A>
struct ReasonGradients {
  static constexpr int threads = 256, resident = 1;
  struct Args {
    int64_t N, C, pt;
    Edges edges;
    const A *dg, *h, *edge, *kept;
    A *dh, *shares, *dedge;  // shares [N, C, pt]: an image's share of a column of dL/dWe
  };
  struct Shared {
    VCR_BOTH Shared(SharedCarver&, const Args&) {}
  };
  VCR_BOTH static int64_t units(const Args& a) { return a.C; }
  template <class Thread>
  VCR_DEVICE static void run(Thread& t, const Args& a, int64_t c) {
    const int64_t C = a.C, pt = a.pt;
    for_warps(t, a.N, [&](int64_t n) {
      const int64_t image = n * C * pt, mine = image + c * pt;
      reasoner_backward(t, a.edges, C, pt, c, a.dg + image, a.h + image, a.edge, offset(a.kept, n * C * C), a.dh + mine, a.shares + mine);
    });
    t.sync();
    edge_gradient(t, a.edges, 0, a.N, C, pt, c, a.dg, a.h, a.shares, a.dedge);
  }
};

}  // namespace vcr::cuda
