// The comparison. This driver is about memory, order and missing terms; how many digits a float may lose is judged by tests/closeness.py.
// Here an error is measured against that of the literal equations in float, on one draw, and so with a generous factor.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "cases.h"

namespace vcr_test {

struct Precision {
  const char* name;
  double plain;    // what the plain float error is multiplied with
  double epsilon;  // of the accumulation type
  double storage;  // a map's own rounding
};
template <class T>
Precision precision();

struct Norms {
  double rms = 0, max = 0;
};
inline Norms norms(const std::vector<double>& x, const std::vector<double>* minus = nullptr) {
  Norms n;
  for (size_t i = 0; i < x.size(); ++i) {
    const double d = minus ? x[i] - (*minus)[i] : x[i];
    if (std::isnan(d)) {
      if (minus && std::isnan(x[i]) && std::isnan((*minus)[i])) continue;
      if (minus) return {HUGE_VAL, HUGE_VAL};
      continue;
    }
    n.rms += d * d;
    n.max = std::max(n.max, std::fabs(d));
  }
  n.rms = x.empty() ? 0 : std::sqrt(n.rms / double(x.size()));
  return n;
}

// The largest error / bound, and where.
struct Largest {
  double ratio = 0;
  std::string at;
  void note(double other, const std::string& name) {
    if (!(other <= ratio)) ratio = other, at = name;
  }
};

class Reference {
 public:
  Tensors exact, plain;
  Norms typical;  // of the gradients: one that is zero in theory is judged on the scale of the others

  Reference(Tensors exact_, Tensors plain_) : exact(std::move(exact_)), plain(std::move(plain_)) {
    std::vector<double> rms, max;
    for (const auto& named : exact)
      if (named.first[0] == 'd') rms.push_back(norms(named.second).rms), max.push_back(norms(named.second).max);
    typical = {median(rms), median(max)};
  }

  // Empty, or what is wrong. `largest` is told of every tensor.
  std::string check(const Tensors& got, const Precision& type, const std::vector<std::string>& skip, Largest& largest) const {
    std::string wrong;
    for (const auto& named : exact) {
      const std::string& name = named.first;
      if (std::find(skip.begin(), skip.end(), name) != skip.end()) continue;
      const auto found = got.find(name);
      if (found == got.end() || found->second.size() != named.second.size()) {
        wrong += "    " + name + ": not written\n";
        continue;
      }
      const bool map = name == "out" || name == "dy" || name == "dz" || name == "dshortcut", gradient = name[0] == 'd';
      const Norms error = norms(found->second, &named.second), plain_error = norms(plain.at(name), &named.second),
                  own = norms(named.second);
      // the last term: the variance of equal numbers of about 1 is 0 up to the rounding of their mean
      const auto bound = [&](double of_plain, double own_, double typical_) {
        return type.plain * of_plain + 64 * type.epsilon * (gradient ? std::max(own_, typical_) : own_) + (map ? type.storage * own_ : 0) +
               64 * type.epsilon * type.epsilon;
      };
      const double rms = error.rms / bound(plain_error.rms, own.rms, typical.rms);
      const double max = error.max / bound(plain_error.max, own.max, typical.max);
      const double ratio = std::max(rms, max);
      largest.note(ratio, name);
      if (ratio <= 1) continue;
      size_t worst = 0;
      double distance = -1;
      for (size_t i = 0; i < named.second.size(); ++i) {
        const double d = std::fabs(found->second[i] - named.second[i]);
        if (std::isnan(d) ? !std::isnan(named.second[i]) : d > distance) distance = std::isnan(d) ? HUGE_VAL : d, worst = i;
      }
      char line[256];
      std::snprintf(line, sizeof line,
                    "    %s: error %.3g of its bound; rms %.3g of %.3g, plain float's %.3g; worst at %zu: %.9g, reference %.9g\n",
                    name.c_str(), ratio, error.rms, own.rms, plain_error.rms, worst, found->second[worst], named.second[worst]);
      wrong += line;
    }
    return wrong;
  }

 private:
  static double median(std::vector<double> x) {
    if (x.empty()) return 0;
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
  }
};

// Empty, or the names of tensors that differ in a bit.
inline std::string differing(const Tensors& a, const Tensors& b) {
  std::string names;
  for (const auto& named : a) {
    const auto found = b.find(named.first);
    if (found == b.end() || found->second.size() != named.second.size() ||
        std::memcmp(found->second.data(), named.second.data(), named.second.size() * sizeof(double)) != 0)
      names += (names.empty() ? "" : ", ") + named.first;
  }
  return names;
}

}  // namespace vcr_test
