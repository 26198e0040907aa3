// The rotary embedding in double precision, by its definition.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

namespace oracle {

/// One head at a position of the text: elements d and d + size / 2 are a point of the plane, turned by
/// position * inverse_frequencies[d] radians.
inline std::vector<double> rotated(const std::vector<double>& head, long position,
                                   const std::vector<double>& inverse_frequencies) {
  std::vector<double> turned(head.size());
  const std::size_t half = head.size() / 2;
  for (std::size_t d = 0; d < half; ++d) {
    const double angle = static_cast<double>(position) * inverse_frequencies[d];
    turned[d] = head[d] * std::cos(angle) - head[d + half] * std::sin(angle);
    turned[d + half] = head[d] * std::sin(angle) + head[d + half] * std::cos(angle);
  }
  return turned;
}

}  // namespace oracle
