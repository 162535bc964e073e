// What would be launched for maps that are read from standard input, a line each:
//   shared multiprocessors clusters l2  N C p pt S  bytes-of-a-feature channels_last  exchanges training
// For each: 1 if the evaluation is the one-read kernel, else 0; 1 if the sampler of a map without batch statistics keeps its tile on chip.
#include <cstdio>
#include <type_traits>

#include "cuda/convert.cuh"
#include "vcr_middle/cuda_launch.h"

using namespace vcr;
using namespace vcr::cuda;

namespace {

template <class T>
struct Recorder {
  Device device;
  Status status{};
  bool evaluates = false;
  template <class K>
  void launch(const typename K::Args&, int = 1) {
    evaluates |= std::is_same_v<K, MiddleEvaluate<T>>;
  }
  template <class K>
  void launch_together(const typename K::Args& args) {
    launch<K>(args);
  }
  void zero(void*, int64_t) {}
};

template <class T>
void plan(const Device& device, const Problem& pr, bool last, bool exchanges, bool training) {
  using A = acc_t<T>;
  MiddleForward<T> f{};
  char unused = 0;
  f.problem = pr;
  f.options.norm = Norm::given, f.options.sampler = Sampler::dynamic_query, f.options.state_batch = false;
  f.options.edges = exchanges ? Edges::dynamic_edges : Edges::none, f.options.save = training;
  f.y.image = f.out.image = pr.channels() * pr.S;
  f.y.channel = f.out.channel = last ? 1 : pr.S;
  f.y.position = f.out.position = last ? pr.channels() : 1;
  A saved_at = 0;
  f.saved = &saved_at;
  const MiddleForwardLaunch<T> launch(f);
  Recorder<T> recorder{device};
  launch.run(recorder, &unused);
  Carver carve{&unused};
  const auto at = launch.workspace(carve);
  const auto sample = launch.plan_sample(device, block_shape(device, pr, sizeof(T), last), at, MiddleSaved<A>(pr, at.saved));
  std::printf("%d %d\n", recorder.evaluates, sample.resident);
}

}  // namespace

int main() {
  Device d;
  Problem pr;
  long long shared, l2, N, C, p, pt, S;
  int clusters, bytes, last, exchanges, training;
  while (std::scanf("%lld %d %d %lld %lld %lld %lld %lld %lld %d %d %d %d", &shared, &d.multiprocessors, &clusters, &l2, &N, &C, &p, &pt,
                    &S, &bytes, &last, &exchanges, &training) == 13) {
    d.shared = shared, d.clusters = clusters != 0, d.l2 = l2;
    pr = {N, C, p, pt, S};
    const auto of_type = [&](auto x) { plan<decltype(x)>(d, pr, last != 0, exchanges != 0, training != 0); };
    bytes == 2 ? of_type(bf16{}) : bytes == 4 ? of_type(float{}) : of_type(double{});
  }
}
