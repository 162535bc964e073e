// The CPU as the bindings see it.
#pragma once
#include <memory>

#include "../cpu/isa.h"
#include "unpack.h"

namespace vcr {

// PyTorch's own thread pool.
inline Parallel torch_pool() {
  return {[](int64_t count, Parallel::Body body, void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          int(torch::stable::get_num_threads())};
}

// Where the environment variable VCR_OPS_PROFILE is set, the clock that each pass reports to; started by this call.
PassClock pass_clock();

class Cpu {
 public:
  explicit Cpu(const Tensor& t) { require(t.is_cpu(), "the C++ kernels take CPU tensors"); }
  Place place() const { return {shim_codes.cpu, 0}; }
  bool has(const Tensor& t) const { return t.is_cpu(); }
  Tensor converted(const Tensor& t, ScalarType type) const { return Tensor(torch::stable::to(t.stable(), type)); }

  // f(T{}) with the feature type.
  template <class F>
  static auto dispatch(ScalarType type, F f) {
    switch (type) {
      case ScalarType::Float: return f(float{});
      case ScalarType::Double: return f(double{});
      case ScalarType::BFloat16: return f(bf16{});
      default: throw std::invalid_argument("vcr_ops: features are float32, float64 or bfloat16");
    }
  }
  // What the kernels need and nobody keeps.
  template <class A>
  class Scratch {
   public:
    Scratch(const Cpu&, int64_t count) : memory_(count > 0 ? new A[size_t(count)] : nullptr) {}
    A* get() const { return memory_.get(); }

   private:
    std::unique_ptr<A[]> memory_;
  };

  template <class T>
  void run(SampleForward<T>& args) {
    in_pool(kernels<T>().sample_forward, args);
  }
  template <class T>
  void run(SampleBackward<T>& args) {
    in_pool(kernels<T>().sample_backward, args);
  }
  template <class A>
  void run(ReasonForward<A>& args) {
    in_pool(kernels<A>().reason_forward, args);
  }
  template <class A>
  void run(ReasonBackward<A>& args) {
    in_pool(kernels<A>().reason_backward, args);
  }
  template <class T>
  void run(ModulateForward<T>& args) {
    in_pool(kernels<T>().modulate_forward, args);
  }
  template <class T>
  void run(ModulateBackward<T>& args) {
    in_pool(kernels<T>().modulate_backward, args);
  }
  template <class T>
  void run(NormRelu<T>& args) {
    in_pool(kernels<T>().norm_relu, args);
  }
  template <class T>
  void run(NormReluBackward<T>& args) {
    in_pool(kernels<T>().norm_relu_backward, args);
  }
  template <class T>
  void run(MiddleStats<T>& args) {
    in_pool(kernels<T>().middle_stats, args);
  }
  template <class T>
  void run(MiddleForward<T>& args) {
    args.clock = pass_clock();
    in_pool(kernels<T>().middle_forward, args);
  }
  template <class T>
  void run(MiddleBackward<T>& args) {
    args.clock = pass_clock();
    in_pool(kernels<T>().middle_backward, args);
  }
  void finish() {}

 private:
  template <class Args>
  static void in_pool(void (*kernel)(const Args&), Args& args) {
    args.pool = torch_pool();
    kernel(args);
  }
};

}  // namespace vcr
