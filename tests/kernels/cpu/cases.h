// What is checked: sizes, variants and inputs. A case's inputs are drawn once and serve every feature type, so maps hold numbers that
// bfloat16 has and everything else numbers that float has.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/variants.h"

namespace vcr_test {

// By the names of the ops' arguments; a gradient is "d" + name. Maps are [N, C p, S]. A missing name: the variant has no such tensor.
using Tensors = std::map<std::string, std::vector<double>>;

struct Sizes {
  int64_t N, C, p, pt, S;
  int64_t channels() const { return C * p; }
  int64_t map() const { return N * C * p * S; }
  int64_t states() const { return N * C * pt; }
};

// constant: every position of an (image, channel) is the same; periodic: every third one is. Both make the softmax's maximum a tie.
enum class Draw { random, constant, periodic };
// What norm_relu adds.
enum class Shortcut { none, plain, normed };

struct Case {
  Sizes size;
  vcr::Sampler sampler = vcr::Sampler::dynamic_query;
  vcr::Edges edges = vcr::Edges::dynamic_edges;
  vcr::Modulation modulation = vcr::Modulation::channel;
  vcr::Affine affine = vcr::Affine::both;
  vcr::Norm norm = vcr::Norm::batch;
  bool state_batch = true;
  bool norm_affine = true, state_affine = true;  // the batch norms have weight and bias
  bool attention_gradient = false;               // of concept_sample alone
  Shortcut shortcut = Shortcut::none;            // of norm_relu alone
  Draw draw = Draw::random;
  uint64_t seed = 1;

  std::string name() const;
};

std::vector<Case> middle_cases();
std::vector<Case> sample_cases();
std::vector<Case> reason_cases();
std::vector<Case> modulate_cases();
std::vector<Case> norm_relu_cases();

// Inputs and parameters of the op named; `grad_out`, `dh`, `dattention` and `dstate` are among them.
Tensors draw_middle(const Case& c);
Tensors draw_sample(const Case& c);
Tensors draw_reason(const Case& c);
Tensors draw_modulate(const Case& c);
Tensors draw_norm_relu(const Case& c);

double round_to_bf16(double x);

}  // namespace vcr_test
