// How a warp's tile of keys and values lies in shared memory and in the registers of products.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../device/mma.cuh"
#include "../device/warp.cuh"
#include "plan.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

/// \tparam HeadDim  32, 64, 128 or 256: head_dim or the next above it; the rest is zeros
template <storage T, int HeadDim>
struct tensor_layout {
  using factor = multiplied<T>;
  static_assert(tensor_storage<factor>);
  static constexpr bool narrow = sizeof(T) == 1;  ///< two steps of the products a load, converted in registers
  static constexpr float log2_e = 1.4426950408889634f;
  static constexpr int steps = HeadDim / 16;
  static constexpr int steps_a_load = narrow ? 2 : 1;
  static constexpr int chunk_elements = 16 / sizeof(T);  ///< of 16 bytes
  static constexpr int chunks = HeadDim / chunk_elements;
  static constexpr std::uint32_t row_bytes = HeadDim * sizeof(T);
  static constexpr std::uint32_t values_at = attend_tile * row_bytes;
  static constexpr std::uint32_t stage_bytes = 2 * values_at;

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  /// The row of register e of column n; registers 2 and 3 are eight positions (or eight of head_dim) further on.
  __device__ static int row_of(int n, int e) { return n * 8 + lane() % 4 * 2 + e % 2; }
  /// Of a product's 16 elements of head_dim, the one in register e of the sums.
  __device__ static int element_of(int e) { return narrow ? lane() / 4 * 2 + e / 2 : lane() / 4 + e / 2 * 8; }
  /// What the place of a row's chunks is turned by, so that eight rows' same chunk are in different banks.
  __device__ static constexpr std::uint32_t turn(int row) {
    constexpr int rows_a_line = chunks < 8 ? 8 / chunks : 1;
    return static_cast<std::uint32_t>(row / rows_a_line % (chunks < 8 ? chunks : 8)) * 16;
  }
  /// Where a chunk of a row lies in a tile. A stage begins at a multiple of row_bytes: a chunk 2n further on is at
  /// the address ^ 32n.
  __device__ static std::uint32_t place(int row, int chunk) {
    return static_cast<std::uint32_t>(row) * row_bytes + (static_cast<std::uint32_t>(chunk) * 16 ^ turn(row));
  }
  template <class Op>
  __device__ static float over_positions(float x, Op op) {
    return over_lanes<4, 32>(x, op);
  }

  /// Keys of the tile as factors, 16 elements of head_dim a step. Of 8-bit ones a lane has four adjacent elements, which
  /// stand where 16-bit ones would have two and the two that are eight further on: queries are laid out the same way.
  __device__ __forceinline__ static void load_keys(std::uint32_t (&k)[steps_a_load][4], std::uint32_t from) {
    if constexpr (narrow) {
      std::uint32_t quads[4];
      load_matrices(quads, from);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const fp16_quad upper = widened(quads[2 * i]), lower = widened(quads[2 * i + 1]);
        k[i][0] = upper.first, k[i][1] = lower.first, k[i][2] = upper.second, k[i][3] = lower.second;
      }
    } else {
      load_matrices(k[0], from);
    }
  }
  /// The same of values. Of 8-bit ones a lane has two adjacent elements of two positions: element_of() their order.
  __device__ __forceinline__ static void load_values(std::uint32_t (&v)[steps_a_load][4], std::uint32_t from) {
    if constexpr (narrow) {
      std::uint32_t quads[4];
      load_transposed(quads, from);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const fp16_quad left = widened(by_element(quads[i])), right = widened(by_element(quads[2 + i]));
        v[i][0] = left.first, v[i][1] = left.second, v[i][2] = right.first, v[i][3] = right.second;
      }
    } else {
      load_transposed(v[0], from);
    }
  }
  /// Two positions' two elements as two elements' two positions.
  __device__ __forceinline__ static std::uint32_t by_element(std::uint32_t quad) {
    return __byte_perm(quad, 0, 0x3120);
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail
