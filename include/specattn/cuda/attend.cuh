// attend() on the device: one launch over equal shares of all positions, and a small one that merges what shares cut.
//
// Work is divided as in stream-K products: the virtual lists of all blocks of query rows, end to end, are cut into as
// many equal shares as the grid has CTAs, wherever blocks end, so that ragged counts balance themselves. The split
// into parts and their merge are flash-decoding's; the state is attention_state's.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../attend.hpp"
#include "attend_gather.cuh"
#include "attend_merge.cuh"
#include "attend_plain_tile.cuh"
#include "attend_plan.cuh"
#include "attend_tensor_tile.cuh"
#include "context.cuh"

namespace specattn::inline v0_1::detail {

template <storage T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1) attend_kernel(const __grid_constant__ attend_launch<T> launch) {
  extern __shared__ __align__(1024) std::byte tile_memory[];
  __shared__ attend_plan_memory<Tile::threads> plan;
  __shared__ attend_row_facts facts;
  wait_for_previous_kernel();
  launch_dependents();
  find_range(launch, plan);
  const attend_cut end = plan.range.end;
  attend_cut at = plan.range.begin;
  device_block block = plan.first;
  Tile tile(launch, tile_memory, facts);
  std::int32_t open_parts = 0;
  while (at.group < end.group || (at.group == end.group && at.block <= end.block)) {
    const bool last = at.group == end.group && at.block == end.block;
    if (last && end.position == 0) break;
    facts.fill(launch, block);
    tile.run(block, at.position, last ? end.position : block.attended);
    tile.leave();
    __syncthreads();
    const bool whole = at.position == 0 && !last;
    const std::ptrdiff_t part = 2 * std::ptrdiff_t{blockIdx.x} + (at.position == 0 ? 1 : 0);
    finish_part(launch, tile, block, whole ? -1 : part, facts);
    __syncthreads();
    if (whole && launch.records()) {
      finish_recording<Tile::threads>(launch, block, facts);
      __syncthreads();
    }
    if (last) {
      if (at.position == 0) open_parts = static_cast<std::int32_t>(2 + (end.left - 1) / plan.range.share);
      break;
    }
    at.position = 0;
    ++at.block;
    block = launch.group_at(at.group);
    while (at.group < end.group && at.block >= launch.rows.blocks(block.slots)) {
      at.block = 0;
      if (++at.group < launch.groups()) block = launch.group_at(at.group);
    }
    block = launch.block_of(block, at.block);
  }
  if (threadIdx.x != 0) return;
  block.parts = open_parts;
  launch.exchange.open[blockIdx.x] = block;
}

template <>
struct attend_impl<cuda> {
  static std::size_t workspace_bytes(const context<cuda>& ctx, const attend_shape& shape) {
    attend_exchange exchange;
    return exchange.lay_out(nullptr, shares(ctx), (std::max)(shape.head_dim, 0));
  }

  template <storage T>
  static void run(context<cuda>& ctx, const attend_args<T, cuda>& args) {
    if (args.q.extent(0) == 0 || args.kv_lens.extent(0) == 0) return;
    if constexpr (tensor_storage<multiplied<T>>) {
      if (aligned(args) && run_with_columns(ctx, args)) return;
    }
    expects(start<plain_tile<T>>(ctx, args), "attend: head_dim ", args.kv.head_dim, " needs more shared memory than ",
            ctx.block_shared_bytes(), " bytes");
  }

 private:
  static std::size_t shares(const context<cuda>& ctx) { return static_cast<std::size_t>(ctx.multiprocessors()); }

  /// Whether every row of the cache is whole 16-byte pieces.
  template <storage T>
  static bool aligned(const attend_args<T, cuda>& a) {
    const auto address = reinterpret_cast<std::uintptr_t>(a.kv.keys) | reinterpret_cast<std::uintptr_t>(a.kv.values);
    return address % 16 == 0 &&
           (a.kv.head_dim | a.kv.page_stride | a.kv.position_stride | a.kv.head_stride) % (16 / sizeof(T)) == 0 &&
           a.kv.head_dim <= 256;
  }

  /// As many rows a block as sequences have on average: a batch with equal slots wastes none.
  template <storage T>
  static bool run_with_columns(context<cuda>& ctx, const attend_args<T, cuda>& a) {
    const std::ptrdiff_t slots = (a.q.extent(0) + a.kv_lens.extent(0) - 1) / a.kv_lens.extent(0);
    const std::ptrdiff_t columns = (slots * (a.q.extent(1) / a.kv.kv_heads) + 7) / 8;
    if (columns == 1) return run_with_head_dim<1>(ctx, a);
    if (columns == 2 || a.kv.head_dim > 128) return run_with_head_dim<2>(ctx, a);
    if (columns == 3) return run_with_head_dim<3>(ctx, a);
    return run_with_head_dim<4>(ctx, a);
  }
  template <int Columns, storage T>
  static bool run_with_head_dim(context<cuda>& ctx, const attend_args<T, cuda>& a) {
    if (a.kv.head_dim <= 32) return start<tensor_tile<T, 32, Columns>>(ctx, a);
    if (a.kv.head_dim <= 64) return start<tensor_tile<T, 64, Columns>>(ctx, a);
    if (a.kv.head_dim <= 128) return start<tensor_tile<T, 128, Columns>>(ctx, a);
    if constexpr (Columns <= 2) return start<tensor_tile<T, 256, Columns>>(ctx, a);
    return false;
  }

  /// Starts the pass; false when a CTA has too little shared memory for it.
  template <class Tile, storage T>
  static bool start(context<cuda>& ctx, const attend_args<T, cuda>& args) {
    const std::int32_t group = static_cast<std::int32_t>(args.q.extent(1)) / args.kv.kv_heads;
    attend_launch<T> launch{args, args.scale, row_division(group, Tile::rows), {}, Tile::most_stages};
    if (launch.scale == 0.0f) launch.scale = 1.0f / std::sqrt(static_cast<float>(args.kv.head_dim));
    const auto shared = [&] { return Tile::shared_bytes(launch.stages, args.kv.head_dim); };
    const auto most = static_cast<std::size_t>(ctx.block_shared_bytes()) - sizeof(attend_plan_memory<Tile::threads>) -
                      sizeof(attend_row_facts);
    while (launch.stages > 2 && shared() > most) --launch.stages;
    if (shared() > most) return false;
    const attend_shape shape{.head_dim = args.kv.head_dim};
    std::byte* workspace = ctx.workspace(workspace_bytes(ctx, shape), "attend");
    launch.exchange.lay_out(workspace, shares(ctx), args.kv.head_dim);
    const dim3 grid(static_cast<unsigned>(shares(ctx)));
    check_cuda(cudaFuncSetAttribute(attend_kernel<T, Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared())),
               "attend");
    launch_kernel(ctx, attend_kernel<T, Tile>, grid, Tile::threads, shared(), launch);
    const unsigned helpers = args.recording.weights.empty() ? 8 : 16;  // a warp a row; more for the sweep
    launch_kernel(ctx, attend_merge_kernel<T>, dim3(grid.x, helpers), attend_merge_threads, 0, launch);
    return true;
  }

  /// A kernel's CTAs may be placed while the one before it on the stream still runs; each waits for it before it
  /// reads or writes anything.
  template <class Launch>
  static void launch_kernel(const context<cuda>& ctx, void (*kernel)(Launch), dim3 grid, int threads,
                            std::size_t shared_bytes, const Launch& launch) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = ctx.stream();
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early;
    config.numAttrs = ctx.code_major() >= 9 ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, launch), "attend");
  }
};

}  // namespace specattn::inline v0_1::detail
