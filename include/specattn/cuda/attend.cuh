// attend() on the device: one launch over shares of all positions, a small one that merges what shares cut and, for a
// recording, one that makes scores weights. Where little is read a launch takes as long as its instructions take to
// arrive: each is placed while the one before it runs, and does what it can before that ends.
//
// Where blocks of query rows are alike, each has the same number of CTAs to itself. Elsewhere work is divided as in
// stream-K products: the virtual lists of all blocks, end to end, are cut into as many equal shares as the grid has CTAs,
// wherever blocks end, so that ragged counts balance themselves. The split into parts and their merge are
// flash-decoding's; the state is attention_state's.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../attend.hpp"
#include "attend/cut.cuh"
#include "attend/gather.cuh"
#include "attend/keep_queries.cuh"
#include "attend/merge.cuh"
#include "attend/plain_tile.cuh"
#include "attend/plan.cuh"
#include "attend/record.cuh"
#include "attend/tensor_tile.cuh"
#include "context.cuh"
#include "device/launch.cuh"
#include "device/mma.cuh"
#include "device/overlap.cuh"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

template <storage T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1) attend_kernel(const __grid_constant__ attend_launch<T> launch) {
  extern __shared__ __align__(1024) std::byte tile_memory[];
  __shared__ attend_plan_memory<Tile::threads> plan;
  __shared__ attend_row_facts facts;
  launch_dependents();
  device_block block;
  find_range(launch, plan, block);
  const attend_cut end = plan.range.end;
  attend_cut at = plan.range.begin;
  Tile tile(launch, tile_memory, facts);
  while (at.group < end.group || (at.group == end.group && at.block <= end.block)) {
    const bool last = at.group == end.group && at.block == end.block;
    if (last && end.position == 0) break;
    const attend_parts parts = parts_of(block, plan.range, at, last);
    tile.run(block, parts, at.position, last ? end.position : block.attended);
    tile.leave();
    __syncthreads();
    finish_part(launch, tile, block, parts.count == 1 ? -1 : part_place(parts.first, parts.mine), facts);
    if (last || plan.range.parts.count > 0) break;
    __syncthreads();
    at.position = 0;
    ++at.block;
    block = launch.group_at(at.group);
    while (at.group < end.group && at.block >= launch.rows.blocks(block.slots)) {
      at.block = 0;
      if (++at.group < launch.groups()) block = launch.group_at(at.group);
    }
    block = launch.block_of(block, at.block);
  }
  wait_for_previous_kernel();  // with nothing to do too: who waits for this kernel waits for all before it
}

template <>
struct attend_impl<cuda> {
  static std::size_t workspace_bytes(const context<cuda>& ctx, const attend_shape& shape) {
    attend_exchange exchange;
    const auto positive = [](std::int32_t n) { return static_cast<std::size_t>((std::max)(n, 0)); };
    return exchange.lay_out(nullptr, shares(ctx), positive(shape.slots) * positive(shape.q_heads),
                            (std::max)(shape.head_dim, 0));
  }

  /// \param behind_append  the call before on the context was an append of the slots to args.kv, which may have rotated
  ///                       q: what does not depend on it begins before it ends
  template <storage T>
  static void run(context<cuda>& ctx, const attend_args<T, cuda>& args, bool behind_append = false) {
    if (args.q.extent(0) == 0 || args.kv_lens.extent(0) == 0) return;
    attend_launch<T> launch{.args = args, .scale = args.scale, .behind_append = behind_append};
    if (launch.scale == 0.0f) launch.scale = 1.0f / std::sqrt(static_cast<float>(args.kv.head_dim));
    if constexpr (tensor_storage<multiplied<T>>) {
      if (aligned(args) && run_with_columns(ctx, launch)) return;
    }
    expects(start<plain_tile<T>>(ctx, launch), "attend: head_dim ", args.kv.head_dim, " needs ",
            plain_tile<T>::shared_bytes(2, args.kv.head_dim),
            " bytes of shared memory and some for its plan, a CTA has ", ctx.block_shared_bytes());
  }

  static void keep_queries(const context<cuda>& ctx, const view<const float, 3, cuda>& q,
                           const view<float, 3, cuda>& to) {
    const dim3 grid(static_cast<unsigned>(q.extent(0)), static_cast<unsigned>(q.extent(1)));
    start_kernel(ctx, keep_queries_kernel, grid, keep_queries_threads, keep_queries_launch{q, to}, "attend");
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
  static bool run_with_columns(context<cuda>& ctx, attend_launch<T>& launch) {
    const attend_args<T, cuda>& a = launch.args;
    const std::ptrdiff_t slots = (a.q.extent(0) + a.kv_lens.extent(0) - 1) / a.kv_lens.extent(0);
    const std::ptrdiff_t columns = (slots * (a.q.extent(1) / a.kv.kv_heads) + 7) / 8;
    if (columns == 1) return run_with_head_dim<1>(ctx, launch);
    if (columns == 2 || a.kv.head_dim > 128) return run_with_head_dim<2>(ctx, launch);
    if (columns == 3) return run_with_head_dim<3>(ctx, launch);
    return run_with_head_dim<4>(ctx, launch);
  }
  template <int Columns, storage T>
  static bool run_with_head_dim(context<cuda>& ctx, attend_launch<T>& launch) {
    const std::int32_t head_dim = launch.args.kv.head_dim;
    if (head_dim <= 32) return start<tensor_tile<T, 32, Columns>>(ctx, launch);
    if (head_dim <= 64) return start<tensor_tile<T, 64, Columns>>(ctx, launch);
    if (head_dim <= 128) return start<tensor_tile<T, 128, Columns>>(ctx, launch);
    if constexpr (Columns <= 2) return start<tensor_tile<T, 256, Columns>>(ctx, launch);
    return false;
  }

  /// Starts the pass; false when a CTA has too little shared memory for it.
  template <class Tile, storage T>
  static bool start(context<cuda>& ctx, attend_launch<T>& launch) {
    const attend_args<T, cuda>& args = launch.args;
    launch.rows = row_division(static_cast<std::int32_t>(args.q.extent(1)) / args.kv.kv_heads, Tile::rows);
    launch.stages = Tile::most_stages;
    const auto shared = [&] { return Tile::shared_bytes(launch.stages, args.kv.head_dim); };
    const auto most = static_cast<std::size_t>(ctx.block_shared_bytes()) -
                      static_shared_bytes(sizeof(attend_plan_memory<Tile::threads>) + sizeof(attend_row_facts));
    while (launch.stages > 2 && shared() > most) --launch.stages;
    if (shared() > most) return false;
    const attend_shape shape{.slots = static_cast<std::int32_t>(args.q.extent(0)),
                             .q_heads = static_cast<std::int32_t>(args.q.extent(1)),
                             .head_dim = args.kv.head_dim};
    std::byte* workspace = ctx.workspace(workspace_bytes(ctx, shape), "attend");
    launch.exchange.lay_out(workspace, shares(ctx), static_cast<std::size_t>(args.q.extent(0) * args.q.extent(1)),
                            args.kv.head_dim);
    const dim3 grid(static_cast<unsigned>(shares(ctx)));
    queue_kernel(
        ctx, attend_kernel<T, Tile>,
        {.grid = grid, .threads = Tile::threads, .shared_bytes = shared(), .most_shared_bytes = most, .early = true},
        "attend", launch);
    start_kernel_early(ctx, attend_merge_kernel<T>, dim3(merging_ctas(launch)), attend_merge_threads, launch,
                       "attend");
    if (!args.recording.weights.empty()) finish_recording(ctx, args, launch.exchange);
    return true;
  }

  template <storage T>
  static void finish_recording(const context<cuda>& ctx, const attend_args<T, cuda>& args,
                               const attend_exchange& exchange) {
    const auto& weights = args.recording.weights;
    const bool newest = args.recording.slots == record_slots::newest;
    const attend_recording_launch launch{weights, args.slot_offsets, exchange.finished, newest};
    const std::ptrdiff_t rows = (newest ? args.kv_lens.extent(0) : args.q.extent(0)) * args.q.extent(1);
    const std::ptrdiff_t chunks = (weights.extent(2) + attend_recording_chunk - 1) / attend_recording_chunk;
    const std::ptrdiff_t enough = 16 * std::ptrdiff_t{ctx.multiprocessors()} / rows + 1;
    const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>((std::min)(chunks, enough)));
    start_kernel_early(ctx, attend_recording_kernel<>, grid, attend_recording_threads, launch, "attend");
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
