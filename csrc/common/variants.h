// The legal choices of each variant, by the names that cross the op boundary. vcr_ops/variants.py holds the same names.
#pragma once
#include <cstring>

namespace vcr {

enum class Sampler { dynamic_query, static_query, pool };
enum class Edges { dynamic_edges, static_edges, none };
enum class Modulation { channel, pixel };
enum class Affine { both, scale, shift };
// Where the first batch norm's statistics come from: this batch, the caller, or there is no batch norm at all.
enum class Norm { batch, given, none };

inline constexpr const char* sampler_names[] = {"dynamic", "static", "pool"};
inline constexpr const char* edges_names[] = {"dynamic", "static", "none"};
inline constexpr const char* modulation_names[] = {"channel", "pixel"};
inline constexpr const char* affine_names[] = {"both", "scale", "shift"};
inline constexpr const char* norm_names[] = {"batch", "given", "none"};

// The index of `name` in `names`, or -1.
template <int count>
int index_of(const char* const (&names)[count], const char* name) {
  for (int i = 0; i < count; ++i)
    if (std::strcmp(names[i], name) == 0) return i;
  return -1;
}

}  // namespace vcr
