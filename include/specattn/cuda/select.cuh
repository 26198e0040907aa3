// select() on the device: one launch, a cluster of CTAs for each group, the row in their shared memory.
//
// A CTA reads its part of a row once, coalesced, and keeps it as order keys. Every sweep over them counts
// keys into 4096 bins of one word each (shared memory has no fast 64-bit sums), bounds each bin's mass by its edges,
// and narrows to the bins that can hold the threshold while the mass above is summed exactly in registers; two or
// three sweeps find it. Kept positions become bits by ballot, lists by a scan over the words: ascending without a
// sort. Rows too long for a cluster's memory, combined rows and pages are swept in memory instead.
//
// After FlashInfer's and CUB's radix selections (their key and their one-read residency), with mass in place of
// counts and bounds in place of 64-bit atomics.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../select.hpp"
#include "context.cuh"
#include "select_group.cuh"

namespace specattn::inline v0_1::detail {

template <storage T, class Row>
__global__ void __launch_bounds__(select_threads, 2)
    select_kernel(const __grid_constant__ select_launch<T> launch, bool combined) {
  __shared__ select_team_memory memory;
  extern __shared__ std::uint32_t member_words[];  // resident rows: keys, kept, equal
  select_team team(memory);
  const std::ptrdiff_t group = blockIdx.x / static_cast<unsigned>(team.size());
  select_scratch_view scratch;
  Row row;
  if constexpr (Row::in_workspace) {
    scratch.lay_out(launch.workspace + group * static_cast<std::ptrdiff_t>(launch.group_bytes),
                    launch.from.weights.extent(2), combined, launch.rule.page_size > 1);
  } else {
    const std::int32_t share = member_share(launch.from.weights.extent(2), team.size());
    row.keys = member_words;
    scratch.kept = member_words + share;
    scratch.equal = scratch.kept + share / 32;
  }
  select_group<T, Row>(launch, team, scratch, row).run(group);
}

template <>
struct select_impl<cuda> {
  /// Positions a CTA holds: so many that a Hopper multiprocessor holds two CTAs, or that one fits elsewhere.
  static std::int32_t most_share(const context<cuda>& ctx) {
    const auto needed = static_cast<int>(sizeof(select_team_memory) + shared_bytes(16384));
    return ctx.block_shared_bytes() > needed ? 16384 : 8192;
  }
  static std::size_t shared_bytes(std::int32_t share) {  // keys, and two words of bits for 32 of them
    return static_cast<std::size_t>(share + share / 16) * sizeof(std::uint32_t);
  }

  static std::size_t workspace_bytes(const context<cuda>& ctx, std::ptrdiff_t groups, std::ptrdiff_t rows,
                                     std::ptrdiff_t kv_len, const selection_rule& rule) {
    const bool combined = rows > 1;
    const bool paged = rule.page_size > 1;
    if (!combined && !paged && kv_len <= most_resident(ctx)) return 0;
    return static_cast<std::size_t>(groups) * select_scratch_view{}.lay_out(nullptr, kv_len, combined, paged);
  }

  template <storage T>
  static void run(context<cuda>& ctx, const importance<T, cuda>& from, const selection_rule& rule,
                  const selection_view<cuda>& out) {
    const std::ptrdiff_t groups = out.groups();
    const std::ptrdiff_t rows = from.weights.extent(1);
    const std::ptrdiff_t kv_len = from.weights.extent(2);
    if (groups == 0) return;
    const bool cap_may_bite = rule.max_tokens < kv_len || out.capacity() < kv_len;
    const bool combined = rows > 1 && (rule.rows != combine::unite || cap_may_bite || !out.mass.empty());
    select_launch<T> launch{from, rule, out};
    if (combined || rule.page_size > 1 || kv_len > most_resident(ctx)) {
      launch.group_bytes = select_scratch_view{}.lay_out(nullptr, kv_len, combined, rule.page_size > 1);
      launch.workspace = ctx.workspace(static_cast<std::size_t>(groups) * launch.group_bytes, "select");
      return start<streamed_row<T>>(ctx, launch, cluster_for(ctx, groups, kv_len), 0, combined);
    }
    const int cluster = cluster_for(ctx, groups, kv_len);
    start<resident_row<T>>(ctx, launch, cluster, shared_bytes(member_share(kv_len, cluster)), false);
  }

 private:
  static int largest_cluster(const context<cuda>& ctx) { return ctx.compute_major() >= 9 ? select_max_cluster : 1; }
  /// Positions that the largest cluster holds.
  static std::ptrdiff_t most_resident(const context<cuda>& ctx) {
    return std::ptrdiff_t{largest_cluster(ctx)} * most_share(ctx);
  }

  /// The smallest cluster that holds a row, and as large a one as still runs in one wave of two CTAs a multiprocessor
  /// and leaves a thread two positions. A little room in the wave: not every multiprocessor is in a whole cluster.
  static int cluster_for(const context<cuda>& ctx, std::ptrdiff_t groups, std::ptrdiff_t kv_len) {
    int cluster = 1;
    while (cluster < largest_cluster(ctx)) {
      const bool fits = kv_len <= std::ptrdiff_t{cluster} * most_share(ctx);
      const bool another_wave = groups * cluster * 2 > 2 * ctx.multiprocessors() * 9 / 10;
      if (fits && (another_wave || kv_len < std::ptrdiff_t{cluster} * 4 * select_threads)) break;
      cluster *= 2;
    }
    return cluster;
  }

  template <class Row, storage T>
  static void start(context<cuda>& ctx, const select_launch<T>& launch, int cluster, std::size_t shared_bytes,
                    bool combined) {
    const std::ptrdiff_t blocks = launch.out.groups() * cluster;
    expects(blocks <= INT32_MAX, "select: ", launch.out.groups(), " groups are more than one launch takes");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(select_threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = ctx.stream();
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = static_cast<unsigned>(cluster);
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
    config.attrs = &size;
    config.numAttrs = ctx.compute_major() >= 9 ? 1 : 0;
    check_cuda(cudaFuncSetAttribute(select_kernel<T, Row>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "select");
    check_cuda(cudaLaunchKernelEx(&config, select_kernel<T, Row>, launch, combined), "select");
  }
};

}  // namespace specattn::inline v0_1::detail
