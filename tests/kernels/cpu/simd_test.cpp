// csrc/cpu/simd.h against plain loops and libm.
#include "simd_test.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/simd.h"

namespace vcr_test {

using namespace vcr;

namespace {

int failures = 0;

void expect(bool condition, const char* what, double got = 0, double wanted = 0) {
  if (condition) return;
  if (++failures <= 20) std::printf("  simd: %s: got %.9g, wanted %.9g\n", what, got, wanted);
}
uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// Pages with one that can't be touched after them and before them.
class Pages {
 public:
  Pages() : page_(size_t(sysconf(_SC_PAGESIZE))) {
    memory_ = static_cast<char*>(mmap(nullptr, 3 * page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_, page_, PROT_NONE) != 0 || mprotect(memory_ + 2 * page_, page_, PROT_NONE) != 0)
      std::abort();
  }
  ~Pages() { munmap(memory_, 3 * page_); }
  char* begin() const { return memory_ + page_; }
  char* end() const { return memory_ + 2 * page_; }

 private:
  const size_t page_;
  char* memory_;
};

template <class T>
T small_value(int i) {
  return narrow<T>(acc_t<T>(i + 1) / 4);
}

// A partial access at the very end and at the very begin of what may be touched.
template <class T>
void partial_access() {
  using A = acc_t<T>;
  constexpr int W = lanes<A>;
  const Pages pages;
  for (int count = 1; count < W; ++count)
    for (T* at : {reinterpret_cast<T*>(pages.end()) - count, reinterpret_cast<T*>(pages.begin())}) {
      for (int i = 0; i < count; ++i) at[i] = small_value<T>(i);
      const vec<A> x = load_partial(at, count);
      for (int i = 0; i < W; ++i) expect(x[i] == (i < count ? A(i + 1) / 4 : A(0)), "load_partial", double(x[i]), i + 1);
      vec<A> y = zeros<A>();
      for (int i = 0; i < W; ++i) y[i] = A(i + 7);
      store_partial(at, y, count);
      for (int i = 0; i < count; ++i) expect(widen(at[i]) == A(i + 7), "store_partial", double(widen(at[i])), i + 7);
    }
  // what follows keeps its bytes
  T buffer[2 * W];
  for (int count = 1; count < W; ++count) {
    for (int i = 0; i < 2 * W; ++i) buffer[i] = small_value<T>(0);
    store_partial(buffer, splat(A(9)), count);
    for (int i = 0; i < 2 * W; ++i)
      expect(widen(buffer[i]) == (i < count ? A(9) : A(0.25)), "store_partial's neighbours", double(widen(buffer[i])), 0.25);
  }
  T* last = reinterpret_cast<T*>(pages.end()) - W;
  for (int i = 0; i < W; ++i) last[i] = small_value<T>(i);
  const vec<A> x = load(last);
  for (int i = 0; i < W; ++i) expect(x[i] == A(i + 1) / 4, "load", double(x[i]), i);
  store(last, x + A(1));
  for (int i = 0; i < W; ++i) expect(widen(last[i]) == A(i + 1) / 4 + 1, "store", double(widen(last[i])), i);
}

template <class A>
void lanes_and_sums() {
  constexpr int W = lanes<A>;
  vec<A> rows[W];
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) rows[i][j] = A(i * W + j + (i * j) % 5);
  const vec<A> sums = sum_rows<A>(rows);
  for (int i = 0; i < W; ++i) {
    A sum = 0, top = rows[i][0];
    for (int j = 0; j < W; ++j) sum += rows[i][j], top = rows[i][j] > top ? rows[i][j] : top;
    expect(sums[i] == sum, "sum_rows", double(sums[i]), double(sum));
    expect(hsum<A>(rows[i]) == sum, "hsum", double(hsum<A>(rows[i])), double(sum));
    expect(hmax<A>(rows[i]) == top, "hmax", double(hmax<A>(rows[i])), double(top));
    expect(hmax<A>(-rows[i]) == -rows[i][0], "hmax of negatives", double(hmax<A>(-rows[i])), double(-rows[i][0]));
  }
  for (int count = 0; count <= W; ++count) {
    const vec<A> kept = keep_first<A>(splat(A(3)), count);
    for (int i = 0; i < W; ++i) expect(kept[i] == (i < count ? A(3) : A(0)), "keep_first", double(kept[i]), count);
  }
  const A nan = A(__builtin_nan("")), inf = A(__builtin_inf());
  const A specials[] = {nan, -nan, inf, -inf, A(0), -A(0), A(2), A(-2)};
  for (int i = 0; i < 8; ++i) {
    const vec<A> x = splat(specials[i]);
    const A positive = relu<A>(x)[W - 1], passed = where_active<A>(x, splat(A(5)))[W - 1];
    const bool is_nan = specials[i] != specials[i];
    expect(is_nan ? positive != positive : positive == (specials[i] > 0 ? specials[i] : A(0)), "relu", double(positive),
           double(specials[i]));
    expect(passed == (specials[i] <= 0 ? A(0) : A(5)), "where_active", double(passed), double(specials[i]));
  }
  const vec<A> product = fma(splat(A(3)), splat(A(5)), splat(A(-7)));
  for (int i = 0; i < W; ++i) expect(product[i] == A(8), "fma", double(product[i]), 8);
}

void transposed() {
  constexpr int W = lanes<float>;
  vec<float> rows[W];
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) rows[i][j] = float(i * W + j);
  transpose(rows);
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) expect(rows[i][j] == float(j * W + i), "transpose", double(rows[i][j]), j * W + i);
}

void quads() {
  constexpr int W = lanes<float>;
  vec<float> rows[4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < W; ++j) rows[i][j] = float(i * W + j * j % 7);
  const vec<float> sums = sum_within_quads(rows);
  for (int j = 0; j < W; ++j) {
    float sum = 0;
    for (int k = 0; k < 4; ++k) sum += rows[j % 4][j / 4 * 4 + k];
    expect(sums[j] == sum, "sum_within_quads", double(sums[j]), double(sum));
    expect(exchange<1>(rows[1])[j] == rows[1][j ^ 1], "exchange<1>");
    if constexpr (W >= 8) expect(exchange<4>(rows[1])[j] == rows[1][j ^ 4], "exchange<4>");
    if constexpr (W >= 16) expect(exchange<8>(rows[1])[j] == rows[1][j ^ 8], "exchange<8>");
    expect(broadcast_in_quads<0>(rows[2])[j] == rows[2][j / 4 * 4], "broadcast_in_quads<0>");
    expect(broadcast_in_quads<3>(rows[2])[j] == rows[2][j / 4 * 4 + 3], "broadcast_in_quads<3>");
  }
  quad four[4];
  for (int i = 0; i < 4; ++i) four[i] = quad{float(i), float(i * i), 5, float(-3 * i)};
  const quad totals = sum_quads(four);
  for (int i = 0; i < 4; ++i) expect(totals[i] == float(i + i * i + 5 - 3 * i), "sum_quads", double(totals[i]), i);
}

template <int G>
void groups() {
  constexpr int W = lanes<float>;
  if constexpr (G <= W) {
    vec<float> rows[G];
    for (int i = 0; i < G; ++i)
      for (int j = 0; j < W; ++j) rows[i][j] = float(i * W + j * j % 7);
    const vec<float> sums = sum_within<G>(rows);
    for (int j = 0; j < W; ++j) {
      float sum = 0;
      for (int k = 0; k < G; ++k) sum += rows[j % G][j / G * G + k];
      expect(sums[j] == sum, "sum_within", double(sums[j]), double(sum));
      expect(broadcast_within<G, 1>(rows[2])[j] == rows[2][j / G * G + 1], "broadcast_within");
    }
  }
}

template <class A>
void comparison() {
  const A nan = A(__builtin_nan(""));
  vec<A> a = splat(A(2));
  expect(!any_greater<A>(a, a), "any_greater of equals");
  for (int i = 0; i < lanes<A>; ++i) {
    vec<A> b = a;
    b[i] = A(1);
    expect(any_greater<A>(a, b) && !any_greater<A>(b, a), "any_greater in one lane", i);
    b[i] = nan;
    expect(!any_greater<A>(a, b) && !any_greater<A>(b, a), "any_greater with NaN", i);
  }
}

// Streaming stores, each type at an aligned address.
template <class T>
void streamed() {
  constexpr int W = lanes<acc_t<T>>;
  alignas(64) T to[3 * W];
  for (T& x : to) x = small_value<T>(0);
  expect(can_stream(to) && !can_stream(to + 1), "can_stream");
  store_stream(to + W, splat(acc_t<T>(9)));
  finish_stream();
  for (int i = 0; i < 3 * W; ++i)
    expect(widen(to[i]) == (i / W == 1 ? acc_t<T>(9) : acc_t<T>(0.25)), "store_stream", double(widen(to[i])), i);
}

// Rounding to nearest, ties to even, by what stands on either side.
uint16_t rounded(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return uint16_t((bits >> 16) | 0x40u);
  const uint16_t below = uint16_t(bits >> 16);  // towards zero
  const uint32_t rest = bits & 0xffffu;
  if (rest > 0x8000u || (rest == 0x8000u && (below & 1))) return uint16_t(below + 1);
  return below;
}
void bf16_rounding() {
  constexpr int W = lanes<float>;
  bf16 to[2 * W];
  for (uint32_t high = 0; high < 0x10000u; high += W) {
    bf16 from[W];
    for (int i = 0; i < W; ++i) from[i].bits = uint16_t(high + uint32_t(i));
    const vec<float> x = load(from);
    store(to, x);
    for (int i = 0; i < W; ++i) {
      const uint32_t bits = uint32_t(from[i].bits) << 16;
      expect(bits_of(x[i]) == bits || x[i] != x[i], "bf16 widened", double(bits_of(x[i])), double(bits));
      expect(to[i].bits == rounded(float_of(bits)), "bf16 there and back", to[i].bits, from[i].bits);
    }
  }
  // each of these low halves after each high half: ties, their neighbours, the largest that rounds to infinity, NaNs
  for (const uint32_t low : {0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
    for (uint32_t high = 0; high < 0x10000u; high += W) {
      vec<float> x = zeros<float>();
      float values[W];
      for (int i = 0; i < W; ++i) values[i] = float_of((high + uint32_t(i)) << 16 | low);
      x = load(values);
      store(to, x);
      for (int i = 0; i < W; ++i) {
        expect(to[i].bits == rounded(values[i]), "bf16 rounded", to[i].bits, rounded(values[i]));
        expect(narrow<bf16>(values[i]).bits == rounded(values[i]), "bf16 rounded alone", narrow<bf16>(values[i]).bits, rounded(values[i]));
      }
      float others[W];  // of which some are NaN where the first aren't
      for (int i = 0; i < W; ++i) others[i] = float_of((high + uint32_t(i) * 0x0811u) << 16 | (low ^ 0x8000u));
      store_two(to, x, load(others));
      for (int i = 0; i < W; ++i) {
        expect(to[i].bits == rounded(values[i]), "the first of two bf16 vectors rounded", to[i].bits, rounded(values[i]));
        expect(to[W + i].bits == rounded(others[i]), "the second of two bf16 vectors rounded", to[W + i].bits, rounded(others[i]));
      }
    }
}

// Largest relative error of f over [low, high] in steps, against libm in double.
template <class F, class G>
double worst_error(double low, double high, int steps, F f, G exact) {
  constexpr int W = lanes<float>;
  double worst = 0;
  for (int k = 0; k < steps; k += W) {
    float in[W], out[W];
    for (int i = 0; i < W; ++i) in[i] = float(low + (high - low) * double(k + i) / double(steps));
    store(out, f(load(in)));
    for (int i = 0; i < W; ++i) {
      const double right = exact(double(in[i]));
      const double error = right == 0 ? std::fabs(double(out[i])) : std::fabs(double(out[i]) - right) / std::fabs(right);
      worst = !(error <= worst) ? error : worst;
    }
  }
  return worst;
}
template <class A>
A of_one(A x, vec<A> (*f)(vec<A>)) {
  return f(splat(x))[lanes<A> - 1];
}
vec<float> exp_float(vec<float> x) { return exp_nonpositive(x); }
vec<float> power_float(vec<float> x) { return power_of_two(x); }
vec<float> tanh_float(vec<float> x) { return vcr::tanh(x); }

void functions() {
  const double exact_exp = worst_error(-87.2, 0, 1 << 18, exp_float, [](double x) { return std::exp(x); });
  expect(exact_exp <= 1.5e-7, "exp_nonpositive's relative error", exact_exp, 1.5e-7);
  const float inf = __builtin_inff(), nan = __builtin_nanf("");
  expect(of_one<float>(0, exp_float) == 1, "exp(0)", double(of_one<float>(0, exp_float)), 1);
  expect(of_one<float>(-0.f, exp_float) == 1, "exp(-0)", double(of_one<float>(-0.f, exp_float)), 1);
  for (float x : {-inf, -3e38f, -1000.f, -104.f})
    expect(of_one<float>(x, exp_float) == 0, "exp far below", double(of_one<float>(x, exp_float)), 0);
  for (float x = -90; x < -86; x += 0.01f) {
    const float e = of_one<float>(x, exp_float);
    expect(e >= 0 && std::fabs(double(e) - std::exp(double(x))) <= 1.25e-38, "exp at the edge of the normal numbers", double(e),
           std::exp(double(x)));
  }
  expect(std::isnan(of_one<float>(nan, exp_float)), "exp(NaN)");
  const double exact_power = worst_error(-125.9, 100, 1 << 18, power_float, [](double x) { return std::exp2(x); });
  expect(exact_power <= 2e-7, "power_of_two's relative error", exact_power, 2e-7);
  for (float x : {-inf, -3e38f, -1000.f, -150.f})
    expect(of_one<float>(x, power_float) == 0, "power_of_two far below", double(of_one<float>(x, power_float)), 0);
  for (int x = -126; x < 127; ++x)
    expect(double(of_one<float>(float(x), power_float)) == std::ldexp(1.0, x), "power_of_two of a whole number", x);
  expect(std::isnan(of_one<float>(nan, power_float)), "power_of_two(NaN)");
  const double small = worst_error(-0.7, 0.7, 1 << 16, tanh_float, [](double x) { return std::tanh(x); });
  const double large = worst_error(-12, 12, 1 << 16, tanh_float, [](double x) { return std::tanh(x); });
  expect(small <= 3e-7, "tanh's relative error near 0", small, 3e-7);
  expect(large <= 3e-7, "tanh's relative error", large, 3e-7);
  expect(of_one<float>(inf, tanh_float) == 1 && of_one<float>(-inf, tanh_float) == -1, "tanh(inf)");
  expect(of_one<float>(1e-30f, tanh_float) == 1e-30f, "tanh of a tiny number", double(of_one<float>(1e-30f, tanh_float)), 1e-30);
  expect(std::isnan(of_one<float>(nan, tanh_float)), "tanh(NaN)");
  for (double x : {-700.0, -20.5, -1e-9, 0.0}) {
    const double e = exp_nonpositive(splat(x))[0], t = vcr::tanh(splat(x))[lanes<double> - 1];
    expect(std::fabs(e - std::exp(x)) <= 4e-16 * std::exp(x), "exp of double", e, std::exp(x));
    expect(power_of_two(splat(x))[0] == std::exp2(x), "power_of_two of double");
    expect(std::fabs(t - std::tanh(x)) <= 4e-16 * std::fabs(std::tanh(x)), "tanh of double", t, std::tanh(x));
  }
}

}  // namespace

int simd_failures() {
  partial_access<float>();
  partial_access<double>();
  partial_access<bf16>();
  lanes_and_sums<float>();
  lanes_and_sums<double>();
  transposed();
  quads();
  groups<4>();
  groups<8>();
  groups<16>();
  comparison<float>();
  comparison<double>();
  streamed<float>();
  streamed<double>();
  bf16_rounding();
  functions();
  return failures;
}

std::string simd_width() { return std::to_string(lanes<float>) + " lanes of float"; }

}  // namespace vcr_test
