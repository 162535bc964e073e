#pragma once
#include <string>

namespace vcr_test {

// Checks csrc/cpu/simd.h at the level it is compiled for; prints failures and returns how many there are.
int simd_failures();
// "8 lanes of float"
std::string simd_width();

}  // namespace vcr_test
