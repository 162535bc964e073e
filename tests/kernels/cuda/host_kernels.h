// The ops' launch sequences on the host, as the table that calls.h takes.
#pragma once
#include "cpu/table.h"
#include "host_runner.h"

namespace vcr_test {

// The machine that the next calls run on.
inline HostRunner& host_runner() {
  static HostRunner runner;
  return runner;
}
template <class T>
const vcr::Kernels<T>& host_kernels();

}  // namespace vcr_test
