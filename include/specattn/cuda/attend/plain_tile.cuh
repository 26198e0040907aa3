// A warp's loop over the positions of a block without tensor cores: any storage, any head_dim, any alignment.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../device/overlap.cuh"
#include "../device/warp.cuh"
#include "gather.cuh"
#include "plan.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// A tile is a position for each lane, which scores it for every row; then lanes are elements of the values.
template <storage T>
class plain_tile {
 public:
  static constexpr int rows = 8;
  static constexpr int warps = 8;
  static constexpr int threads = 32 * warps;
  static constexpr int most_stages = 1;

  static std::size_t shared_bytes(int, int head_dim) {
    return (query_floats(head_dim) + warps * region_floats(head_dim)) * sizeof(float);
  }

  __device__ plain_tile(const attend_launch<T>& launch, std::byte* memory, attend_row_facts& rows_of)
      : launch_(launch), facts_(rows_of), head_dim_(launch.args.kv.head_dim) {
    queries_ = reinterpret_cast<float*>(memory);
    region_ = queries_ + query_floats(head_dim_) + warp() * region_floats(head_dim_);
    weights_ = region_ + rows * (head_dim_ + 2);
  }

  __device__ void run(const device_block& b, const attend_parts& parts, std::int32_t begin, std::int32_t end) {
    for (int i = lane(); i < rows * head_dim_; i += 32) region_[i] = 0.0f;
    for (int i = lane(); i < rows; i += 32) states_of(warp())[i] = attention_state{};
    const attend_gather<T> gather(launch_.args, b);
    wait_for_previous_kernel();
    load_queries(b);
    facts_.fill(launch_, b, parts);
    __syncthreads();
    for (std::int32_t first = begin + warp() * 32; first < end; first += warps * 32) {
      const std::int32_t at = first + lane();
      const std::ptrdiff_t offset = at < end ? gather.offset(gather.position(at)) : -1;
      const std::uint32_t slots = b.masked != 0 && at < end ? launch_.slots_at(b, at) : ~0u;
      __syncwarp();
      for (int row = 0; row < b.rows; ++row) {
        const bool listed = at < end && at < facts_.limits[row];
        const bool attended = listed && (b.masked == 0 || slot_reads(slots, launch_.slot_of(b, row)));
        const float score = attended ? dot(row, offset) : no_score;
        if (listed && launch_.records() && at < facts_.records[row].limit)
          facts_.records[row].to[at * launch_.args.recording.weights.stride(2)] = score;
        soften(row, score);
      }
      __syncwarp();
      const std::int32_t positions = end - first < 32 ? end - first : 32;
      for (int d = lane(); d - lane() < head_dim_; d += 32) add(b, first, positions, offset, d, slots);
    }
    __syncwarp();
  }
  __device__ void leave() {}  // sums and states are where they belong

  static constexpr int width = 1;  ///< adjacent sums that are merged together
  __device__ int padded_dim() const { return head_dim_; }
  __device__ const float* sums_of(int of_warp, int row) const {
    return region_ + (of_warp - warp()) * region_floats(head_dim_) + row * head_dim_;
  }
  __device__ attention_state* states_of(int of_warp) const {
    return reinterpret_cast<attention_state*>(region_ + (of_warp - warp()) * region_floats(head_dim_) +
                                              rows * head_dim_);
  }

 private:
  SPECATTN_HD static std::ptrdiff_t query_floats(int head_dim) { return rows * std::ptrdiff_t{head_dim}; }
  /// Sums, states and the tile's weights of a warp.
  SPECATTN_HD static std::ptrdiff_t region_floats(int head_dim) { return rows * (std::ptrdiff_t{head_dim} + 2 + 32); }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }

  __device__ void load_queries(const device_block& b) {
    const float scale = launch_.scale * launch_.args.kv.key_scale(b.kv_head);
    for (int i = static_cast<int>(threadIdx.x); i < b.rows * head_dim_; i += threads) {
      const int row = i / head_dim_, d = i % head_dim_;
      queries_[i] = launch_.args.q(b.sequence_slot + launch_.slot_of(b, row), launch_.head_of(b, row), d) * scale;
    }
  }

  __device__ float dot(int row, std::ptrdiff_t offset) const {
    const float* q = queries_ + row * head_dim_;
    const T* key = launch_.args.kv.keys + offset;
    float sum = 0.0f;
    for (int d = 0; d < head_dim_; ++d) sum = std::fma(q[d], to_float(key[d]), sum);
    return sum;
  }

  /// Leaves the lanes' weights relative to the row's maximum so far; what was summed before is scaled to it.
  __device__ void soften(int row, float score) {
    attention_state& state = states_of(warp())[row];
    const float top = over_warp(fmaxf(state.max, score), float_max{});
    const float base = top == no_score ? 0.0f : top;
    const float weight = std::exp(score - base);
    const float total = sum_over_warp(weight);
    weights_[row * 32 + lane()] = weight;
    const float scale = state.max == top ? 1.0f : std::exp(state.max - top);
    if (scale != 1.0f) {
      for (int d = lane(); d < head_dim_; d += 32) region_[row * head_dim_ + d] *= scale;
    }
    __syncwarp();
    if (lane() == 0) state = {top, std::fma(state.sum, scale, total)};
    __syncwarp();
  }

  /// Adds the tile's weighted values to element d of every row. A row never touches a value that it does not attend
  /// to, not even with weight zero (0 * inf).
  __device__ void add(const device_block& b, std::int32_t first, std::int32_t positions, std::ptrdiff_t offset, int d,
                      std::uint32_t slots) {
    float sums[rows];
    const bool inside = d < head_dim_;
    for (int row = 0; row < rows; ++row) sums[row] = inside && row < b.rows ? region_[row * head_dim_ + d] : 0.0f;
    for (std::int32_t p = 0; p < positions; ++p) {
      const std::ptrdiff_t from = __shfl_sync(~0u, offset, p);
      const float value = inside ? to_float(launch_.args.kv.values[from + d]) : 0.0f;
      const std::uint32_t readers = b.masked != 0 ? __shfl_sync(~0u, slots, p) : ~0u;
      for (int row = 0; row < b.rows; ++row)
        if (first + p < facts_.limits[row] && (b.masked == 0 || slot_reads(readers, launch_.slot_of(b, row))))
          sums[row] = std::fma(weights_[row * 32 + p], value, sums[row]);
    }
    for (int row = 0; inside && row < b.rows; ++row) region_[row * head_dim_ + d] = sums[row];
  }

  const attend_launch<T>& launch_;
  attend_row_facts& facts_;
  int head_dim_;
  float* queries_;  ///< [rows, head_dim]
  float* region_;   ///< this warp's [rows, head_dim] sums, [rows] states, [rows, 32] weights
  float* weights_;
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
