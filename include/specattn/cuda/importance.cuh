// mix_importance() on the device: two launches for each window of positions.
//
// The first scales and averages the draft's rows into bf16 blocks; the second multiplies the mixture's coefficients with
// them on tensor cores. A window's blocks stay in the L2 cache between the two. Windows, sinks and history, which are no
// rows of the draft, are added in float where sums are written.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../importance.hpp"
#include "context.cuh"
#include "importance_product.cuh"
#include "importance_signals.cuh"
#include "importance_stages.cuh"

namespace specattn::inline v0_1 {

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
  if (!host.empty())
    check_cuda(cudaMemcpy(copy.data(), host.data(), copy.bytes(), cudaMemcpyHostToDevice), "mixture");
  return copy;
}

/// Adds windows and sinks to a thread's sums.
template <storage T>
__device__ __forceinline__ void add_uniform(const importance_launch<T>& launch, std::int32_t begin,
                                            std::int32_t first_group, importance_sums& sums) {
  const std::int32_t kv_len = launch.kv_len();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (std::int32_t u = 0; u < launch.uniforms; ++u) {
    const uniform_signal signal{launch.uniform_len[u], u < launch.windows};
    const std::int32_t count = signal.count(kv_len), first = signal.first(kv_len);
    if (first >= begin + importance_tile || first + count <= begin) continue;
    const std::int32_t offset = begin + lane % 4 * 2 - first;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::int32_t group = first_group + importance_sums::row(warp, lane, i, h);
        if (group >= launch.groups) continue;
        const float each = launch.uniform[std::ptrdiff_t{group} * launch.uniforms + u] / static_cast<float>(count);
#pragma unroll
        for (int j = 0; j < importance_tile / 8; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (static_cast<std::uint32_t>(offset + j * 8 + c) < static_cast<std::uint32_t>(count))
              sums.at[i][j * 4 + h * 2 + c] += each;
          }
        }
      }
    }
  }
}

template <storage T>
__device__ __forceinline__ void write_sums(const importance_launch<T>& launch, std::int32_t begin,
                                           std::int32_t first_group, const importance_sums& sums) {
  const std::int32_t left = launch.kv_len() - begin;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int32_t group = first_group + importance_sums::row(warp, lane, i, h);
      if (group >= launch.groups) continue;
      float* out = &launch.args.out(group / launch.kv_heads, group % launch.kv_heads, launch.row, begin);
#pragma unroll
      for (int j = 0; j < importance_tile / 8; ++j) {
        const int at = j * 8 + lane % 4 * 2;
        const float2 pair{sums.at[i][j * 4 + h * 2], sums.at[i][j * 4 + h * 2 + 1]};
        if (launch.wide_writes && at + 1 < left) {
          *reinterpret_cast<float2*>(out + at) = pair;
        } else {
          if (at < left) out[at] = pair.x;
          if (at + 1 < left) out[at + 1] = pair.y;
        }
      }
    }
  }
}

/// Adds the target's own weights of the round before to rows already written. blockIdx.x: a group; y: its share.
template <storage T>
__global__ void __launch_bounds__(importance_threads)
    add_history_kernel(const __grid_constant__ importance_launch<T> launch) {
  constexpr int ahead = 4;  // entries of a thread in flight
  const auto group = static_cast<std::int32_t>(blockIdx.x);
  const float coefficient = launch.history[group];
  if (coefficient == 0.0f) return;
  const auto& history = launch.args.history;
  const std::int32_t kv_len = launch.kv_len();
  const std::int32_t count = history.counts[group];
  const std::int32_t entries = count == keep_all ? kv_len : count;
  float* out = &launch.args.out(group / launch.kv_heads, group % launch.kv_heads, launch.row, 0);
  const auto apart = static_cast<std::int32_t>(gridDim.y * blockDim.x);
  for (auto first = static_cast<std::int32_t>(blockIdx.y * blockDim.x + threadIdx.x); first < entries;
       first += apart * ahead) {
    std::int32_t positions[ahead];
    float values[ahead] = {};
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const std::int32_t at = first + i * apart;
      positions[i] = kv_len;
      if (at >= entries) continue;
      positions[i] = count == keep_all ? at : history.positions(group, at);
      values[i] = history.weights(group, at);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (positions[i] < kv_len) values[i] = fmaf(coefficient, values[i], out[positions[i]]);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (positions[i] < kv_len) out[positions[i]] = values[i];
    }
  }
}

/// A CTA takes items (a slab of groups × a tile of positions), gridDim.x apart; neighbours have the same tile.
template <storage T>
__global__ void __launch_bounds__(importance_threads, 1)
    mix_signals_kernel(const __grid_constant__ importance_launch<T> launch) {
  extern __shared__ __align__(1024) std::byte importance_memory[];
  const std::int32_t items = launch.tiles() * launch.slabs;
  const auto first_item = static_cast<std::int32_t>(blockIdx.x), apart = static_cast<std::int32_t>(gridDim.x);
  if (first_item >= items) return;
  const auto source_of = [&](std::int32_t n) -> stage_source {
    const std::int32_t item = first_item + n / launch.chunks * apart, chunk = n % launch.chunks;
    if (item >= items) return {};
    const std::ptrdiff_t slab = item % launch.slabs, tile = item / launch.slabs;
    return {launch.coefficients + (slab * launch.chunks + chunk) * coefficient_block_bytes,
            launch.signals + (tile * launch.chunks + chunk) * signal_block_bytes};
  };
  const importance_pipeline pipeline(importance_memory, source_of);
  const auto done_with = [&](std::int32_t n) {
    pipeline.release(n);
    pipeline.refill(n, source_of);
  };
  importance_sums sums;
  std::int32_t n = 0;
  for (std::int32_t item = first_item; item < items; item += apart) {
    sums.clear();
    for (std::int32_t chunk = 0; chunk < launch.chunks; ++chunk, ++n) {
      multiply(sums, pipeline.wait(n));
      settle<products_in_flight>(sums);
      if (chunk >= products_in_flight) done_with(n - products_in_flight);
    }
    settle<0>(sums);
    if (products_in_flight > 0) done_with(n - 1);
    const std::int32_t begin = launch.begin + item / launch.slabs * importance_tile;
    const std::int32_t first_group = item % launch.slabs * importance_slab;
    add_uniform(launch, begin, first_group, sums);
    write_sums(launch, begin, first_group, sums);
  }
}

template <>
struct importance_impl<cuda> {
  static constexpr std::int32_t window = 32768;  // positions; TinyLlama's signals over them are 46 MB

  static std::size_t workspace_bytes(const context<cuda>&, const resident_mixture<cuda>& mixture, std::ptrdiff_t,
                                     std::ptrdiff_t kv_len) {
    const std::ptrdiff_t tiles = ((std::min)(kv_len, std::ptrdiff_t{window}) + importance_tile - 1) / importance_tile;
    return static_cast<std::size_t>(tiles * mixture.chunks_) * signal_block_bytes;
  }

  template <storage T>
  static void run(context<cuda>& ctx, const resident_mixture<cuda>& mixture, const importance_args<cuda, T>& args) {
    if (args.kv_len <= 0 || mixture.groups_ == 0) return;
    importance_launch<T> launch{};
    launch.args = args;
    launch.signals = ctx.workspace(workspace_bytes(ctx, mixture, 0, args.kv_len), "importance");
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
    launch.window = window;
    launch.wide_reads = aligned(args.draft_weights, 16);
    launch.wide_writes = aligned(args.out, 8);
    for (launch.row = 0; launch.row < args.out.extent(2); ++launch.row) {
      for (launch.begin = 0; launch.begin < args.kv_len; launch.begin += window) mix_window(ctx, launch);
      if (launch.history != nullptr)
        start(ctx, add_history_kernel<T>, dim3(static_cast<unsigned>(launch.groups), 4), 0, launch);
    }
  }

 private:
  /// Whether every row starts at a multiple of `bytes`.
  template <class T>
  static bool aligned(const view<T, 4, cuda>& rows, std::uintptr_t bytes) {
    auto together = reinterpret_cast<std::uintptr_t>(rows.data());
    for (int d = 0; d < 3; ++d) together |= static_cast<std::uintptr_t>(rows.stride(d)) * sizeof(T);
    return together % bytes == 0;
  }

  /// Grids are for the most positions there can be; how many there are is read on the device.
  template <storage T>
  static void mix_window(context<cuda>& ctx, const importance_launch<T>& launch) {
    const std::int32_t positions = (std::min)(launch.args.kv_len - launch.begin, window);
    const std::int32_t tiles = (positions + importance_tile - 1) / importance_tile;
    const dim3 parts(static_cast<unsigned>(tiles), static_cast<unsigned>(launch.chunks * (importance_chunk / 16)));
    start(ctx, combine_steps_kernel<T>, parts, 0, launch);
    const int shared_bytes = importance_shared_bytes(stages(mix_signals_kernel<T>));
    check_cuda(cudaFuncSetAttribute(mix_signals_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
               "importance");
    const dim3 ctas(static_cast<unsigned>((std::min)(tiles * launch.slabs, ctx.multiprocessors())));
    start(ctx, mix_signals_kernel<T>, ctas, shared_bytes, launch);
  }

  /// Of the code that runs: code for older devices may be running on a new one.
  template <class Kernel>
  static int stages(Kernel kernel) {
    cudaFuncAttributes compiled{};
    check_cuda(cudaFuncGetAttributes(&compiled, kernel), "importance");
    return compiled.ptxVersion >= 90 ? importance_stages : importance_stages_before_hopper;
  }

  template <class Launch>
  static void start(context<cuda>& ctx, void (*kernel)(Launch), dim3 grid, int shared_bytes, const Launch& launch) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(importance_threads);
    config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config.stream = ctx.stream();
    check_cuda(cudaLaunchKernelEx(&config, kernel, launch), "importance");
  }
};

}  // namespace detail

inline resident_mixture<cuda>::resident_mixture(const sparse_mixture& from)
    : kv_heads(from.kv_heads), signals(from.signals), groups_(from.groups()) {
  using namespace detail;  // NOLINT(google-build-using-namespace)
  const std::int32_t heads = signals.draft_heads();
  const auto uniforms = static_cast<std::int32_t>(signals.windows.size()) + (signals.sinks > 0 ? 1 : 0);
  slabs_ = (groups_ + importance_slab - 1) / importance_slab;
  chunks_ = (heads + importance_chunk - 1) / importance_chunk;
  std::vector<std::uint16_t> packed(static_cast<std::size_t>(slabs_ * chunks_) * (coefficient_block_bytes / 2));
  std::vector<float> uniform(static_cast<std::size_t>(groups_) * static_cast<std::size_t>(uniforms));
  std::vector<float> history(static_cast<std::size_t>(groups_));
  for (std::int32_t g = 0; g < groups_; ++g) {
    for (std::int32_t t = from.first[static_cast<std::size_t>(g)]; t < from.first[static_cast<std::size_t>(g) + 1];
         ++t) {
      const auto [signal, coefficient] = from.terms[static_cast<std::size_t>(t)];
      if (signal < heads) {
        const std::ptrdiff_t block = g / importance_slab * chunks_ + signal / importance_chunk;
        const std::ptrdiff_t at =
            block * coefficient_block_bytes + packed_coefficients(g % importance_slab, signal % importance_chunk / 8);
        packed[static_cast<std::size_t>(at / 2 + signal % 8)] = from_float<bf16>(coefficient).bits;
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

}  // namespace specattn::inline v0_1
