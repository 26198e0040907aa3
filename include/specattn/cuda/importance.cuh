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

/// Adds the target's own weights of the round before to what the CTA has written of a tile: a thread a group.
template <storage T>
__device__ void add_history(const importance_launch<T>& launch, std::int32_t begin, std::int32_t group) {
  constexpr int ahead = 8;  // entries in flight
  if (group >= launch.groups || launch.history[group] == 0.0f) return;
  const auto& history = launch.args.history;
  const std::int32_t kv_len = launch.kv_len();
  const std::int32_t end = begin + importance_tile < kv_len ? begin + importance_tile : kv_len;
  const std::int32_t count = history.counts[group];
  const std::int32_t entries = count == keep_all ? end : count;
  std::int32_t at = 0;
  if (count == keep_all) {
    at = begin;
  } else {
    for (std::int32_t last = count; at < last;) {  // the first entry of the tile
      const std::int32_t middle = at + (last - at) / 2;
      if (history.positions(group, middle) < begin) {
        at = middle + 1;
      } else {
        last = middle;
      }
    }
  }
  float* out = &launch.args.out(group / launch.kv_heads, group % launch.kv_heads, launch.row, 0);
  for (bool more = true; more && at < entries; at += ahead) {
    std::int32_t positions[ahead];
    float values[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      positions[i] = end;
      if (at + i < entries) positions[i] = count == keep_all ? at + i : history.positions(group, at + i);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (positions[i] >= end) continue;
      values[i] = fmaf(launch.history[group], history.weights(group, at + i), out[positions[i]]);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (positions[i] < end) out[positions[i]] = values[i];
    }
    more = positions[ahead - 1] < end;
  }
}

__device__ __forceinline__ void exchange(coefficient_fragments& a, coefficient_fragments& b) {
  const coefficient_fragments kept = a;
  a = b;
  b = kept;
}

/// A CTA takes items (a slab of groups × a tile of positions), gridDim.x apart; neighbours have the same tile.
template <storage T>
__global__ void __launch_bounds__(importance_threads, 1)
    mix_signals_kernel(const __grid_constant__ importance_launch<T> launch) {
  extern __shared__ __align__(1024) std::byte importance_memory[];
  const std::int32_t items = launch.tiles() * launch.slabs;
  const auto first_item = static_cast<std::int32_t>(blockIdx.x), apart = static_cast<std::int32_t>(gridDim.x);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (first_item >= items) return;
  const auto block_at = [&](std::int32_t n) -> const std::byte* {
    const std::int32_t item = first_item + n / launch.chunks * apart;
    const std::ptrdiff_t block = std::ptrdiff_t{item / launch.slabs} * launch.chunks + n % launch.chunks;
    return item < items ? launch.signals + block * importance_block_bytes : nullptr;
  };
  const auto load = [&](coefficient_fragments& a, std::int32_t item, std::int32_t chunk) {
    for (; chunk >= launch.chunks; chunk -= launch.chunks) item += apart;
    const std::ptrdiff_t words = importance_chunk_depths * packed_depth / 8;
    a.load(item < items, launch.coefficients + (std::ptrdiff_t{item % launch.slabs} * launch.chunks + chunk) * words,
           warp, lane);
  };
  const importance_pipeline pipeline(importance_memory, block_at);
  coefficient_fragments even, odd;
  load(even, first_item, 0);
  load(odd, first_item, 1);
  importance_sums sums;
  std::int32_t n = 0;
  const auto take_block = [&](coefficient_fragments& a, std::int32_t item, std::int32_t chunk) {
    multiply(sums, a, pipeline.wait(n));
    pipeline.refill(n - 1, block_at);
    finish_multiply(sums);
    load(a, item, chunk + 2);
    pipeline.release(n++);
  };
  for (std::int32_t item = first_item; item < items; item += apart) {
    sums.clear();
    for (std::int32_t chunk = 0; chunk < launch.chunks; chunk += 2) {
      take_block(even, item, chunk);
      if (chunk + 1 < launch.chunks) take_block(odd, item, chunk + 1);
    }
    if (launch.chunks % 2 == 1) exchange(even, odd);
    const std::int32_t begin = launch.begin + item / launch.slabs * importance_tile;
    const std::int32_t first_group = item % launch.slabs * importance_slab;
    add_uniform(launch, begin, first_group, sums);
    write_sums(launch, begin, first_group, sums);
    if (launch.history != nullptr) {
      __syncthreads();
      add_history(launch, begin, first_group + static_cast<std::int32_t>(threadIdx.x));
    }
  }
}

template <>
struct importance_impl<cuda> {
  static constexpr std::int32_t window = 32768;  // positions; TinyLlama's signals over them are 46 MB

  static std::size_t workspace_bytes(const context<cuda>&, const resident_mixture<cuda>& mixture, std::ptrdiff_t,
                                     std::ptrdiff_t kv_len) {
    const std::ptrdiff_t tiles = ((std::min)(kv_len, std::ptrdiff_t{window}) + importance_tile - 1) / importance_tile;
    return static_cast<std::size_t>(tiles * mixture.chunks_) * importance_block_bytes;
  }

  template <storage T>
  static void run(context<cuda>& ctx, const resident_mixture<cuda>& mixture, const importance_args<cuda, T>& args) {
    if (args.kv_len <= 0 || mixture.groups_ == 0) return;
    importance_launch<T> launch{};
    launch.args = args;
    launch.signals = ctx.workspace(workspace_bytes(ctx, mixture, 0, args.kv_len), "importance");
    launch.coefficients = reinterpret_cast<const uint4*>(mixture.packed_.data());
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
    check_cuda(cudaFuncSetAttribute(mix_signals_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    importance_shared_bytes),
               "importance");
    for (launch.row = 0; launch.row < args.out.extent(2); ++launch.row) {
      for (launch.begin = 0; launch.begin < args.kv_len; launch.begin += window) start(ctx, launch);
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
  static void start(context<cuda>& ctx, const importance_launch<T>& launch) {
    const std::int32_t positions = (std::min)(launch.args.kv_len - launch.begin, window);
    const std::int32_t tiles = (positions + importance_tile - 1) / importance_tile;
    const dim3 parts(static_cast<unsigned>(tiles), static_cast<unsigned>(launch.chunks * (importance_chunk / 16)));
    combine_steps_kernel<<<parts, importance_threads, 0, ctx.stream()>>>(launch);
    check_cuda(cudaGetLastError(), "importance");
    const auto ctas = static_cast<unsigned>((std::min)(tiles * launch.slabs, ctx.multiprocessors()));
    mix_signals_kernel<<<ctas, importance_threads, importance_shared_bytes, ctx.stream()>>>(launch);
    check_cuda(cudaGetLastError(), "importance");
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
  const std::ptrdiff_t depths = std::ptrdiff_t{chunks_} * importance_chunk_depths;
  std::vector<std::uint16_t> packed(static_cast<std::size_t>(slabs_ * depths * packed_depth));
  std::vector<float> uniform(static_cast<std::size_t>(groups_) * static_cast<std::size_t>(uniforms));
  std::vector<float> history(static_cast<std::size_t>(groups_));
  for (std::int32_t g = 0; g < groups_; ++g) {
    for (std::int32_t t = from.first[static_cast<std::size_t>(g)]; t < from.first[static_cast<std::size_t>(g) + 1];
         ++t) {
      const auto [signal, coefficient] = from.terms[static_cast<std::size_t>(t)];
      if (signal < heads) {
        const std::ptrdiff_t depth = g / importance_slab * depths + signal / importance_depth;
        const std::ptrdiff_t at = packed_coefficient(g % importance_slab, signal % importance_depth);
        packed[static_cast<std::size_t>(depth * packed_depth + at)] = from_float<bf16>(coefficient).bits;
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
