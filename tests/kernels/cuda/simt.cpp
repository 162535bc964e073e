// Under ThreadSanitizer this file is compiled without instrumentation, and with SIMT_TSAN: the scheduler's own state is none of the kernel's
// business, and what a barrier orders is told by hand.
#include "simt.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_TSAN)
extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
constexpr unsigned without_order = 1;  // of switches between fibers
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

namespace {

constexpr size_t stack_bytes = 128 << 10;
constexpr size_t guard_bytes = 256;

#if defined(SIMT_TSAN)
// memcpy is seen even so.
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
void released(void* at) { __tsan_release(at); }
void acquired(void* at) { __tsan_acquire(at); }
#else
struct Unseen {
  Unseen() {}
  ~Unseen() {}
};
void released(void*) {}
void acquired(void*) {}
#endif

struct Fiber;
struct Barrier {
  int expected = 0, arrived = 0;
  const char* file = nullptr;
  int line = 0;
  std::vector<Fiber*> waiting;
  void expect(int count) {
    expected = count;
    waiting.reserve(size_t(count));  // fibers allocate nothing
  }
};
// What a warp's lanes hand each other; two, for a lane may reach the next exchange while another still reads the last.
struct Exchange {
  unsigned char bytes[warp_size][32];
};
struct Block {
  int64_t index = 0;
  int rank = 0;
  std::unique_ptr<unsigned char, void (*)(void*)> memory{nullptr, std::free};  // guard, shared memory, guard
  std::vector<Barrier> warps;
  std::vector<Exchange> exchanges;  // [warps, 2]
  Barrier barrier;
  unsigned char* shared() const { return memory.get() + guard_bytes; }
};
struct Fiber {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  Block* block = nullptr;
  int index = 0;
  unsigned turn = 0;  // of the warp's exchanges
  bool done = true;
  void *fake_stack = nullptr, *sanitizer = nullptr;
  Barrier& warp() const { return block->warps[size_t(index / warp_size)]; }
};

struct Scheduler {
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready;
  std::vector<Block*> at_once;  // a cluster, or the grid
  Barrier cluster_barrier, grid_barrier;
  Grid grid = Grid::apart;
  Fault fault = Fault::none;
  Fiber* running = nullptr;
  int threads = 0;
  int64_t blocks = 0, shared = 0;
  void* stack_pointer = nullptr;  // the launching thread's
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void *fake_stack = nullptr, *sanitizer = nullptr;
  char started = 0, ended = 0;  // their addresses stand for what happened before and after the launch
};
Scheduler self;

// ---- switching

#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
void prepare(Fiber* f, void (*entry)()) {
  void** top = reinterpret_cast<void**>(f->stack + stack_bytes);
  *--top = nullptr;  // a return address would be here: keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f->stack_pointer = top;
}
#else
void simt_switch(void** save, void* to) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}
void prepare(Fiber* f, void (*entry)()) {
  ucontext_t* context = reinterpret_cast<ucontext_t*>(f->stack);
  getcontext(context);
  context->uc_stack.ss_sp = f->stack + sizeof(ucontext_t);
  context->uc_stack.ss_size = stack_bytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  f->stack_pointer = context;
}
#endif

void leave(bool for_good) {
  Fiber* f = self.running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &f->fake_stack, self.stack_bottom, self.stack_size);
#else
  static_cast<void>(for_good);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(self.sanitizer, without_order);
#endif
  simt_switch(&f->stack_pointer, self.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f->fake_stack, &self.stack_bottom, &self.stack_size);
#endif
}
void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self.stack_bottom, &self.stack_size);
#endif
  acquired(&self.started);
  (*self.body)();
  released(&self.ended);
  self.running->done = true;
  leave(true);
  std::abort();
}
void resume(Fiber* f) {
  self.running = f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&self.fake_stack, f->stack, stack_bytes);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(f->sanitizer, without_order);
#endif
  simt_switch(&self.stack_pointer, f->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

void open(Barrier& b) {
  b.arrived = 0;
  self.ready.insert(self.ready.end(), b.waiting.begin(), b.waiting.end());
  b.waiting.clear();
}
// An ended thread is waited for no more.
void left(Barrier& b) {
  --b.expected;
  if (b.arrived > 0 && b.arrived == b.expected) open(b);
}

void reorder(std::vector<Fiber*>& list, Order order, std::mt19937_64& random) {
  if (order == Order::backward) std::reverse(list.begin(), list.end());
  if (order == Order::shuffled) std::shuffle(list.begin(), list.end(), random);
}

std::string place(const Barrier& b) { return b.file == nullptr ? "?" : std::string(b.file) + ":" + std::to_string(b.line); }

std::unique_ptr<Block> make_block(int64_t index, int rank) {
  std::unique_ptr<Block> block(new Block);
  block->index = index, block->rank = rank;
  const size_t bytes = size_t(self.shared) + 2 * guard_bytes;
  block->memory.reset(static_cast<unsigned char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
  std::memset(block->memory.get(), 0xff, bytes);  // NaN in every type
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(block->memory.get(), guard_bytes);
  ASAN_POISON_MEMORY_REGION(block->memory.get() + guard_bytes + self.shared, guard_bytes);
#endif
  const int warps = self.threads / warp_size;
  block->barrier.expect(self.threads);
  block->warps.resize(size_t(warps));
  for (Barrier& b : block->warps) b.expect(warp_size);
  block->exchanges.resize(size_t(2 * warps));
  return block;
}
void check_guards(const Block& block) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(block.memory.get(), size_t(self.shared) + 2 * guard_bytes);
#endif
  for (size_t i = 0; i < guard_bytes; ++i)
    if (block.memory.get()[i] != 0xff || block.memory.get()[guard_bytes + size_t(self.shared) + i] != 0xff)
      fail("block " + std::to_string(block.index) + " wrote outside its shared memory");
}

void run_at_once(int64_t first, int size, const Settings& settings, std::mt19937_64& random, std::vector<std::unique_ptr<Block>>& kept) {
  self.at_once.clear();
  for (Barrier* barrier : {&self.cluster_barrier, &self.grid_barrier}) {
    *barrier = {};
    barrier->expect(self.threads * size);
  }
  self.ready.clear();
  self.ready.reserve(size_t(self.threads * size));
  for (int rank = 0; rank < size; ++rank) {
    kept.push_back(make_block(first + rank, rank));
    self.at_once.push_back(kept.back().get());
    for (int i = 0; i < self.threads; ++i) {
      Fiber* f = self.fibers[size_t(rank * self.threads + i)].get();
      f->block = self.at_once.back(), f->index = i, f->turn = 0, f->done = false;
      prepare(f, entry);
      self.ready.push_back(f);
    }
  }
  released(&self.started);
  std::vector<Fiber*> batch;
  batch.reserve(self.ready.capacity());
  for (int alive = self.threads * size; alive > 0;) {
    if (self.ready.empty()) {
      const Block& block = *self.at_once[0];
      std::string where = "a block barrier at " + place(block.barrier) + ", a cluster barrier at " + place(self.cluster_barrier) +
                          ", the grid's at " + place(self.grid_barrier);
      for (const Barrier& b : block.warps)
        if (!b.waiting.empty()) where += ", a warp's at " + place(b);
      fail(std::to_string(alive) + " threads wait for ever: " + where);
    }
    batch.swap(self.ready);
    self.ready.clear();
    reorder(batch, settings.threads, random);
    if (settings.threads == Order::by_block) {
      int rank = size;
      for (const Fiber* f : batch) rank = std::min(rank, f->block->rank);
      const auto later = std::stable_partition(batch.begin(), batch.end(), [rank](const Fiber* f) { return f->block->rank == rank; });
      self.ready.assign(later, batch.end());
      batch.erase(later, batch.end());
    }
    for (Fiber* f : batch) {
      resume(f);
      if (!f->done) continue;
      --alive;
      left(f->block->barrier);
      left(f->warp());
      left(self.cluster_barrier);
      left(self.grid_barrier);
    }
    batch.clear();
  }
  for (const Block* block : self.at_once) check_guards(*block);
  self.running = nullptr;
}

}  // namespace

void fail(const std::string& why) {
  std::fprintf(stderr, "simt: %s\n", why.c_str());
  std::fflush(nullptr);
  std::_Exit(exit_status);  // exit() would hang in a fiber
}

void launch(int64_t blocks, int threads, int64_t shared, int cluster, const Settings& settings, const std::function<void()>& body,
            Grid grid) {
  if (blocks <= 0 || threads <= 0 || threads % warp_size != 0 || threads > 1024 || cluster < 1 || cluster > 8 || blocks % cluster != 0 ||
      shared < 0 || (grid == Grid::together && (cluster != 1 || blocks > 1024)))
    fail("a launch of " + std::to_string(blocks) + " blocks in clusters of " + std::to_string(cluster) + ", " + std::to_string(threads) +
         " threads, " + std::to_string(shared) + " bytes");
  self.fault = settings.fault;
  self.body = &body, self.threads = threads, self.blocks = blocks, self.shared = shared, self.grid = grid;
  const int64_t at_once = grid == Grid::together ? blocks : cluster;
#if defined(SIMT_TSAN)
  self.sanitizer = __tsan_get_current_fiber();
#endif
  while (self.fibers.size() < size_t(threads) * size_t(at_once)) {
    std::unique_ptr<Fiber> f(new Fiber);
    f->stack = static_cast<unsigned char*>(std::aligned_alloc(64, stack_bytes));
#if defined(SIMT_TSAN)
    f->sanitizer = __tsan_create_fiber(0);
#endif
    self.fibers.push_back(std::move(f));
  }
  std::mt19937_64 random(settings.seed);
  std::vector<int64_t> order(size_t(blocks / at_once));
  for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
  if (settings.blocks == Order::backward) std::reverse(order.begin(), order.end());
  if (settings.blocks == Order::shuffled) std::shuffle(order.begin(), order.end(), random);
  // Shared memory is kept to the end: reused, it would order blocks that nothing orders.
  std::vector<std::unique_ptr<Block>> kept;
  for (int64_t i : order) {
    run_at_once(i * at_once, int(at_once), settings, random, kept);
#if !defined(SIMT_TSAN)
    kept.clear();
#endif
  }
  acquired(&self.ended);
}

int thread_index() { return self.running->index; }
int threads_of_block() { return self.threads; }
int64_t block_index() { return self.running->block->index; }
int64_t blocks_of_grid() { return self.blocks; }
int rank_in_cluster() { return self.running->block->rank; }
int blocks_of_cluster() { return self.grid == Grid::together ? 1 : int(self.at_once.size()); }
Fault fault_of_launch() { return self.fault; }
unsigned char* shared_memory() { return self.running->block->shared(); }

namespace {
void arrive(Barrier& b, const char* file, int line) {
  if (b.arrived == 0) {
    b.file = file, b.line = line;
  } else if (b.line != line || std::strcmp(b.file, file) != 0) {
    fail("threads meet at different barriers, " + place(b) + " and " + file + ":" + std::to_string(line) + " (thread " +
         std::to_string(self.running->index) + ")");
  }
  {
    Unseen unseen;
    b.waiting.push_back(self.running);
    if (++b.arrived >= b.expected) open(b);
  }
  leave(false);
}
void wait(Barrier& b, const char* file, int line) {
  released(&b);
  arrive(b, file, line);
  acquired(&b);
}
}  // namespace
void wait_for_block(const char* file, int line) { wait(self.running->block->barrier, file, line); }
void wait_for_warp(const char* file, int line) { wait(self.running->warp(), file, line); }
void wait_for_cluster(const char* file, int line) {
  if (self.grid == Grid::together) fail("a cluster's barrier in a grid without clusters");
  wait(self.cluster_barrier, file, line);
}
void wait_for_grid(const char* file, int line) {
  if (self.grid == Grid::apart) fail("a grid's barrier where blocks aren't there at once");
  wait(self.grid_barrier, file, line);
}

unsigned char* peer_of(const void* shared, int rank) {
  const unsigned char *mine = self.running->block->shared(), *at = static_cast<const unsigned char*>(shared);
  if (at < mine || at > mine + self.shared || rank < 0 || rank >= blocks_of_cluster()) fail("a peer's memory that is not shared memory");
  if (self.fault == Fault::none && self.at_once[size_t(rank)]->barrier.expected == 0) fail("the shared memory of a block that has ended");
  return self.at_once[size_t(rank)]->shared() + (at - mine);
}

void put(const void* value, size_t bytes) {
  Unseen unseen;
  if (bytes > sizeof(Exchange::bytes[0])) fail("a lane's value is too large");
  const Fiber* f = self.running;
  std::memcpy(f->block->exchanges[size_t(f->index / warp_size * 2) + (f->turn & 1)].bytes[f->index % warp_size], value, bytes);
}
unsigned end_of_turn(const char* file, int line) {
  Fiber* f = self.running;
  const unsigned turn = f->turn++;
  arrive(f->warp(), file, line);
  return turn;
}
void get(void* value, size_t bytes, int lane, unsigned turn) {
  Unseen unseen;
  const Fiber* f = self.running;
  std::memcpy(value, f->block->exchanges[size_t(f->index / warp_size * 2) + (turn & 1)].bytes[lane], bytes);
}

}  // namespace simt
