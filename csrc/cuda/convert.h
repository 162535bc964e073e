// Arrays of numbers of one type into another, many in one launch: parameters into accumulation type, gradients back. Needs neither CUDA's
// headers nor torch's.
#pragma once
#include "status.h"

namespace vcr::cuda {

enum class Number { float32, float64, bfloat16, float16 };
struct Conversion {
  const void* from;
  void* to;
  int64_t count;
  Number from_type, to_type;
};
constexpr int conversions_at_once = 24;  // all parameters of an op

// count <= conversions_at_once; device memory of the current device.
Status convert(const Conversion* list, int count, void* stream);  // a cudaStream_t
// What CUDA calls an error of a Status.
const char* error_name(int error);
const char* error_text(int error);

}  // namespace vcr::cuda
