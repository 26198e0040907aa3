// A warp's loop over the positions of a block, on tensor cores.
//
// A warp streams tiles of 16 positions through its own ring of shared memory: keys and values gathered by
// asynchronous 16-byte copies, no barrier wider than the warp. Positions are the 16-high side of both products
// (scores^T = K q^T, out^T = V^T weights^T) and query rows the 8-wide one: 24 rows are three columns of products,
// and a score's registers, transposed in place, are the second product's operand. Queries and weights are sums of
// two 16-bit elements each, so that only the cache's own rounding shows. 8-bit storage lies in the ring as it is and is
// converted to fp16 in registers, exactly; a key's scale meets the scores, a value's the finished sums.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../device/copy.cuh"
#include "../device/mma.cuh"
#include "../device/overlap.cuh"
#include "gather.cuh"
#include "plan.cuh"
#include "tensor_layout.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// \tparam HeadDim  32, 64, 128 or 256: head_dim or the next above it; the rest is zeros
/// \tparam Columns  query rows in units of 8
template <storage T, int HeadDim, int Columns>
class tensor_tile : tensor_layout<T, HeadDim> {
 public:
  static constexpr int rows = 8 * Columns;
  static constexpr int warps = HeadDim > 128 ? 4 : 8;
  static constexpr int threads = 32 * warps;
  static constexpr int most_stages = sizeof(T) == 1  ? (HeadDim > 128 ? 4 : 6)
                                     : HeadDim > 128 ? 2
                                     : HeadDim > 64  ? 3
                                                     : 4;
  static constexpr int pitch = HeadDim + 4;  ///< of the sums in shared memory: their stores meet no bank twice

  static std::size_t shared_bytes(int stages, int) { return query_bytes + warps * region_bytes(stages); }

  __device__ tensor_tile(const attend_launch<T>& launch, std::byte* memory, attend_row_facts& rows_of)
      : launch_(launch), facts_(rows_of), queries_(reinterpret_cast<uint4*>(memory)) {
    region_ = memory + query_bytes + warp() * region_bytes(launch.stages);
    stages_ = shared_address(region_);
  }

  /// This warp's tiles of virtual positions [begin, end): every warps-th from its own on. All threads call; the
  /// queries are loaded while the first tiles are on their way. Of the kernel before, queries and the slots' own rows are
  /// waited for here.
  __device__ void run(const device_block& b, const attend_parts& parts, std::int32_t begin, std::int32_t end) {
    const attend_gather<T> gather(launch_.args, b);
    const std::int32_t stride = warps * attend_tile;
    std::int32_t ahead = begin + warp() * attend_tile;  // the tile whose copies start next
    const std::int32_t tiles = ahead < end ? (end - ahead + stride - 1) / stride : 0;
    const auto position = [&](std::int32_t tile) {
      return tile < end ? gather.position(tile + lane() % attend_tile) : -1;
    };
    std::int32_t early[most_stages];  // positions that are needed before the loop, under way together
#pragma unroll
    for (int i = 0; i < most_stages; ++i) early[i] = position(ahead + i * stride);
    if constexpr (scaled_storage<T>) key_scale_ = launch_.args.kv.key_scale(b.kv_head);
    policy_ = copy_policy(launch_.rows.blocks(b.slots) > 1);
    std::uint32_t to = 0, at = 0;
    const auto fetch = [&](std::ptrdiff_t offset) {
      if (ahead < end) start_copies(stages_ + to * stage_bytes, offset);
      commit_copies();
      to = to + 1 < static_cast<std::uint32_t>(launch_.stages) ? to + 1 : 0;
      ahead += stride;
    };
#pragma unroll
    for (int i = 0; i < most_stages - 1; ++i) {
      if (i + 1 >= launch_.stages) continue;
      if (ahead + attend_tile > b.kept) wait_for_previous_kernel();  // the slots' own rows
      fetch(gather.offset(early[i]));
    }
    wait_for_previous_kernel();
    float queries[pairs][2];
    load_queries(b, queries);
    std::int32_t next = early[most_stages - 1];
    if (launch_.stages < most_stages) next = position(ahead);
    facts_.fill(launch_, b, parts);
    store_queries(queries);
    __syncthreads();
    clear();
    const std::int32_t all = b.kept + launch_.slot_of(b, 0) + 1;  // every row attends to those before
    std::int32_t tile = begin + warp() * attend_tile;
    std::uint32_t readers = readers_of(b, tile, end);
    for (std::int32_t i = 0; i < tiles; ++i, tile += stride) {
      const std::uint32_t now = readers;
      readers = readers_of(b, tile + stride, end);
      await_stage();
      __syncwarp();
      const std::ptrdiff_t offset = gather.offset(next);
      next = position(ahead + stride);
      fetch(offset);
      consume(stages_ + at * stage_bytes, tile, all, b, now);
      at = at + 1 < static_cast<std::uint32_t>(launch_.stages) ? at + 1 : 0;
    }
    await_copies<0>();
    __syncwarp();
  }

  /// Stores this warp's sums and states in its memory, for sums_of() and states_of() after a barrier.
  __device__ void leave() {
    float* sums = reinterpret_cast<float*>(region_);
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row_of(n, e);
#pragma unroll
        for (int d = 0; d < steps; ++d) sums[row * pitch + d * 16 + element_of(e)] = sums_[d][n][e];
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float total = over_positions(total_[n][e], [](float a, float b) { return a + b; });
        if (lane() < 4) states_of(warp())[row_of(n, e)] = {max_[n][e], total};
      }
    }
  }
  static constexpr int width = 4;  ///< adjacent sums that are merged together
  __device__ static constexpr int padded_dim() { return HeadDim; }
  __device__ const float* sums_of(int of_warp, int row) const {
    return reinterpret_cast<const float*>(region_ + (of_warp - warp()) * region_bytes(launch_.stages)) + row * pitch;
  }
  __device__ attention_state* states_of(int of_warp) const {
    return reinterpret_cast<attention_state*>(region_ + (of_warp - warp()) * region_bytes(launch_.stages) +
                                              rows * pitch * sizeof(float));
  }

 private:
  using layout = tensor_layout<T, HeadDim>;
  using layout::chunk_elements, layout::chunks, layout::log2_e, layout::narrow, layout::stage_bytes, layout::steps,
      layout::steps_a_load, layout::values_at, layout::row_bytes;
  using layout::element_of, layout::lane, layout::load_keys, layout::load_values, layout::over_positions,
      layout::place, layout::row_of, layout::turn, layout::warp;
  using typename layout::factor;

  static constexpr std::size_t query_bytes = Columns * steps * 32 * sizeof(uint4);

  SPECATTN_HD static constexpr std::size_t region_bytes(int stages) {
    const std::size_t ring = static_cast<std::size_t>(stages) * stage_bytes;
    const std::size_t sums = rows * (pitch * sizeof(float) + sizeof(attention_state));
    return ((ring > sums ? ring : sums) + 511) / 512 * 512;
  }
  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int d = 0; d < steps; ++d) sums_[d][n][e] = 0.0f;
        max_[n][e % 2] = no_score;
        total_[n][e % 2] = 0.0f;
      }
    }
  }

  static constexpr int pairs_a_row = HeadDim / 2;
  static constexpr int pairs = (rows * pairs_a_row + threads - 1) / threads;  ///< of the queries, for each thread
  __device__ __forceinline__ void load_queries(const device_block& b, float (&x)[pairs][2]) const {
    const auto& q = launch_.args.q;
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      const int i = p * threads + static_cast<int>(threadIdx.x), row = i / pairs_a_row, d = i % pairs_a_row * 2;
      const bool used = row < b.rows;
      const float* from = &q(b.sequence_slot + launch_.slot_of(b, row), launch_.head_of(b, row), d);
      x[p][0] = used && d < q.extent(2) ? from[0] : 0.0f;
      x[p][1] = used && d + 1 < q.extent(2) ? from[q.stride(2)] : 0.0f;
    }
  }
  /// The queries as operands of the score product: for each column of rows and 16 of head_dim a lane's four words,
  /// the high parts and what rounding them left.
  __device__ __forceinline__ void store_queries(const float (&x)[pairs][2]) {
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      const int i = p * threads + static_cast<int>(threadIdx.x), row = i / pairs_a_row, d = i % pairs_a_row * 2;
      if (row >= rows) break;
      const split_pair pair = split<factor>(x[p][0] * launch_.scale, x[p][1] * launch_.scale);
      const int quarter = narrow ? d % 16 / 4 : d % 8 / 2, half = narrow ? d / 2 % 2 : d / 8 % 2;
      auto* words =
          reinterpret_cast<std::uint32_t*>(queries_ + ((row / 8) * steps + d / 16) * 32 + row % 8 * 4 + quarter);
      words[half] = pair.high;
      words[2 + half] = pair.low;
    }
  }

  /// Copies a tile's keys and values; lane l holds the offset of position l % 16.
  __device__ __forceinline__ void start_copies(std::uint32_t stage, std::ptrdiff_t offset) {
    constexpr int rows_at_once = 32 / chunks;
    const int row = lane() / chunks, chunk = lane() % chunks;
    const bool inside = chunk < launch_.args.kv.head_dim / chunk_elements;
    const std::uint32_t to = stage + place(row, chunk);
    const T* keys = launch_.args.kv.keys + chunk * chunk_elements;
    const T* values = launch_.args.kv.values + chunk * chunk_elements;
#pragma unroll
    for (int i = 0; i < attend_tile / rows_at_once; ++i) {
      const std::ptrdiff_t from = __shfl_sync(~0u, offset, i * rows_at_once + row);
      const bool wanted = inside && from >= 0;
      const int bytes = wanted ? 16 : 0;
      const std::ptrdiff_t element = wanted ? from : 0;
      const std::uint32_t there =
          (to ^ turn(i * rows_at_once)) + static_cast<std::uint32_t>(i * rows_at_once) * row_bytes;
      copy_16_bytes(there, keys + element, bytes, policy_);
      copy_16_bytes(there + values_at, values + element, bytes, policy_);
    }
  }
  __device__ void await_stage() const {
    if (launch_.stages == 2) return await_copies<0>();
    if (launch_.stages == 3) return await_copies<1>();
    if (most_stages <= 4 || launch_.stages == 4) return await_copies<2>();
    if (launch_.stages == 5) return await_copies<3>();
    await_copies<4>();
  }

  /// The slots that attend to position lane % 16 of a tile, a bit each.
  __device__ std::uint32_t readers_of(const device_block& b, std::int32_t tile, std::int32_t end) const {
    return b.masked != 0 && tile < end ? launch_.slots_at(b, tile + lane() % attend_tile) : ~0u;
  }

  __device__ __forceinline__ void consume(std::uint32_t stage, std::int32_t first, std::int32_t all,
                                          const device_block& b, std::uint32_t readers) {
    float scores[Columns][4];
    score(stage, scores);
    if (b.masked != 0) mask_slots(readers, b, scores);
    if (first + attend_tile > all) mask(first, scores);
    if (launch_.records()) record(first, scores);
    soften(scores);
    add(stage + values_at, scores);
  }

  __device__ __forceinline__ void score(std::uint32_t keys, float (&scores)[Columns][4]) const {
    float low[Columns][4] = {};
#pragma unroll
    for (int n = 0; n < Columns; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[n][e] = 0.0f;
    keys += place(lane() % 16, lane() / 16);
#pragma unroll
    for (int load = 0; load < steps / steps_a_load; ++load) {
      std::uint32_t k[steps_a_load][4];
      load_keys(k, keys ^ static_cast<std::uint32_t>(load * 32));
#pragma unroll
      for (int i = 0; i < steps_a_load; ++i) {
#pragma unroll
        for (int n = 0; n < Columns; ++n) {
          const uint4 q = queries_[(n * steps + load * steps_a_load + i) * 32 + lane()];
          multiply_add<factor>(scores[n], k[i], q.x, q.y);
          multiply_add<factor>(low[n], k[i], q.z, q.w);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[n][e] += low[n][e];
        if constexpr (scaled_storage<T>) scores[n][e] *= key_scale_;
      }
    }
  }

  __device__ __forceinline__ void mask(std::int32_t first, float (&scores)[Columns][4]) const {
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (first + lane() / 4 + e / 2 * 8 >= facts_.limits[row_of(n, e)]) scores[n][e] = no_score;
      }
    }
  }

  __device__ __forceinline__ void mask_slots(std::uint32_t readers, const device_block& b,
                                             float (&scores)[Columns][4]) const {
    const std::uint32_t slots[2] = {__shfl_sync(~0u, readers, lane() / 4), __shfl_sync(~0u, readers, lane() / 4 + 8)};
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!slot_reads(slots[e / 2], launch_.slot_of(b, row_of(n, e)))) scores[n][e] = no_score;
      }
    }
  }

  /// Leaves scores where the weights will be.
  __device__ __forceinline__ void record(std::int32_t first, const float (&scores)[Columns][4]) const {
    const std::ptrdiff_t stride = launch_.args.recording.weights.stride(2);
    const std::int32_t at = first + lane() / 4;
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
      if ((facts_.recorded >> (8 * n) & 0xffu) == 0) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto row = facts_.records[row_of(n, e)];
        if (at < row.limit) store_for_soon(row.to + at * stride, scores[n][e]);
        if (at + 8 < row.limit) store_for_soon(row.to + (at + 8) * stride, scores[n][e + 2]);
      }
    }
  }

  /// Turns scores into weights relative to the rows' maxima so far; what was summed before is scaled to them.
  __device__ __forceinline__ void soften(float (&scores)[Columns][4]) {
    float top[Columns][2];
    bool higher = false;
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float found = over_positions(fmaxf(scores[n][e], scores[n][e + 2]), fmaxf);
        top[n][e] = fmaxf(max_[n][e], found);
        higher = higher || top[n][e] > max_[n][e];
      }
    }
    if (__any_sync(~0u, higher)) raise(top);
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float base = top[n][e % 2] == no_score ? 0.0f : top[n][e % 2];
        scores[n][e] = power_of_two((scores[n][e] - base) * log2_e);
        total_[n][e % 2] += scores[n][e];
      }
    }
  }
  __device__ __forceinline__ void raise(const float (&top)[Columns][2]) {
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float scale = max_[n][e] == top[n][e] ? 1.0f : power_of_two((max_[n][e] - top[n][e]) * log2_e);
        max_[n][e] = top[n][e];
        total_[n][e] *= scale;
#pragma unroll
        for (int d = 0; d < steps; ++d) {
          sums_[d][n][e] *= scale;
          sums_[d][n][e + 2] *= scale;
        }
      }
    }
  }

  __device__ __forceinline__ void add(std::uint32_t values, const float (&weights)[Columns][4]) {
    std::uint32_t high[Columns][2], low[Columns][2];
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const split_pair pair = split<factor>(weights[n][2 * half], weights[n][2 * half + 1]);
        high[n][half] = transposed(pair.high);
        low[n][half] = transposed(pair.low);
      }
    }
    values += place(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
#pragma unroll
    for (int load = 0; load < steps / steps_a_load; ++load) {
      std::uint32_t v[steps_a_load][4];
      load_values(v, values ^ static_cast<std::uint32_t>(load * 32));
#pragma unroll
      for (int i = 0; i < steps_a_load; ++i) {
        auto& sums = sums_[load * steps_a_load + i];
#pragma unroll
        for (int n = 0; n < Columns; ++n) multiply_add<factor>(sums[n], v[i], high[n][0], high[n][1]);
#pragma unroll
        for (int n = 0; n < Columns; ++n) multiply_add<factor>(sums[n], v[i], low[n][0], low[n][1]);
      }
    }
  }

  const attend_launch<T>& launch_;
  attend_row_facts& facts_;
  uint4* queries_;
  std::byte* region_;              ///< this warp's: the ring, then its sums and states
  std::uint32_t stages_;           ///< the ring's address
  float sums_[steps][Columns][4];  ///< of weight * value
  float max_[Columns][2];
  float total_[Columns][2];  ///< of this lane's weights
  float key_scale_ = 1.0f;   ///< of the block's head, where storage has scales
  std::uint64_t policy_ = 0;
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
