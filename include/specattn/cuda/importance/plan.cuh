// The sizes of importance's product, and which of its kernels a device runs: numbers, which need no CUDA.
//
// Hopper has 227 KB of shared memory for a CTA, and its kernels are as fast as they are by using nearly all of it: four
// stages of the product, or three and the rows that are on their way to them. Devices of compute capability 12 know the
// same instructions but have 99 KB, as those of 8.6 and 8.9 do. There the product has two stages, and no kernel takes rows
// straight from the draft. So the sizes below are what a kernel asks for where there is room, and plan_importance() alone
// says what is asked for on a device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../config.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int importance_threads = 256;                                          // that multiply
inline constexpr int importance_slab = 256;                                             // groups of a CTA
inline constexpr int importance_tile = 128;                                             // positions of a CTA
inline constexpr int importance_chunk = 64;                                             // signals of a stage
inline constexpr int importance_depth = 16;                                             // signals of one instruction
inline constexpr int coefficient_block_bytes = importance_slab * importance_chunk * 2;  // bf16
inline constexpr int signal_block_bytes = importance_chunk * importance_tile * 2;
inline constexpr int importance_stage_bytes = coefficient_block_bytes + signal_block_bytes;  // in this order

inline constexpr int importance_stages = 4;                // where there is room for them
inline constexpr int importance_stages_before_hopper = 2;  // what every device has room for

/// Of Hopper: stages, and two barriers for each.
SPECATTN_HD constexpr int stage_ring_bytes(int stages) { return stages * (importance_stage_bytes + 16); }

inline constexpr int row_producers = 128;  // threads, after those that multiply
inline constexpr int row_stages = 3;
inline constexpr int row_ahead_bytes = 16384;  // that are on their way for each of the producers' warps

inline constexpr int row_shared_bytes = stage_ring_bytes(row_stages) + row_producers / 32 * row_ahead_bytes;

/// What runs on a device.
struct importance_plan {
  bool straight = false;  ///< one launch from the draft's rows; else two for each window
  int stages = importance_stages_before_hopper;
  int shared_bytes = 0;  ///< of a CTA of the kernel that multiplies
};

/// \param code_major          of the compute capability the code was compiled for
/// \param block_shared_bytes  shared memory that a CTA can have
/// \param slabs               of 256 groups
/// \param steps               that are averaged
constexpr importance_plan plan_importance(int code_major, int block_shared_bytes, std::int32_t slabs,
                                          std::ptrdiff_t steps) {
  if (code_major < 9)
    return {false, importance_stages_before_hopper, importance_stages_before_hopper * importance_stage_bytes};
  if (slabs == 1 && steps == 1 && row_shared_bytes <= block_shared_bytes) return {true, row_stages, row_shared_bytes};
  const bool room = stage_ring_bytes(importance_stages) <= block_shared_bytes;
  const int stages = room ? importance_stages : importance_stages_before_hopper;
  return {false, stages, stage_ring_bytes(stages)};
}

}  // namespace specattn::inline SPECATTN_CODE::detail
