// What one CTA of recompute_steps() does: a chunk of positions of one layer, sequence and kv head, 32 of them a warp at a
// time, for all steps' queries on tensor cores; and the same plainly, for what tensor cores do not take.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "../../recompute.hpp"
#include "../device/copy.cuh"
#include "../device/mma.cuh"
#include "../device/warp.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int record_chunk = 2048;  ///< positions of a CTA
inline constexpr int record_plain_threads = 256;
inline constexpr float most_recorded = 65504.0f;  ///< of a stored number: the largest fp16
inline constexpr float asked_nothing =
    std::numeric_limits<float>::infinity();  ///< a log-sum-exp that makes no weights

template <storage T>
struct recompute_steps_launch {
  recompute_steps_args<T, cuda> args;
  float* parts = nullptr;   ///< [rows of args.masses, chunks] what a chunk adds to a mass
  std::int32_t chunks = 0;  ///< of a row's capacity
  bool wide = false;        ///< rows begin at whole 16 bytes

  SPECATTN_HD std::int32_t steps() const { return static_cast<std::int32_t>(args.q.extent(0)); }
  SPECATTN_HD std::int32_t group() const { return static_cast<std::int32_t>(args.q.extent(3)) / args.kv.kv_heads; }
  /// Columns of eight query rows: four heads × two steps, steps fastest.
  SPECATTN_HD std::int32_t step_pairs() const { return (steps() + 1) / 2; }
  SPECATTN_HD std::int32_t columns() const { return (group() + 3) / 4 * step_pairs(); }
  SPECATTN_HD bool mean() const { return args.weights.extent(0) == 1; }

  __device__ std::int32_t length(std::int32_t s) const {
    const std::int32_t length = args.kv_lens[s];
    const auto most = static_cast<std::int32_t>(args.weights.extent(4));
    return length < most ? length : most;
  }
};

/// Where a CTA works.
template <storage T>
struct record_place {
  const recompute_steps_launch<T>& launch;
  std::int32_t layer, sequence, kv_head, cache_row, begin, end;  // positions

  __device__ explicit record_place(const recompute_steps_launch<T>& l) : launch(l) {
    const auto list = static_cast<std::int32_t>(blockIdx.x);
    const auto sequences = static_cast<std::int32_t>(l.args.kv_lens.extent(0));
    kv_head = list % l.args.kv.kv_heads;
    sequence = list / l.args.kv.kv_heads % sequences;
    layer = list / l.args.kv.kv_heads / sequences;
    begin = static_cast<std::int32_t>(blockIdx.y) * record_chunk;
    end = l.length(sequence);
    if (begin + record_chunk < end) end = begin + record_chunk;
    cache_row = begin >= end || l.args.cache_rows.empty() ? sequence : l.args.cache_rows[sequence];
  }
  __device__ const T* key(std::int32_t position) const {
    return launch.args.kv.key(cache_row, position, kv_head) + layer * launch.args.layer_stride;
  }
  __device__ std::int32_t head(std::int32_t of_group) const { return kv_head * launch.group() + of_group; }
  /// Who asks in a step; negative: nobody.
  __device__ std::int32_t slot(std::int32_t step) const { return launch.args.slot_of(step, sequence); }
  __device__ const float* query(std::int32_t step, std::int32_t of_group) const {
    return &launch.args.q(step, layer, slot(step), head(of_group), 0);
  }
  __device__ float lse(std::int32_t step, std::int32_t of_group) const {
    return launch.args.lse(step, layer, slot(step), head(of_group));
  }
  /// What the exponential of a score is multiplied with.
  __device__ float share() const {
    return launch.mean() ? 1.0f / (recorded_unit<cuda> * static_cast<float>(launch.steps()))
                         : 1.0f / recorded_unit<cuda>;
  }
  __device__ fp16* weights(std::int32_t row, std::int32_t of_group, std::int32_t position) const {
    return &launch.args.weights(row, layer, sequence, head(of_group), position);
  }
  /// This chunk's place among a row's parts.
  __device__ float& part(std::int32_t row, std::int32_t of_group) const {
    const auto& m = launch.args.masses;
    const std::ptrdiff_t at = ((row * m.extent(1) + layer) * m.extent(2) + sequence) * m.extent(3) + head(of_group);
    return launch.parts[at * launch.chunks + blockIdx.y];
  }
};

/// The tile of a warp: 32 keys in a ring of stages that it alone fills and reads, the queries of all steps, as the
/// products take them, in front of all rings.
template <tensor_storage T, int Dim>
class record_tile {
 public:
  static constexpr int warps = Dim <= 64 ? 8 : 4;
  static constexpr int threads = 32 * warps;
  static constexpr int keys = 32;
  static constexpr int stages = 3;
  static constexpr int depths = Dim / 16;
  static constexpr int row_bytes = Dim * 2;
  static constexpr int stage_bytes = keys * row_bytes;

  static constexpr std::size_t column_bytes = depths * 32 * sizeof(uint4);
  /// For each warp the 32 weights of four heads on their way out, and its share of their masses.
  static constexpr std::size_t staging_bytes = 4 * keys * sizeof(fp16);
  static constexpr std::size_t shared_bytes(std::int32_t columns) {
    return static_cast<std::size_t>(columns) * (column_bytes + (warps + 1) * 8 * sizeof(float)) +
           warps * (stages * stage_bytes + staging_bytes);
  }

  __device__ record_tile(const record_place<T>& place, std::byte* memory)
      : place_(place),
        columns_(place.launch.columns()),
        queries_(reinterpret_cast<uint4*>(memory)),
        ring_(shared_address(memory + columns_ * column_bytes) + warp() * stages * stage_bytes),
        staging_(memory + columns_ * column_bytes + warps * stages * stage_bytes + warp() * staging_bytes),
        sums_(reinterpret_cast<float*>(memory + columns_ * column_bytes +
                                       warps * (stages * stage_bytes + staging_bytes))),
        bases_(sums_ + columns_ * warps * 8) {}

  __device__ __forceinline__ void run() {
    for (int i = 0; i < stages - 1; ++i) fetch(i);
    prepare_queries();
    for (int i = static_cast<int>(threadIdx.x); i < columns_ * warps * 8; i += threads) sums_[i] = 0.0f;
    __syncthreads();
    for (int i = 0; first(i) < place_.end; ++i) {
      await_copies<stages - 2>();
      __syncwarp();
      fetch(i + stages - 1);
      weigh(i);
    }
    await_copies<0>();
    __syncthreads();
    add_up();
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  /// The first position of the warp's i-th turn.
  __device__ std::int32_t first(int i) const { return place_.begin + (i * warps + warp()) * keys; }
  /// Where 16 bytes of a row lie: eight rows' same pieces in different banks.
  __device__ static std::uint32_t piece(int row, int at) {
    constexpr int pieces = row_bytes / 16, rows_a_line = pieces < 8 ? 8 / pieces : 1;
    return static_cast<std::uint32_t>(row * row_bytes + (at ^ row / rows_a_line % (8 / rows_a_line)) * 16);
  }

  /// Starts copying the keys of the i-th turn; those past the end are zeros.
  __device__ __forceinline__ void fetch(int i) {
    constexpr int pieces = row_bytes / 16, rows_at_once = 32 / pieces;
    if (first(i) < place_.end) {
      const std::int32_t mine = first(i) + lane();
      const bool exists = mine < place_.end;
      const std::ptrdiff_t offset = place_.key(exists ? mine : place_.begin) - place_.launch.args.kv.keys;
      const std::uint32_t stage = ring_ + static_cast<std::uint32_t>(i % stages * stage_bytes);
      const int at = lane() % pieces;
      const bool inside = at < place_.launch.args.kv.head_dim / 8;
#pragma unroll
      for (int j = 0; j < keys / rows_at_once; ++j) {
        const int row = j * rows_at_once + lane() / pieces;
        const std::ptrdiff_t from = __shfl_sync(~0u, offset, row);
        const bool wanted = inside && first(i) + row < place_.end;
        copy_16_bytes(stage + piece(row, at), place_.launch.args.kv.keys + from + (inside ? at * 8 : 0),
                      wanted ? 16 : 0);
      }
    }
    commit_copies();
  }

  /// Query n of a column's eight: head n / 2 of its four, step n % 2 of its two; times the scale, base two, as the sum of
  /// two elements.
  __device__ void prepare_queries() const {
    constexpr float log2_e = 1.4426950408889634f;
    const auto& launch = place_.launch;
    const float scale = launch.args.scale * log2_e;
    for (int i = static_cast<int>(threadIdx.x); i < columns_ * depths * 32; i += threads) {
      const int column = i / (depths * 32), n = i % 32 / 4;
      const int head = column / launch.step_pairs() * 4 + n / 2, step = column % launch.step_pairs() * 2 + n % 2;
      const bool exists = head < launch.group() && step < launch.steps() && place_.slot(step) >= 0;
      const float* q = exists ? place_.query(step, head) : nullptr;
      const int d = i / 32 % depths * 16 + i % 4 * 2;
      const auto at = [&](int e) { return exists && e < launch.args.kv.head_dim ? q[e] * scale : 0.0f; };
      const split_pair low = split<T>(at(d), at(d + 1)), high = split<T>(at(d + 8), at(d + 9));
      queries_[i] = {low.high, high.high, low.low, high.low};
      if (i / 32 % depths == 0 && i % 4 == 0)
        bases_[column * 8 + n] = exists ? place_.lse(step, head) * log2_e - log2f(place_.share()) : asked_nothing;
    }
  }

  __device__ __forceinline__ void weigh(int i) {
    std::uint32_t k[keys / 16][depths][4];
    const std::uint32_t stage = ring_ + static_cast<std::uint32_t>(i % stages * stage_bytes);
#pragma unroll
    for (int m = 0; m < keys / 16; ++m)
#pragma unroll
      for (int d = 0; d < depths; ++d)
        load_matrices(k[m][d], stage + piece(m * 16 + lane() % 16, d * 2 + lane() / 16));
    const auto& launch = place_.launch;
    float weights[keys / 8] = {};  // of head lane % 4 at positions lane / 4, + 8, …
    for (int column = 0; column < columns_; ++column) {
      float scores[keys / 16][4] = {};
#pragma unroll
      for (int d = 0; d < depths; ++d) {
        const uint4 q = queries_[(column * depths + d) * 32 + lane()];
#pragma unroll
        for (int m = 0; m < keys / 16; ++m) {
          multiply_add<T>(scores[m], k[m][d], q.x, q.y);
          multiply_add<T>(scores[m], k[m][d], q.z, q.w);
        }
      }
      const int head = column / launch.step_pairs() * 4 + lane() % 4, pair = column % launch.step_pairs();
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float base = bases_[column * 8 + lane() % 4 * 2 + e];
#pragma unroll
        for (int m = 0; m < keys / 16; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) weights[m * 2 + half] += power_of_two(scores[m][half * 2 + e] - base);
        if (!launch.mean()) leave(i, column, e, pair * 2 + e, head, weights);
      }
      if (launch.mean() && pair + 1 == launch.step_pairs()) leave(i, column, 0, 0, head, weights);
    }
  }

  /// Writes the turn's weights of four heads, one a lane of four, and clears them.
  __device__ __forceinline__ void leave(int i, int column, int e, int row, int head, float (&weights)[keys / 8]) {
    auto* const staged = reinterpret_cast<fp16*>(staging_);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < keys / 8; ++j) {
      const int at = j * 8 + lane() / 4;
      const float weight = first(i) + at < place_.end ? fminf(weights[j], most_recorded) : 0.0f;
      sum += weight;
      staged[lane() % 4 * keys + at] = from_float<fp16>(weight);
      weights[j] = 0.0f;
    }
    sum = over_lanes<4, 32>(sum, sum_of{});
    if (lane() < 4) sums_[(column * warps + warp()) * 8 + lane() * 2 + e] += sum;
    __syncwarp();
    const int of = lane() / 8, piece = lane() % 8 * 4;  // four weights a lane
    const int out = head - lane() % 4 + of;
    const std::int32_t left = out < place_.launch.group() && row < rows() ? place_.end - first(i) - piece : 0;
    if (left > 0) {
      fp16* to = place_.weights(row, out, first(i) + piece);
      if (place_.launch.wide && left >= 4) {
        *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(staged + of * keys + piece);
      } else {
        for (int j = 0; j < (left < 4 ? left : 4); ++j) to[j] = staged[of * keys + piece + j];
      }
    }
    __syncwarp();
  }
  __device__ std::int32_t rows() const { return static_cast<std::int32_t>(place_.launch.args.weights.extent(0)); }

  /// The chunk's part of every mass, the warps' shares in their order.
  __device__ void add_up() const {
    const auto& launch = place_.launch;
    for (int i = static_cast<int>(threadIdx.x); i < launch.group() * rows(); i += threads) {
      const int head = i % launch.group(), row = i / launch.group();
      const int pair = launch.mean() ? launch.step_pairs() - 1 : row / 2, e = launch.mean() ? 0 : row % 2;
      const int column = head / 4 * launch.step_pairs() + pair;
      float sum = 0.0f;
      for (int w = 0; w < warps; ++w) sum += sums_[(column * warps + w) * 8 + head % 4 * 2 + e];
      place_.part(row, head) = sum;
    }
  }

  const record_place<T>& place_;
  const int columns_;
  uint4* const queries_;      // [columns, depths, 32]
  const std::uint32_t ring_;  // this warp's
  std::byte* const staging_;  // this warp's
  float* const sums_;         // [columns, warps, 8] of stored weights
  float* const bases_;        // [columns, 8] what is taken from a query's scores, base two
};

template <class Tile, storage T>
__global__ void __launch_bounds__(Tile::threads)
    recompute_steps_kernel(const __grid_constant__ recompute_steps_launch<T> launch) {
  extern __shared__ __align__(128) std::byte record_memory[];
  const record_place<T> place(launch);
  if (place.begin >= place.end) return;
  Tile(place, record_memory).run();
}

/// Any storage and shape: a thread a position.
template <storage T>
__global__ void __launch_bounds__(record_plain_threads)
    record_plain_kernel(const __grid_constant__ recompute_steps_launch<T> launch) {
  __shared__ float parts[record_plain_threads / 32];
  const record_place<T> place(launch);
  if (place.begin >= place.end) return;
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const auto& scales = launch.args.key_scales;
  const float scale = launch.args.scale * (scales.empty() ? 1.0f : scales(place.layer, place.kv_head));
  const std::int32_t rows = launch.mean() ? 1 : launch.steps();
  for (std::int32_t i = 0; i < launch.group() * rows; ++i) {
    const std::int32_t head = i % launch.group(), row = i / launch.group();
    const std::int32_t first_step = launch.mean() ? 0 : row, last_step = launch.mean() ? launch.steps() : row + 1;
    float sum = 0.0f;
    for (std::int32_t position = place.begin + thread; position < place.end; position += record_plain_threads) {
      const T* key = place.key(position);
      float weight = 0.0f;
      for (std::int32_t step = first_step; step < last_step; ++step) {
        if (place.slot(step) < 0) continue;
        const float* q = place.query(step, head);
        float score = 0.0f;
        for (std::int32_t d = 0; d < launch.args.kv.head_dim; ++d) score = std::fma(q[d], to_float(key[d]), score);
        weight += place.share() * std::exp(score * scale - place.lse(step, head));
      }
      weight = fminf(weight, most_recorded);
      *place.weights(row, head, position) = from_float<fp16>(weight);
      sum += weight;
    }
    sum = sum_over_warp(sum);
    if (thread % 32 == 0) parts[thread / 32] = sum;
    __syncthreads();
    sum = 0.0f;
    for (const float part : parts) sum += part;
    if (thread == 0) place.part(row, head) = sum;
    __syncthreads();
  }
}

}  // namespace specattn::inline SPECATTN_CODE::detail
