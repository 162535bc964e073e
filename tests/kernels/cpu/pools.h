// Ways to run the kernels' ranges. Results must have the same bits under all of them.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#include "common/problem.h"

namespace vcr_test {

using vcr::Parallel;

inline void run_whole(int64_t count, Parallel::Body body, void* context) { body(context, 0, count); }

inline void run_singly_from_the_end(int64_t count, Parallel::Body body, void* context) {
  for (int64_t i = count; i-- > 0;) body(context, i, i + 1);
}

// Ranges of 1, 2, 3, ... units.
inline void run_unevenly(int64_t count, Parallel::Body body, void* context) {
  for (int64_t begin = 0, size = 1; begin < count; begin += size++) body(context, begin, begin + size < count ? begin + size : count);
}

// Three threads, each with adjacent units: how PyTorch divides work.
inline void run_threads(int64_t count, Parallel::Body body, void* context) {
  const int64_t size = (count + 2) / 3;
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += size)
    threads.emplace_back(body, context, begin, begin + size < count ? begin + size : count);
  for (std::thread& thread : threads) thread.join();
}

// Two threads that take turns.
inline void run_threads_taking_turns(int64_t count, Parallel::Body body, void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) body(context, i, i + 1);
  };
  std::thread other(work);
  work();
  other.join();
}

// Faulty on purpose.
inline void run_without_the_last(int64_t count, Parallel::Body body, void* context) { body(context, 0, count > 1 ? count - 1 : count); }
inline void run_everything_twice_at_once(int64_t count, Parallel::Body body, void* context) {
  std::thread other(body, context, int64_t(0), count);
  body(context, 0, count);
  other.join();
}

struct Pool {
  const char* name;
  Parallel parallel;
};
inline const Pool loop = {"a loop", {run_whole, 1}};
inline const Pool pools[] = {
    {"threads", {run_threads, 3}},
    {"single units from the end", {run_singly_from_the_end, 8}},
    {"threads taking turns", {run_threads_taking_turns, 2}},
    {"uneven ranges", {run_unevenly, 3}},
};
constexpr int pool_count = 4;

}  // namespace vcr_test
