// Instruction-set levels: which were built, which this machine runs, which one is in use.
#pragma once
#include <string>
#include <vector>

#include "table.h"

namespace vcr {

// Lowest first. The highest is used unless the environment variable VCR_OPS_ISA names a lower one.
std::vector<std::string> built_levels();
std::vector<std::string> available_levels();
// Throws std::runtime_error where VCR_OPS_ISA names a level that is unknown or not available here.
const std::string& active_level();

template <class T>
const Kernels<T>& kernels();

}  // namespace vcr
