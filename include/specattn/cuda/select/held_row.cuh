// A CTA's part of a row, held in registers: for what looks at a row several times before it knows how much it counts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../scalar.hpp"
#include "../../select_math.hpp"
#include "team.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

/// Every thread has four neighbours of every 1024 positions.
template <storage T>
class held_row {
 public:
  static constexpr std::int32_t most = 8192;  ///< positions of a CTA

  /// Reads `count` positions. `facts`: the largest key of the thread's, and whether a weight is not valid.
  __device__ __forceinline__ void load(const T* row, std::ptrdiff_t stride, std::int32_t count,
                                       std::uint32_t (&facts)[2]) {
    struct alignas(4 * sizeof(T)) four_weights {
      T x[4];
    };
    const bool vectors = stride == 1 && reinterpret_cast<std::uintptr_t>(row) % sizeof(four_weights) == 0;
    four_weights part[fours];
#pragma unroll
    for (int n = 0; n < fours; ++n) {
      const std::int32_t i = first_of(n);
      part[n] = {};
      if (vectors && i + 4 <= count) {
        part[n] = *reinterpret_cast<const four_weights*>(row + i);
      } else if (i < count) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (i + j < count) part[n].x[j] = row[(i + j) * stride];
        }
      }
    }
    facts[0] = facts[1] = 0;
#pragma unroll
    for (int n = 0; n < fours; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const std::uint32_t bits = __float_as_uint(to_float(part[n].x[j]));
        keys_[n][j] = weight_key(bits);
        facts[1] |= weight_fault(bits);
        facts[0] = facts[0] > keys_[n][j] ? facts[0] : keys_[n][j];
      }
    }
  }
  __device__ __forceinline__ void lift() {
#pragma unroll
    for (int n = 0; n < fours; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) keys_[n][j] = lift_key(keys_[n][j]);
    }
  }
  /// visit(i, key): past the row's end too, with keys of 0, to a multiple of four.
  template <class Visit>
  __device__ __forceinline__ void for_each(std::int32_t count, Visit visit) const {
#pragma unroll
    for (int n = 0; n < fours; ++n) {
      if (first_of(n) >= count) return;
#pragma unroll
      for (int j = 0; j < 4; ++j) visit(first_of(n) + j, keys_[n][j]);
    }
  }

 private:
  static constexpr int fours = most / (4 * select_threads);
  __device__ static std::int32_t first_of(int n) { return (n * select_threads + select_team::thread()) * 4; }
  std::uint32_t keys_[fours][4];
};

}  // namespace specattn::inline SPECATTN_CODE::detail
