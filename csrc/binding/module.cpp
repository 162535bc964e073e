// vcr_ops._C: what was built in, and which of it is in use. The ops are in a library of their own, which knows nothing of Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/variants.h"

namespace py = pybind11;

#if defined(__x86_64__)
#define VCR_LEVELS "baseline", "avx2", "avx512"
#else
#define VCR_LEVELS "neon"
#endif
#ifndef VCR_TORCH_VERSION
#define VCR_TORCH_VERSION "unknown"
#endif
#ifndef VCR_CUDA_ARCHS
#define VCR_CUDA_ARCHS ""
#endif
#ifndef VCR_OPS_VERSION
#define VCR_OPS_VERSION "unknown"
#endif

namespace {

template <int count>
std::vector<std::string> list(const char* const (&names)[count]) {
  return {names, names + count};
}

std::vector<std::string> words(const char* text) {
  std::istringstream in(text);
  return {std::istream_iterator<std::string>(in), {}};
}

py::dict variants() {
  py::dict out;
  out["sampler"] = list(vcr::sampler_names);
  out["edges"] = list(vcr::edges_names);
  out["modulation"] = list(vcr::modulation_names);
  out["affine"] = list(vcr::affine_names);
  return out;
}

py::dict build_info() {
  py::dict out;
  out["version"] = VCR_OPS_VERSION;
  out["torch"] = VCR_TORCH_VERSION;
  out["compiler"] = std::string(
#if defined(__clang__)
      "clang "
#else
      "gcc "
#endif
      __VERSION__);
  out["isa_levels"] = std::vector<std::string>{VCR_LEVELS};
  out["dtypes"] = std::vector<std::string>{"float32", "float64", "bfloat16"};
  out["cuda_archs"] = words(VCR_CUDA_ARCHS);
  out["variants"] = variants();
  return out;
}

// The op library is asked: the level is chosen where the tables of kernels are, and a second copy could choose another.
std::string active_isa() {
  const py::module_ library = py::module_::import("vcr_ops.library");
  const py::object problem = library.attr("why_not")();
  if (!problem.is_none()) throw std::runtime_error(problem.cast<std::string>());
  return library.attr("active_isa")().cast<std::string>();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What was built into vcr_ops, and which instruction set is in use.";
  m.def("build_info", &build_info, "Versions, compiler, instruction-set levels, CUDA architectures and variants of this build.");
  m.def("active_isa", &active_isa,
        "The instruction-set level in use, one of build_info()['isa_levels'], as the op library says it.\n\n"
        "Raises RuntimeError where the op library isn't loaded; says why and what to do.");
  m.def("variants", &variants, "The names of each variant's choices that the op library knows.");
}
