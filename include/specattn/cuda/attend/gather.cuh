// Where the rows of a block's virtual positions lie, and what the warps that work on a block share.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#include "../../attention_state.hpp"
#include "plan.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr float no_score = -std::numeric_limits<float>::infinity();  ///< of a position not attended to

/// Virtual positions of one block to elements of the cache, in two steps of one dependent load each, so that a loop
/// can have each under way ahead of its use.
template <storage T>
class attend_gather {
 public:
  attend_gather() = default;
  __device__ attend_gather(const attend_args<T, cuda>& args, const device_block& b)
      : kv_(&args.kv),
        cache_row_(b.cache_row),
        head_(b.kv_head),
        kept_(b.kept),
        end_(b.attended),
        tail_(b.kv_len - b.kept) {
    if (kept_ < b.kv_len && kept_ > 0) {
      list_ = &args.kept.positions(b.sequence * args.kept_sequence_stride + b.kv_head, 0);
      list_stride_ = args.kept.positions.stride(1);
    }
    if (kv_->page_shift >= 31) base_ = kv_->offset(cache_row_, 0, head_);
  }

  /// The position at a virtual one; -1 after the block's last.
  __device__ std::int32_t position(std::int32_t at) const {
    if (at >= end_) return -1;
    if (at < kept_) return list_ != nullptr ? __ldcg(list_ + at * list_stride_) : at;
    return at + tail_;
  }
  /// The first element of a position's row; -1 for position -1.
  __device__ std::ptrdiff_t offset(std::int32_t position) const {
    if (position < 0) return -1;
    if (kv_->page_shift >= 31) return base_ + position * kv_->position_stride;
    return kv_->offset(cache_row_, position, head_);
  }

 private:
  const kv_view<T, cuda>* kv_ = nullptr;
  std::ptrdiff_t base_ = 0;
  const std::int32_t* list_ = nullptr;
  std::ptrdiff_t list_stride_ = 0;
  std::int32_t cache_row_ = 0;
  std::int32_t head_ = 0;
  std::int32_t kept_ = 0;
  std::int32_t end_ = 0;
  std::int32_t tail_ = 0;  ///< a virtual position after the prefix's is this much further on
};

/// Of the rows of the block at hand, in shared memory.
struct attend_row_facts {
  struct recorded_row {
    float* to;           ///< where its entries go
    std::int32_t limit;  ///< how many: 0 for a row that is not recorded
  };
  std::int32_t limits[attend_rows];  ///< virtual positions that a row attends to
  recorded_row records[attend_rows];
  std::uint32_t recorded;               ///< a bit for each row
  attention_state states[attend_rows];  ///< when the part is done
  float scales[attend_rows][8];         ///< of the warps' sums

  /// All threads of a CTA call, in front of a barrier; who has the first part of a block tells the merge of all.
  template <storage T>
  __device__ void fill(const attend_launch<T>& launch, const device_block& b, const attend_parts& parts) {
    const auto row = static_cast<int>(threadIdx.x);
    if (row >= attend_rows) return;
    const bool used = row < b.rows;
    if (used && parts.mine == 0) launch.tell_parts(b, row, parts);
    limits[row] = used ? b.kept + launch.slot_of(b, row) + 1 : 0;
    if (!launch.records()) return;
    const bool kept = used && launch.recorded(b, row);
    records[row] = kept ? recorded_row{launch.recording_of(b, row), launch.recorded_length(limits[row])}
                        : recorded_row{nullptr, 0};
    const std::uint32_t all = __ballot_sync(~0u, kept);
    if (row == 0) recorded = all;
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail
