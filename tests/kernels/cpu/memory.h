// Memory that the kernels get: NaN to begin with, between guard zones, and with holes where a map is a slice of a larger one. What a
// kernel doesn't own must keep its bytes; under AddressSanitizer it can't even be read.
#pragma once
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#include "cases.h"
#include "common/dtypes.h"
#include "common/problem.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, bytes) static_cast<void>(from)
#define ASAN_UNPOISON_MEMORY_REGION(from, bytes) static_cast<void>(from)
#endif

namespace vcr_test {

using vcr::bf16;

// Each T's values in double and back; bf16 by its own rules here, not by the kernels'.
template <class T>
T to_type(double x) {
  return T(x);
}
template <>
inline bf16 to_type<bf16>(double x) {
  const float f = float(round_to_bf16(x));
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return {uint16_t(bits >> 16)};
}
template <class T>
double to_double(T x) {
  return double(x);
}
template <>
inline double to_double<bf16>(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return double(f);
}

struct AnyBlock {
  std::string name;
  virtual ~AnyBlock() = default;
  virtual bool intact() const = 0;  // holes, guards and, of an input, everything
};

// `count` elements of T, of which owned(i) says which the kernel may touch. All bytes start as 0xff: NaN in every type.
template <class T>
class Block : public AnyBlock {
 public:
  Block(std::string name_, int64_t count, int64_t shift, const std::function<bool(int64_t)>& owned)
      : count_(count), shift_(shift), owned_(size_t(count), 1), memory_(static_cast<T*>(std::aligned_alloc(64, bytes()))) {
    name = std::move(name_);
    std::memset(memory_, 0xff, bytes());
    if (owned)
      for (int64_t i = 0; i < count; ++i) owned_[size_t(i)] = owned(i);
  }
  ~Block() override {
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes());
    std::free(memory_);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  T* data() const { return memory_ + guard + shift_; }
  bool owns(int64_t i) const { return owned_[size_t(i)] != 0; }
  int64_t size() const { return count_; }
  // From now on a change of any element counts as damage.
  void freeze() { frozen_.assign(reinterpret_cast<const char*>(data()), reinterpret_cast<const char*>(data() + count_)); }
  void poison() const {
    ASAN_POISON_MEMORY_REGION(memory_, size_t(guard + shift_) * sizeof(T));
    ASAN_POISON_MEMORY_REGION(data() + count_, size_t(guard) * sizeof(T));
    for (int64_t i = 0; i < count_; ++i)
      if (!owns(i)) {
        int64_t end = i;
        while (end < count_ && !owns(end)) ++end;
        ASAN_POISON_MEMORY_REGION(data() + i, size_t(end - i) * sizeof(T));
        i = end;
      }
  }
  bool intact() const override {
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes());
    if (!frozen_.empty() && std::memcmp(frozen_.data(), data(), frozen_.size()) != 0) return false;
    for (int64_t i = -guard - shift_; i < count_ + guard; ++i)
      if (i < 0 || i >= count_ || !owns(i)) {
        const unsigned char* at = reinterpret_cast<const unsigned char*>(data() + i);
        for (size_t b = 0; b < sizeof(T); ++b)
          if (at[b] != 0xff) return false;
      }
    return true;
  }

 private:
  static constexpr int64_t guard = 96;  // whole vectors of every type: without a shift, data() is aligned as its memory
  size_t bytes() const { return (size_t(2 * guard + shift_ + count_) * sizeof(T) + 63) / 64 * 64; }
  const int64_t count_, shift_;
  std::vector<char> owned_, frozen_;
  T* const memory_;
};

enum class Lie { contiguous, channels_last, contiguous_slice, channels_last_slice };
inline const char* const lie_names[] = {"contiguous", "channels_last", "contiguous slice", "channels_last slice"};

inline vcr::Map<char> strides_of(const Sizes& s, Lie lie, int64_t gap) {
  const int64_t CP = s.channels();
  switch (lie) {
    case Lie::contiguous: return {nullptr, CP * s.S, s.S, 1};
    case Lie::channels_last: return {nullptr, CP * s.S, 1, CP};
    case Lie::contiguous_slice: return {nullptr, CP * (s.S + gap) + 2 * gap, s.S + gap, 1};
    default: return {nullptr, s.S * (CP + gap) + 2 * gap, 1, CP + gap};
  }
}

// All memory of one call.
class Memory {
 public:
  template <class T>
  T* array(const std::string& name, int64_t count) {
    return make<T>(name, count, 0, {})->data();
  }
  // Null where `inputs` has no such tensor.
  template <class T>
  T* input(const std::string& name, const Tensors& inputs) {
    const auto found = inputs.find(name);
    if (found == inputs.end()) return nullptr;
    Block<T>* block = make<T>(name, int64_t(found->second.size()), 0, {});
    for (size_t i = 0; i < found->second.size(); ++i) block->data()[i] = to_type<T>(found->second[i]);
    block->freeze();
    return block->data();
  }
  template <class T>
  vcr::Map<T> map(const std::string& name, const Sizes& s, Lie lie, int64_t gap, const std::vector<double>* values) {
    const vcr::Map<char> at = strides_of(s, lie, gap);
    const int64_t CP = s.channels();
    const int64_t count = s.map() == 0 ? 0 : (s.N - 1) * at.image + (CP - 1) * at.channel + (s.S - 1) * at.position + 1;
    std::vector<char> owned(static_cast<size_t>(count));
    for (int64_t n = 0; n < s.N; ++n)
      for (int64_t j = 0; j < CP; ++j)
        for (int64_t i = 0; i < s.S; ++i) owned[size_t(n * at.image + j * at.channel + i * at.position)] = 1;
    Block<T>* block = make<T>(name, count, gap % 7, [&](int64_t i) { return owned[size_t(i)] != 0; });
    const vcr::Map<T> map{block->data(), at.image, at.channel, at.position};
    if (values != nullptr) {
      for (int64_t n = 0; n < s.N; ++n)
        for (int64_t j = 0; j < CP; ++j)
          for (int64_t i = 0; i < s.S; ++i) *map.at(n, j, i) = to_type<T>((*values)[size_t((n * CP + j) * s.S + i)]);
      block->freeze();
    }
    return map;
  }
  void poison() const {
    for (const auto& poison : poisons_) poison();
  }
  // Names of what was damaged, empty if nothing.
  std::string damage() const {
    std::string names;
    for (const auto& block : blocks_)
      if (!block->intact()) names += (names.empty() ? "" : ", ") + block->name;
    return names;
  }
  // What stands in an array now must still stand there when damage() is asked.
  template <class T>
  void freeze(const std::string& name) {
    for (const auto& block : blocks_)
      if (block->name == name) static_cast<Block<T>*>(block.get())->freeze();
  }

 private:
  template <class T>
  Block<T>* make(const std::string& name, int64_t count, int64_t shift, const std::function<bool(int64_t)>& owned) {
    Block<T>* block = new Block<T>(name, count, shift, owned);
    blocks_.emplace_back(block);
    poisons_.emplace_back([block] { block->poison(); });
    return block;
  }
  std::vector<std::unique_ptr<AnyBlock>> blocks_;
  std::vector<std::function<void()>> poisons_;
};

template <class T>
std::vector<double> values_of(const T* from, int64_t count) {
  std::vector<double> values;
  if (from == nullptr) return values;
  for (int64_t i = 0; i < count; ++i) values.push_back(to_double(from[i]));
  return values;
}
template <class T>
std::vector<double> values_of(const vcr::Map<T>& map, const Sizes& s) {
  std::vector<double> values;
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t j = 0; j < s.channels(); ++j)
      for (int64_t i = 0; i < s.S; ++i) values.push_back(to_double(*map.at(n, j, i)));
  return values;
}

}  // namespace vcr_test
