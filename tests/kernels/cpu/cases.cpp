#include "cases.h"

#include <cmath>
#include <cstring>

namespace vcr_test {

using namespace vcr;

namespace {

// A vector, a block or a tile and one past it; the paper's widths and others; more and fewer concepts than are gathered together.
// Long maps are narrow, so that the reference's tape stays small.
const Sizes all_sizes[] = {
    {2, 3, 4, 4, 49},   {1, 32, 4, 4, 17}, {3, 4, 8, 4, 16},   {2, 3, 16, 4, 65},  {1, 4, 32, 8, 49},  {2, 3, 1, 4, 15},  {1, 1, 3, 4, 7},
    {2, 4, 5, 4, 49},   {1, 3, 33, 8, 17}, {2, 1, 4, 4, 513},  {1, 2, 4, 4, 1025}, {3, 3, 4, 4, 1},    {2, 4, 8, 4, 2},   {1, 1, 1, 4, 1},
    {1, 1, 8, 4, 1025}, {2, 5, 4, 4, 33},  {1, 1, 16, 4, 513}, {2, 7, 3, 4, 16},   {1, 32, 16, 4, 7},  {2, 4, 32, 8, 15}, {1, 3, 5, 7, 65},
    {2, 2, 4, 8, 17},   {3, 1, 33, 8, 2},  {1, 4, 8, 3, 49},   {2, 3, 3, 1, 1025}, {1, 1, 32, 8, 513}, {2, 32, 8, 4, 17}, {1, 4, 1, 1, 513},
    {2, 1, 5, 5, 2049}, {1, 9, 4, 16, 31}, {1, 1, 4, 4, 4097}, {4, 4, 16, 4, 49},  {2, 32, 1, 4, 49},  {1, 32, 33, 8, 2}, {3, 2, 32, 8, 65},
    {1, 1, 3, 4, 5001}, {2, 6, 16, 2, 17},
};
constexpr int size_count = int(sizeof all_sizes / sizeof all_sizes[0]);

// Draws that no floating point can do well are avoided: with no spread left, batch norm divides rounding errors by sqrt(eps), and an
// image that is normalised alone and not shifted has the mean 0, so that the query is nothing but rounding.
void make_sensible(Case& c) {
  if (c.norm == Norm::batch && c.size.N * c.size.S == 1) c.size.N = 2;  // PyTorch refuses it, too
  const int64_t rows = c.size.N * c.size.C;
  if (c.state_batch && (rows == 2 || rows == 3)) c.size.N = (3 + c.size.C) / c.size.C;  // gradients through the norm of so few rows cancel
  const bool no_spread = c.size.N == 1 || c.size.N * c.size.S <= 2 || c.draw == Draw::constant;
  if (c.norm == Norm::batch && no_spread) c.norm_affine = true;
  if (c.norm == Norm::none) c.norm_affine = false;
}

// splitmix64
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t x = state += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  double uniform() { return (double(next() >> 11) + 0.5) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()); }
  std::vector<double> normals(int64_t count, double mean, double sigma) {
    std::vector<double> x(static_cast<size_t>(count));
    for (double& v : x) v = double(float(mean + sigma * normal()));
    return x;
  }
  std::vector<double> uniforms(int64_t count, double low, double high) {
    std::vector<double> x(static_cast<size_t>(count));
    for (double& v : x) v = double(float(low + (high - low) * uniform()));
    return x;
  }
};

std::vector<double> draw_map(Random& random, const Case& c, const std::vector<double>& offset, const std::vector<double>& sigma) {
  const Sizes& s = c.size;
  std::vector<double> y(static_cast<size_t>(s.map()));
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t j = 0; j < s.channels(); ++j) {
      double* row = y.data() + (n * s.channels() + j) * s.S;
      for (int64_t i = 0; i < s.S; ++i) {
        row[i] = round_to_bf16(offset[size_t(j)] + sigma[size_t(j)] * random.normal());
        if (c.draw == Draw::constant) row[i] = i ? row[0] : std::round(row[0] * 4) / 4;
        if (c.draw == Draw::periodic && i >= 3) row[i] = row[i - 3];
      }
    }
  return y;
}
std::vector<double> draw_gradient(Random& random, int64_t count) {
  std::vector<double> x = random.normals(count, 0, 1);
  for (double& v : x) v = round_to_bf16(v);
  return x;
}

void draw_given_norm(Random& random, const std::vector<double>& offset, const std::string& prefix, Tensors& t) {
  std::vector<double> mean = random.normals(int64_t(offset.size()), 0, 0.3);
  t[prefix + "var"] = random.uniforms(int64_t(offset.size()), 0.5, 1.5);
  for (size_t j = 0; j < offset.size(); ++j) mean[j] = double(float(mean[j] + offset[j]));
  t[prefix + "mean"] = mean;
}
void draw_norm_affine(Random& random, int64_t channels, const std::string& prefix, Tensors& t) {
  t[prefix + "weight"] = random.normals(channels, 1, 0.2);
  t[prefix + "bias"] = random.normals(channels, 0, 0.5);
}
void draw_sampler(Random& random, const Case& c, Tensors& t) {
  const int64_t weights = c.size.channels() * c.size.pt;
  const double width = std::sqrt(double(c.size.p));
  t["value"] = random.normals(weights, 0, 1 / width);
  if (c.sampler == Sampler::dynamic_query) {
    t["query"] = random.normals(weights, 0, 1 / width);
    t["key"] = random.normals(weights, 0, 1 / width);
  }
  if (c.sampler == Sampler::static_query) t["logit"] = random.normals(c.size.channels(), 0, 1 / width);
}
void draw_reasoner(Random& random, const Case& c, Tensors& t, const std::string& prefix) {
  const int64_t C = c.size.C, pt = c.size.pt;
  if (c.edges == Edges::dynamic_edges) t["edge"] = random.normals(pt * C, 0, 0.5);
  if (c.edges == Edges::static_edges) t["edge"] = random.normals(C * C, 0, 1 / std::sqrt(double(C)));
  if (!c.state_batch) {
    t[prefix + "mean"] = random.normals(pt, 0, 0.3);
    t[prefix + "var"] = random.uniforms(pt, 0.5, 1.5);
  }
  if (c.state_affine) {
    t[prefix + "weight"] = random.normals(pt, 1, 0.3);
    t[prefix + "bias"] = random.normals(pt, 0.2, 0.4);
  }
}
void draw_modulator(Random& random, const Case& c, Tensors& t) {
  const int64_t weights = c.size.channels() * c.size.pt;
  if (c.affine != Affine::shift) t["scale_weight"] = random.normals(weights, 0, 0.4);
  if (c.affine != Affine::scale) t["shift_weight"] = random.normals(weights, 0, 0.4);
  t["scale_bias"] = random.normals(c.size.channels(), 1, 0.3);
  t["shift_bias"] = random.normals(c.size.channels(), 0, 0.5);
}

}  // namespace

double round_to_bf16(double x) {
  const float f = float(x);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  float y;
  std::memcpy(&y, &bits, 4);
  return double(y);
}

std::string Case::name() const {
  const char* draws[] = {"random", "constant", "periodic"};
  std::string s = std::string(sampler_names[int(sampler)]) + "-" + edges_names[int(edges)] + "-" + modulation_names[int(modulation)] + "-" +
                  affine_names[int(affine)] + "-norm_" + norm_names[int(norm)] + (norm_affine ? "" : "_plain") +
                  (state_batch ? "-state_batch" : "-state_given") + (state_affine ? "" : "_plain");
  if (attention_gradient) s += "-dattention";
  if (shortcut != Shortcut::none) s += shortcut == Shortcut::plain ? "-shortcut" : "-shortcut_normed";
  return s + "-N" + std::to_string(size.N) + "C" + std::to_string(size.C) + "p" + std::to_string(size.p) + "pt" + std::to_string(size.pt) +
         "S" + std::to_string(size.S) + "-" + draws[int(draw)];
}

// All 270 combinations of variants; sizes, draws and absent weights go round beside them, so that every (p, sampler, modulation) occurs.
std::vector<Case> middle_cases() {
  std::vector<Case> cases;
  int k = 0;
  for (int repeat = 0; repeat < 2; ++repeat)
    for (int affine = 0; affine < 3; ++affine)
      for (int edges = 0; edges < 3; ++edges)
        for (int state_batch = 0; state_batch < 2; ++state_batch)
          for (int norm = 0; norm < 3; ++norm)
            for (int sampler = 0; sampler < 3; ++sampler)
              for (int modulation = 0; modulation < 2; ++modulation) {
                if (Sampler(sampler) == Sampler::pool && Modulation(modulation) == Modulation::pixel) continue;
                Case c;
                c.size = all_sizes[(k * 11 + k / size_count) % size_count];
                c.sampler = Sampler(sampler), c.edges = Edges(edges), c.modulation = Modulation(modulation), c.affine = Affine(affine);
                c.norm = Norm(norm), c.state_batch = state_batch == 1;
                c.norm_affine = k % 4 != 1, c.state_affine = k % 5 != 1;
                c.draw = k % 7 == 3 ? Draw::periodic : k % 11 == 5 ? Draw::constant : Draw::random;
                c.seed = uint64_t(1000 + k);
                make_sensible(c);
                if (repeat == 0 || k % 3 == 0) cases.push_back(c);
                ++k;
              }
  return cases;
}

std::vector<Case> sample_cases() {
  std::vector<Case> cases;
  int k = 0;
  for (const Sizes& size : all_sizes)
    for (int sampler = 0; sampler < 3; ++sampler, ++k) {
      Case c;
      c.size = size, c.sampler = Sampler(sampler), c.seed = uint64_t(5000 + k);
      c.attention_gradient = k % 2 == 0;
      c.draw = k % 5 == 2 ? Draw::periodic : k % 7 == 3 ? Draw::constant : Draw::random;
      cases.push_back(c);
    }
  return cases;
}

std::vector<Case> reason_cases() {
  std::vector<Case> cases;
  int k = 0;
  for (const Sizes& size : {Sizes{1, 1, 1, 4, 1}, Sizes{2, 3, 1, 4, 1}, Sizes{3, 32, 1, 8, 1}, Sizes{1, 17, 1, 1, 1}, Sizes{2, 9, 1, 7, 1},
                            Sizes{2, 33, 1, 4, 1}})
    for (int edges = 0; edges < 3; ++edges)
      for (int batch = 0; batch < 2; ++batch, ++k) {
        Case c;
        c.size = size, c.edges = Edges(edges), c.state_batch = batch == 1, c.state_affine = k % 3 != 1, c.seed = uint64_t(6000 + k);
        cases.push_back(c);
      }
  return cases;
}

std::vector<Case> modulate_cases() {
  std::vector<Case> cases;
  int k = 0;
  for (const Sizes& size : all_sizes)
    for (int modulation = 0; modulation < 2; ++modulation, ++k) {
      Case c;
      c.size = size, c.modulation = Modulation(modulation), c.affine = Affine(k % 3), c.seed = uint64_t(7000 + k);
      c.draw = k % 5 == 2 ? Draw::periodic : Draw::random;
      cases.push_back(c);
    }
  return cases;
}

std::vector<Case> norm_relu_cases() {
  std::vector<Case> cases;
  int k = 0;
  for (const Sizes& size : all_sizes)
    for (int batch = 0; batch < 2; ++batch)
      for (int shortcut = 0; shortcut < 3 - batch; ++shortcut, ++k) {
        if (batch && size.N * size.S == 1) continue;
        Case c;
        c.size = size, c.shortcut = Shortcut(shortcut), c.seed = uint64_t(9000 + k);
        c.norm = batch ? Norm::batch : k % 4 == 1 ? Norm::none : Norm::given, c.norm_affine = k % 5 != 2;
        cases.push_back(c);
      }
  return cases;
}

Tensors draw_middle(const Case& c) {
  Random random{c.seed};
  Tensors t;
  const int64_t CP = c.size.channels();
  const std::vector<double> offset = random.normals(CP, 0, 1), sigma = random.uniforms(CP, 0.5, 1.5);
  t["y"] = draw_map(random, c, offset, sigma);
  t["grad_out"] = draw_gradient(random, c.size.map());
  if (c.norm == Norm::given) draw_given_norm(random, offset, "norm_", t);
  if (c.norm_affine) draw_norm_affine(random, CP, "norm_", t);
  draw_sampler(random, c, t);
  draw_reasoner(random, c, t, "state_");
  draw_modulator(random, c, t);
  return t;
}

Tensors draw_sample(const Case& c) {
  Random random{c.seed};
  Tensors t;
  const int64_t CP = c.size.channels();
  t["z"] = draw_map(random, c, random.normals(CP, 0, 0.5), random.uniforms(CP, 0.5, 1.5));
  t["dh"] = random.normals(c.size.states(), 0, 1);
  if (c.attention_gradient) t["dattention"] = random.normals(c.size.N * c.size.C * c.size.S, 0, 1);
  draw_sampler(random, c, t);
  return t;
}

Tensors draw_reason(const Case& c) {
  Random random{c.seed};
  Tensors t;
  t["h"] = random.normals(c.size.states(), 0.2, 1);
  t["dstate"] = random.normals(c.size.states(), 0, 1);
  draw_reasoner(random, c, t, "");
  return t;
}

Tensors draw_modulate(const Case& c) {
  Random random{c.seed};
  Tensors t;
  const Sizes& s = c.size;
  t["z"] = draw_map(random, c, random.normals(s.channels(), 0, 0.5), random.uniforms(s.channels(), 0.5, 1.5));
  t["grad_out"] = draw_gradient(random, s.map());
  t["state"] = random.normals(s.states(), 0, 1);
  draw_modulator(random, c, t);
  if (c.modulation == Modulation::pixel) {
    std::vector<double> attention = random.uniforms(s.N * s.C * s.S, 0.01, 1);
    for (int64_t row = 0; row < s.N * s.C; ++row) {
      double* a = attention.data() + row * s.S;
      double sum = 0;
      for (int64_t i = 0; i < s.S; ++i) {
        if (c.draw == Draw::periodic && i >= 3) a[i] = a[i - 3];
        sum += a[i];
      }
      for (int64_t i = 0; i < s.S; ++i) a[i] = double(float(a[i] / sum));
    }
    t["attention"] = attention;
  }
  return t;
}

Tensors draw_norm_relu(const Case& c) {
  Random random{c.seed};
  Tensors t;
  const int64_t channels = c.size.channels();
  const auto draw = [&](const std::string& map, const std::string& prefix, bool norm) {
    const std::vector<double> offset = random.normals(channels, 0, 1), sigma = random.uniforms(channels, 0.5, 1.5);
    t[map] = draw_map(random, c, offset, sigma);
    if (!norm) return;
    draw_given_norm(random, offset, prefix, t);
    if (c.norm_affine) draw_norm_affine(random, channels, prefix, t);
  };
  draw("y", "norm_", c.norm == Norm::given);
  if (c.norm == Norm::batch && c.norm_affine) draw_norm_affine(random, channels, "norm_", t);
  if (c.shortcut != Shortcut::none) draw("shortcut", "shortcut_norm_", c.shortcut == Shortcut::normed);
  if (c.norm == Norm::batch) t["grad_out"] = draw_gradient(random, c.size.map());
  return t;
}

}  // namespace vcr_test
