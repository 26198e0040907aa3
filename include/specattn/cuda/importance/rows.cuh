// The draft's rows on their way into the product where one slab holds all groups: combined in shared memory by threads of
// their own, so that nothing goes through memory in between. Hopper and later.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../device/copy.cuh"
#include "signals.cuh"
#include "stages.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

using row_ring = stage_ring<row_stages, row_producers / 32 + 1>;  // the producers' warps, and the coefficients' copy

/// Numbers of the draft's rows as a warp takes them, eight heads at a time: those of every step, then those of the eights
/// `Apart` on.
template <class T, int Rank, int Apart>
class row_walk {
 public:
  /// \param rows  [steps, draft layers, sequences, q_heads, …]
  __device__ row_walk(const view<const T, Rank, cuda>& rows, std::int32_t steps)
      : rows_(rows),
        steps_(steps),
        layers_(static_cast<std::int32_t>(rows.extent(1))),
        heads_(static_cast<std::int32_t>(rows.extent(3))),
        to_step_(rows.stride(0)),
        to_eight_(Apart * 8 * rows.stride(3) - (steps - 1) * rows.stride(0)),
        to_layer_(rows.stride(1) - head_eights(heads_) * 8 * rows.stride(3)) {
    in_register(to_step_), in_register(to_eight_), in_register(to_layer_);
  }

  /// \param row       of eight
  /// \param position  0 where a row has one number
  __device__ __forceinline__ void start(std::int32_t first_step, std::int32_t sequence, std::int32_t eight, int row,
                                        std::int32_t position) {
    first_step_ = first_step;
    step_ = layer_ = 0;
    eight_ = eight;
    at_ = rows_.data() + first_step_ * rows_.stride(0) + sequence * rows_.stride(2) +
          (eight * 8 + row) * rows_.stride(3) + position;
    wrap();
  }
  __device__ __forceinline__ void advance() {
    if (++step_ < steps_) {
      at_ += to_step_;
      return;
    }
    step_ = 0;
    eight_ += Apart;
    at_ += to_eight_;
    wrap();
  }
  /// The row's number; to be read only where there are so many rows.
  __device__ const T* get() const { return at_; }
  /// How many of the eight there are, or more; 0 or fewer: none.
  __device__ std::int32_t rows() const { return layer_ < layers_ ? heads_ - eight_ * 8 : 0; }
  __device__ std::int32_t step() const { return first_step_ + step_; }
  __device__ std::int32_t layer() const { return layer_; }
  __device__ std::int32_t first_head() const { return eight_ * 8; }

 private:
  /// So that it is not computed again and again.
  __device__ static void in_register(std::ptrdiff_t& x) { asm("" : "+l"(x)); }
  __device__ __forceinline__ void wrap() {
    const std::int32_t eights = head_eights(heads_);
    while (eight_ >= eights) {
      eight_ -= eights;
      ++layer_;
      at_ += to_layer_;
    }
  }
  const view<const T, Rank, cuda>& rows_;
  std::int32_t first_step_ = 0, steps_, layers_, heads_, step_ = 0, layer_ = 0, eight_ = 0;
  std::ptrdiff_t to_step_, to_eight_, to_layer_;
  const T* at_ = nullptr;
};

/// One of the warps that fill the product's stages. It asks for a unit, eight draft heads' rows of a tile from one step,
/// long before it combines them: what is in flight lies in a ring in shared memory, where each lane has its own part.
template <storage T, storage U>
class row_producer {
  using launch_type = importance_launch<T, U>;
  using piece = weight_piece<T>;
  static constexpr int warps = row_producers / 32;
  static constexpr int pieces = 8 * piece::across / 32;           // of a unit, for each lane
  static constexpr int ahead = row_ahead_bytes / (pieces * 512);  // units on their way
  static constexpr int units = importance_chunk / 8 / warps;      // of a warp in a stage

 public:
  __device__ row_producer(const launch_type& launch, std::byte* memory, const row_ring& ring)
      : launch_(launch),
        ring_(ring),
        stages_(memory),
        warp_((static_cast<int>(threadIdx.x) - importance_threads) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        units_(memory + stage_ring_bytes(row_stages) + warp_ * row_ahead_bytes + lane_ * 16),
        weights_(launch.args.draft_weights, launch.all_steps()),
        masses_(launch.args.masses, launch.all_steps()),
        asked_(launch) {}

  __device__ __forceinline__ void run() {
    start_asking();
    for (int slot = 0; slot < ahead; ++slot) ask(slot);
    std::int32_t n = 0;
    for (item_walk<launch_type> item(launch_); item.more(); item.next()) {
      place_ = item.place();
      masses_.start(launch_.first_step(place_.sequence), place_.sequence, warp_, lane_, 0);
      read_factor();
      for (std::int32_t chunk = 0; chunk < launch_.chunks; ++chunk, ++n) fill(n, chunk);
    }
  }

 private:
  __device__ int column() const { return lane_ % piece::across; }
  /// Of a unit's rows, the one that this lane has a part of: its j-th piece.
  __device__ int row(int j) const { return j * (8 / pieces) + lane_ / piece::across; }

  // ---- what is asked for

  __device__ __forceinline__ void start_asking() {
    to_ask_ = 0;
    if (!asked_.more()) return;
    const importance_place place = asked_.place();
    weights_.start(launch_.first_step(place.sequence), place.sequence, warp_, row(0),
                   place.begin + column() * piece::size);
    const std::int32_t left = place.left - column() * piece::size;
    asked_size_ = left < 0 ? 0 : left < piece::size ? left : piece::size;
    to_ask_ = launch_.chunks * units * launch_.all_steps();
  }
  __device__ __forceinline__ void ask(int slot) {
    if (to_ask_ > 0) {
      const T* from = weights_.get();
      std::byte* to = units_ + slot * (pieces * 512);
      const std::ptrdiff_t apart = 8 / pieces * launch_.args.draft_weights.stride(3);
      const std::int32_t rows = weights_.rows() - row(0);
      if (launch_.wide_reads) {
#pragma unroll
        for (int j = 0; j < pieces; ++j, from += apart) {
          copy_16_bytes(shared_address(to) + j * 512, from,
                        j * (8 / pieces) < rows ? asked_size_ * static_cast<int>(sizeof(T)) : 0);
        }
      } else {
#pragma unroll
        for (int j = 0; j < pieces; ++j, from += apart) {
          piece weights;
          weights.load(from, j * (8 / pieces) < rows ? asked_size_ : 0, false);
          *reinterpret_cast<uint4*>(to + j * 512) = *reinterpret_cast<const uint4*>(weights.raw);
        }
      }
      weights_.advance();
      if (--to_ask_ == 0) {
        asked_.next();
        start_asking();
      }
    }
    commit_copies();
  }

  // ---- what is combined

  /// The factor of each of the next unit's rows, by the first lanes, on its way while this unit is combined.
  __device__ __forceinline__ void read_factor() {
    const auto& scales = launch_.args.split_scales;
    next_mass_ = 0.0f;
    if (lane_ < 8 && lane_ < masses_.rows()) {
      next_mass_ = *masses_.get();
      if (!scales.empty()) {
        next_scale_ = scales(masses_.step(), masses_.layer(), place_.sequence, masses_.first_head() + lane_,
                             place_.begin / launch_.args.split_len);
      }
    }
    masses_.advance();
  }
  /// Adds one step's unit to `means`.
  __device__ __forceinline__ void add_unit(mean_piece<T> (&means)[pieces]) {
    const float factor = mass_factor(next_mass_, launch_.all_steps()) * next_scale_;
    await_copies<ahead - 1>();
    piece weights[pieces];
#pragma unroll
    for (int j = 0; j < pieces; ++j) {
      *reinterpret_cast<uint4*>(weights[j].raw) =
          *reinterpret_cast<const uint4*>(units_ + slot_ * (pieces * 512) + j * 512);
    }
    ask(slot_);
    slot_ = (slot_ + 1) % ahead;
    read_factor();
#pragma unroll
    for (int j = 0; j < pieces; ++j) means[j].add(weights[j], __shfl_sync(~0u, factor, row(j)));
  }

  /// Makes stage n.
  __device__ __forceinline__ void fill(std::int32_t n, std::int32_t chunk) {
    ring_.await_room(n);
    if (warp_ == 0 && lane_ == 0)
      ring_.fetch_coefficients(n, launch_.coefficients + std::ptrdiff_t{chunk} * coefficient_block_bytes, 0);
    std::byte* block = stages_ + n % row_stages * importance_stage_bytes + coefficient_block_bytes;
    for (int unit = 0; unit < units; ++unit) {
      mean_piece<T> means[pieces];
      for (std::int32_t step = 0; step < launch_.all_steps(); ++step) add_unit(means);
      const int at = (unit * warps + warp_) * packed_eight_bytes;
#pragma unroll
      for (int j = 0; j < pieces; ++j) means[j].store(block + at, row(j), column());
    }
    fence_shared_memory();
    __syncwarp();
    if (lane_ == 0) ring_.filled(n).arrive();
  }
  const launch_type& launch_;
  const row_ring& ring_;
  std::byte* stages_;
  int warp_, lane_;
  std::byte* units_;
  row_walk<T, 5, warps> weights_;
  row_walk<float, 4, warps> masses_;
  item_walk<launch_type> asked_;
  std::int32_t asked_size_ = 0, to_ask_ = 0;
  importance_place place_{};
  float next_mass_ = 0.0f, next_scale_ = 1.0f;
  int slot_ = 0;
};

#endif

}  // namespace specattn::inline SPECATTN_CODE::detail
