// mix_importance() on the device: the draft's rows, scaled and averaged, become bf16 blocks, which are multiplied with the
// mixture's coefficients on tensor cores. Two launches for each window of positions, whose blocks stay in the L2 cache
// between them; one launch on Hopper where a slab holds all groups and there is one step. Windows, sinks
// and history, which are no rows of the draft, are added in float where sums are written.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../importance.hpp"
#include "context.cuh"
#include "device/barrier.cuh"
#include "device/launch.cuh"
#include "importance/plan.cuh"
#include "importance/product.cuh"
#include "importance/rows.cuh"
#include "importance/signals.cuh"
#include "importance/stages.cuh"
#include "importance/write.cuh"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// A mixture in device memory: draft heads' coefficients as bf16 in the order in which tensor cores take them, a zero for
/// every head that a group does not use; the other signals' coefficients as float.
template <>
class resident_mixture<cuda> {
 public:
  resident_mixture() = default;
  /// Uploads. \sync done on return, not to be called inside a graph's capture
  explicit resident_mixture(const sparse_mixture& from);

  std::int32_t kv_heads = 1;
  signal_set signals;
  std::int32_t groups() const { return groups_; }

 private:
  friend struct detail::importance_impl<cuda>;
  std::int32_t groups_ = 0;
  std::int32_t slabs_ = 0;   // of 256 groups
  std::int32_t chunks_ = 0;  // of 64 draft heads
  buffer<std::uint16_t, cuda> packed_;
  buffer<float, cuda> uniform_;  // [groups, windows and sinks]
  buffer<std::int32_t, cuda> uniform_len_;
  buffer<float, cuda> history_;  // [groups]
};

namespace detail {

template <class T>
buffer<T, cuda> to_device(const std::vector<T>& host) {
  buffer<T, cuda> copy(host.size());
  if (host.empty()) return copy;
  const setup_stream upload("mixture");
  check_cuda(cudaMemcpyAsync(copy.data(), host.data(), copy.bytes(), cudaMemcpyHostToDevice, upload.get()),
             "mixture");
  upload.finish();
  return copy;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Multiplies what others put into the ring, for all of the CTA's items.
template <storage T, storage U, class Ring>
__device__ __forceinline__ void multiply_items(const importance_launch<T, U>& launch, const Ring& ring) {
  importance_sums sums;
  std::int32_t n = 0;
  for (item_walk<importance_launch<T, U>> item(launch); item.more(); item.next()) {
    sums.clear();
    for (std::int32_t chunk = 0; chunk < launch.chunks; ++chunk, ++n) {
      multiply(sums, ring.wait(n));
      settle<products_in_flight>(sums);
      if (chunk >= products_in_flight) ring.release(n - products_in_flight);
    }
    settle<0>(sums);
    if (products_in_flight > 0) ring.release(n - 1);
    finish(launch, item.place(), item.slab(), sums);
  }
}

/// Fills the ring with blocks of signals. For one thread.
template <storage T, storage U, class Ring>
__device__ __forceinline__ void copy_blocks(const importance_launch<T, U>& launch, const Ring& ring) {
  std::int32_t n = 0;
  for (item_walk<importance_launch<T, U>> item(launch); item.more(); item.next()) {
    const std::byte* coefficients =
        launch.coefficients + std::ptrdiff_t{item.slab()} * launch.chunks * coefficient_block_bytes;
    const std::byte* signals = launch.signals + std::ptrdiff_t{item.tile()} * launch.chunks * signal_block_bytes;
    for (std::int32_t chunk = 0; chunk < launch.chunks; ++chunk, ++n) {
      ring.await_room(n);
      ring.fetch_coefficients(n, coefficients + std::ptrdiff_t{chunk} * coefficient_block_bytes, signal_block_bytes);
      ring.filled(n).copy(ring.stage(n) + coefficient_block_bytes,
                          signals + std::ptrdiff_t{chunk} * signal_block_bytes, signal_block_bytes);
    }
  }
}

#endif

/// Products of blocks that combine_steps_kernel has made.
template <storage T, storage U, int Stages>
__global__ void __launch_bounds__(importance_threads + importance_copiers, 1)
    mix_signals_kernel(const __grid_constant__ importance_launch<T, U> launch) {
  extern __shared__ __align__(1024) std::byte importance_memory[];
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const stage_ring<Stages, 1> ring(importance_memory);
  if (threadIdx.x < importance_threads) {
    multiply_items(launch, ring);
  } else if (threadIdx.x == importance_threads) {
    copy_blocks(launch, ring);
  }
  __syncwarp();
  sync_cluster();
#else
  item_walk<importance_launch<T, U>> next(launch);
  std::int32_t next_chunk = 0;
  const auto next_source = [&]() -> stage_source {
    if (!next.more()) return {};
    const std::ptrdiff_t slab = next.slab(), tile = next.tile();
    const stage_source source{launch.coefficients + (slab * launch.chunks + next_chunk) * coefficient_block_bytes,
                              launch.signals + (tile * launch.chunks + next_chunk) * signal_block_bytes};
    if (++next_chunk == launch.chunks) {
      next_chunk = 0;
      next.next();
    }
    return source;
  };
  const importance_pipeline pipeline(importance_memory, next_source);
  importance_sums sums;
  std::int32_t n = 0;
  for (item_walk<importance_launch<T, U>> item(launch); item.more(); item.next()) {
    sums.clear();
    for (std::int32_t chunk = 0; chunk < launch.chunks; ++chunk, ++n) {
      multiply(sums, pipeline.wait(n));
      pipeline.release(n);
      pipeline.refill(n, next_source);
    }
    finish(launch, item.place(), item.slab(), sums);
  }
#endif
}

/// The same for a single slab of groups, straight from the draft's rows. For Hopper and later.
template <storage T, storage U>
__global__ void __launch_bounds__(importance_threads + row_producers, 1)
    mix_rows_kernel(const __grid_constant__ importance_launch<T, U> launch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) std::byte importance_memory[];
  const row_ring ring(importance_memory);
  if (threadIdx.x < importance_threads) {
    multiply_items(launch, ring);
  } else {
    row_producer<T, U>(launch, importance_memory, ring).run();
  }
  sync_cluster();
#endif
}

template <>
struct importance_impl<cuda> {
  static constexpr std::int32_t window = 256;  // tiles; TinyLlama's signals over them are 46 MB

  static std::size_t workspace_bytes(const context<cuda>& ctx, const resident_mixture<cuda>& mixture,
                                     std::ptrdiff_t steps, std::ptrdiff_t kv_len, std::ptrdiff_t sequences) {
    if (plan(ctx, mixture, steps).straight) return 0;
    const std::ptrdiff_t tiles = (std::min)(sequences * tiles_of(kv_len), std::ptrdiff_t{window});
    return static_cast<std::size_t>(tiles * mixture.chunks_) * signal_block_bytes;
  }

  template <storage T, storage U>
  static void run(context<cuda>& ctx, const resident_mixture<cuda>& mixture,
                  const importance_args<cuda, T, U>& args) {
    if (args.kv_len <= 0 || mixture.groups_ == 0 || args.sequences() == 0) return;
    importance_launch<T, U> launch{};
    launch.args = args;
    const std::ptrdiff_t steps = args.separate_steps ? 1 : args.draft_weights.extent(0);
    const importance_plan planned = plan(ctx, mixture, steps);
    launch.signals = ctx.workspace(workspace_bytes(ctx, mixture, steps, args.kv_len, args.sequences()), "importance");
    launch.coefficients = reinterpret_cast<const std::byte*>(mixture.packed_.data());
    launch.uniform = mixture.uniform_.data();
    launch.uniform_len = mixture.uniform_len_.data();
    if (mixture.signals.history && !args.history.counts.empty()) launch.history = mixture.history_.data();
    launch.uniforms = static_cast<std::int32_t>(mixture.uniform_len_.size());
    launch.windows = static_cast<std::int32_t>(mixture.signals.windows.size());
    launch.groups = mixture.groups_;
    launch.kv_heads = mixture.kv_heads;
    launch.chunks = mixture.chunks_;
    launch.slabs = mixture.slabs_;
    launch.tiles = static_cast<std::int32_t>(tiles_of(args.kv_len));
    launch.wide_reads = aligned(args.draft_weights, 16);
    launch.wide_writes = aligned(args.out, 4 * sizeof(U));
    const auto sequences = static_cast<std::int32_t>(args.sequences());
    const std::int32_t tiles = sequences * launch.tiles, at_once = planned.straight ? tiles : window;
    for (launch.row = 0; launch.row < args.out.extent(3); ++launch.row) {
      for (launch.begin = 0; launch.begin < tiles; launch.begin = launch.end) {
        launch.end = (std::min)(launch.begin + at_once, tiles);
        planned.straight ? mix_rows(ctx, launch, planned) : mix_window(ctx, launch, planned);
      }
      if (launch.history == nullptr) continue;
      const dim3 shares(blocks_of(std::ptrdiff_t{launch.groups} * sequences, 1), 4);
      start_kernel(ctx, add_history_kernel<T, U>, shares, importance_threads, launch, "importance");
    }
  }

 private:
  /// Of a sequence, rounded up to what a cluster takes.
  static std::ptrdiff_t tiles_of(std::ptrdiff_t kv_len) {
    return (kv_len + 2 * importance_tile - 1) / (2 * importance_tile) * 2;
  }

  /// Whether every row starts at a multiple of `bytes`.
  template <class T>
  static bool aligned(const view<T, 5, cuda>& rows, std::uintptr_t bytes) {
    auto together = reinterpret_cast<std::uintptr_t>(rows.data());
    for (int d = 0; d < 4; ++d) together |= static_cast<std::uintptr_t>(rows.stride(d)) * sizeof(T);
    return together % bytes == 0;
  }

  static importance_plan plan(const context<cuda>& ctx, const resident_mixture<cuda>& mixture, std::ptrdiff_t steps) {
    return plan_importance(ctx.code_major(), ctx.block_shared_bytes(), mixture.slabs_, steps);
  }

  /// Grids are for the most positions there can be; how many there are is read on the device.
  template <storage T, storage U>
  static void mix_window(context<cuda>& ctx, const importance_launch<T, U>& launch, const importance_plan& planned) {
    const std::int32_t tiles = launch.end - launch.begin;
    const dim3 heads(
        static_cast<unsigned>(tiles),
        static_cast<unsigned>(launch.chunks * importance_chunk * weight_piece<T>::across / importance_threads));
    start_kernel(ctx, combine_steps_kernel<T, U>, heads, importance_threads, launch, "importance");
    const bool copies = ctx.code_major() >= 9;  // by threads of their own
    start_persistent(ctx,
                     planned.stages == importance_stages ? mix_signals_kernel<T, U, importance_stages>
                                                         : mix_signals_kernel<T, U, importance_stages_before_hopper>,
                     copies ? importance_threads + importance_copiers : importance_threads, planned, launch);
  }
  template <storage T, storage U>
  static void mix_rows(context<cuda>& ctx, const importance_launch<T, U>& launch, const importance_plan& planned) {
    start_persistent(ctx, mix_rows_kernel<T, U>, importance_threads + row_producers, planned, launch);
  }

  template <class Launch>
  static void start_persistent(context<cuda>& ctx, void (*kernel)(Launch), int threads,
                               const importance_plan& planned, const Launch& launch) {
    const int cluster = ctx.code_major() >= 9 ? importance_cluster : 1;
    const std::int32_t items = (launch.end - launch.begin) * launch.slabs;
    const std::int32_t ctas = (std::min)(items, ctx.multiprocessors() / cluster * cluster);
    const auto bytes = static_cast<std::size_t>(planned.shared_bytes);
    queue_kernel(ctx, kernel,
                 {.grid = dim3(static_cast<unsigned>(ctas)),
                  .threads = threads,
                  .shared_bytes = bytes,
                  .most_shared_bytes = bytes,
                  .cluster = cluster},
                 "importance", launch);
  }
};

}  // namespace detail

inline resident_mixture<cuda>::resident_mixture(const sparse_mixture& from)
    : kv_heads(from.kv_heads), signals(from.signals), groups_(from.groups()) {
  using namespace detail;  // NOLINT(google-build-using-namespace)
  const std::int32_t heads = signals.draft_heads(), eights = head_eights(signals.draft_q_heads);
  const auto uniforms = static_cast<std::int32_t>(signals.windows.size()) + (signals.sinks > 0 ? 1 : 0);
  slabs_ = (groups_ + importance_slab - 1) / importance_slab;
  chunks_ = (signals.draft_layers * eights * 8 + importance_chunk - 1) / importance_chunk;
  std::vector<std::uint16_t> packed(static_cast<std::size_t>(slabs_ * chunks_) * (coefficient_block_bytes / 2));
  std::vector<float> uniform(static_cast<std::size_t>(groups_) * static_cast<std::size_t>(uniforms));
  std::vector<float> history(static_cast<std::size_t>(groups_));
  for (std::int32_t g = 0; g < groups_; ++g) {
    for (std::int32_t t = from.first[static_cast<std::size_t>(g)]; t < from.first[static_cast<std::size_t>(g) + 1];
         ++t) {
      const auto [signal, coefficient] = from.terms[static_cast<std::size_t>(t)];
      if (signal < heads) {
        const std::int32_t at = signal / signals.draft_q_heads * eights * 8 + signal % signals.draft_q_heads;
        const std::ptrdiff_t block = g / importance_slab * chunks_ + at / importance_chunk;
        const std::ptrdiff_t octet =
            block * coefficient_block_bytes + packed_coefficients(g % importance_slab, at % importance_chunk / 8);
        packed[static_cast<std::size_t>(octet / 2 + at % 8)] = from_float<bf16>(coefficient).bits;
      } else if (signal < heads + uniforms) {
        uniform[static_cast<std::size_t>(std::ptrdiff_t{g} * uniforms + signal - heads)] = coefficient;
      } else {
        history[static_cast<std::size_t>(g)] = coefficient;
      }
    }
  }
  std::vector<std::int32_t> lengths = signals.windows;
  if (signals.sinks > 0) lengths.push_back(signals.sinks);
  packed_ = to_device(packed);
  uniform_ = to_device(uniform);
  uniform_len_ = to_device(lengths);
  history_ = to_device(history);
}

}  // namespace specattn::inline SPECATTN_CODE

#include "../words_end.hpp"
