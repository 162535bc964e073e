// What the driver's memory needs to know of float16, which CPU kernels don't have.
#pragma once
#include "memory.h"

namespace vcr_test {

using vcr::f16;

template <>
inline f16 to_type<f16>(double x) {
  const _Float16 value = _Float16(x);
  f16 out;
  std::memcpy(&out.bits, &value, 2);
  return out;
}
template <>
inline double to_double<f16>(f16 x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, 2);
  return double(value);
}

}  // namespace vcr_test
