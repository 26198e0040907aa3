// select() on the device: one launch, a cluster of CTAs for each group.
//
// A row is read once, kept in the cluster's shared memory, and chosen from by a sample; a union is such rows one after
// the other: select_row.cuh. Rows combined in any other way, capped unions or those whose mass is asked for are read once
// too, their scores kept in shared memory. Rows too long for that, pages and the paper's bisection are swept in memory:
// select_group.cuh. All count masses in integers, so their lists are the CPU's to the bit. Kept positions become bits,
// and lists by a scan over the words: ascending without a sort.
//
// After FlashInfer's and CUB's radix selections (their key and their one-read residency), with mass in place of counts.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../select.hpp"
#include "context.cuh"
#include "select_group.cuh"
#include "select_row.cuh"

namespace specattn::inline v0_1::detail {

/// What select_row leaves: rare, so no part of its code.
template <storage T>
__device__ __noinline__ void sweep_group(const select_launch<T>& launch, select_team& team,
                                         select_team_memory* memory, std::ptrdiff_t group) {
  const std::int32_t share = member_share(launch.from.weights.extent(2), team.size());
  select_scratch_view scratch;
  scratch.own = true;
  scratch.kept = reinterpret_cast<std::uint32_t*>(memory + 1);
  scratch.equal = scratch.kept + share / 32;
  select_group<T>(launch, team, group, scratch).run(group);
}

/// Lone rows and unions in shared memory; what those leave, and all else, is swept in memory.
template <storage T, bool United>
__global__ void __launch_bounds__(select_threads, 4)
    select_rows_kernel(const __grid_constant__ select_launch<T> launch) {
  __shared__ select_row_memory memory;
  extern __shared__ uint4 member_memory[];  // the keys, or what select_group needs
  auto* swept = reinterpret_cast<select_team_memory*>(member_memory);
  select_team team(*swept);
  const std::ptrdiff_t group = blockIdx.x >> team.log_size();
  auto* keys = reinterpret_cast<T*>(settled(member_memory));
  if (select_row<T, United>(launch, team, group, settled(&memory), keys).run(group)) return;
  __syncthreads();
  select_team rest = team;  // a copy, so that the team itself stays in registers
  sweep_group(launch, rest, swept, group);
}

template <storage T>
__global__ void __launch_bounds__(select_threads, 3)
    select_groups_kernel(const __grid_constant__ select_launch<T> launch, bool combined) {
  __shared__ select_team_memory memory;
  select_team team(memory);
  const std::ptrdiff_t group = blockIdx.x >> team.log_size();
  select_scratch_view scratch;
  scratch.lay_out(launch.workspace + group * static_cast<std::ptrdiff_t>(launch.group_bytes),
                  launch.from.weights.extent(2), combined, launch.rule.page_size > 1);
  select_group<T>(launch, team, group, scratch).run(group);
}

/// Rows combined position by position, each read once, with the scores in shared memory.
template <storage T>
__global__ void __launch_bounds__(select_threads, 3)
    select_combined_kernel(const __grid_constant__ select_launch<T> launch) {
  __shared__ select_team_memory memory;
  extern __shared__ uint4 member_memory[];
  select_team team(memory);
  const std::int32_t share = member_share(launch.from.weights.extent(2), team.size());
  select_scratch_view scratch;
  scratch.own = true;
  scratch.scores = reinterpret_cast<std::uint64_t*>(member_memory);
  scratch.kept = reinterpret_cast<std::uint32_t*>(scratch.scores + share);
  scratch.equal = scratch.kept + share / 32;
  const std::ptrdiff_t group = blockIdx.x >> team.log_size();
  select_group<T>(launch, team, group, scratch).run(group);
}

template <>
struct select_impl<cuda> {
  static std::size_t workspace_bytes(const context<cuda>& ctx, std::ptrdiff_t groups, std::ptrdiff_t rows,
                                     std::ptrdiff_t kv_len, const selection_rule& rule) {
    if (rows == 1 ? is_resident(ctx, kv_len, rule) : holds_scores(ctx, kv_len, rule)) return 0;
    return static_cast<std::size_t>(groups) *
           select_scratch_view{}.lay_out(nullptr, kv_len, rows > 1, rule.page_size > 1);
  }

  template <storage T>
  static void run(context<cuda>& ctx, const importance<T, cuda>& from, const selection_rule& rule,
                  const selection_view<cuda>& out) {
    const std::ptrdiff_t groups = out.groups();
    const std::ptrdiff_t rows = from.weights.extent(1);
    const std::ptrdiff_t kv_len = from.weights.extent(2);
    if (groups == 0) return;
    select_launch<T> launch{from, rule, out};
    const bool cap_may_bite = rule.max_tokens < kv_len || out.capacity() < kv_len;
    const bool combined = rows > 1 && (rule.rows != combine::unite || cap_may_bite || !out.mass.empty());
    if (!combined && is_resident(ctx, kv_len, rule)) {
      const std::int32_t most = most_share * 4 / static_cast<std::int32_t>(sizeof(T));
      const int cluster = cluster_for(ctx, groups, kv_len, most);
      return start(ctx, rows > 1 ? select_rows_kernel<T, true> : select_rows_kernel<T, false>, groups, cluster,
                   shared_bytes(member_share(kv_len, cluster), sizeof(T)), launch);
    }
    if (combined && holds_scores(ctx, kv_len, rule)) {
      const int cluster = cluster_for_scores(ctx, groups, kv_len);
      const auto share = static_cast<std::size_t>(member_share(kv_len, cluster));
      return start(ctx, select_combined_kernel<T>, groups, cluster, share * sizeof(std::uint64_t) + share / 4,
                   launch);
    }
    launch.group_bytes = select_scratch_view{}.lay_out(nullptr, kv_len, combined, rule.page_size > 1);
    launch.workspace = ctx.workspace(static_cast<std::size_t>(groups) * launch.group_bytes, "select");
    int cluster = 1;
    while (cluster < largest_cluster(ctx) && groups * cluster * 2 <= std::ptrdiff_t{3} * ctx.multiprocessors())
      cluster *= 2;
    start(ctx, select_groups_kernel<T>, groups, cluster, 0, launch, combined);
  }

 private:
  /// A CTA's share of a row: so large that a Hopper multiprocessor holds three CTAs, or that one fits elsewhere.
  static constexpr std::int32_t most_share = 16384;  ///< of floats; twice as many of 16 bits
  static_assert(2 * most_share == row_most_share);
  static std::size_t shared_bytes(std::int32_t share, std::size_t weight_bytes) {
    const std::size_t keys = static_cast<std::size_t>(share) * weight_bytes;
    const std::size_t search =
        sizeof(select_team_memory) + static_cast<std::size_t>(share) / 4;  // two bits a position
    return keys > search ? keys : search;
  }

  static int largest_cluster(const context<cuda>& ctx) { return ctx.code_major() >= 9 ? select_max_cluster : 1; }
  static bool is_resident(const context<cuda>& ctx, std::ptrdiff_t kv_len, const selection_rule& rule) {
    return rule.page_size == 1 && rule.method == threshold_method::exact &&
           kv_len <= std::ptrdiff_t{largest_cluster(ctx)} * most_share;
  }

  /// Scores of a CTA: three fit a Hopper multiprocessor.
  static constexpr std::int32_t most_scores = 4096;
  static bool holds_scores(const context<cuda>& ctx, std::ptrdiff_t kv_len, const selection_rule& rule) {
    const std::int32_t most = ctx.code_major() >= 9 ? 2 * most_scores : most_scores;
    static_assert(2 * most_scores <= held_row<float>::most);
    return rule.page_size == 1 && kv_len <= std::ptrdiff_t{largest_cluster(ctx)} * most;
  }
  static int cluster_for_scores(const context<cuda>& ctx, std::ptrdiff_t groups, std::ptrdiff_t kv_len) {
    int cluster = 1;
    while (cluster < largest_cluster(ctx) && (kv_len > std::ptrdiff_t{cluster} * most_scores ||
                                              groups * cluster * 2 <= std::ptrdiff_t{3} * ctx.multiprocessors()))
      cluster *= 2;
    return cluster;
  }

  /// Three CTAs of a full share fit a Hopper multiprocessor, of half a share four.
  static std::ptrdiff_t ctas_at_once(const context<cuda>& ctx, std::int32_t share, std::int32_t most) {
    return std::ptrdiff_t{share > most / 2 ? 3 : 4} * ctx.multiprocessors();
  }

  /// The cluster that should take the least time, the smallest of several: a multiprocessor takes as long for a CTA as
  /// for its share and 2304 more positions, and a wave of CTAs does not end before a lone one would, which takes as long
  /// as for 16384 more. (Fitted to an H100.)
  static int cluster_for(const context<cuda>& ctx, std::ptrdiff_t groups, std::ptrdiff_t kv_len, std::int32_t most) {
    int best = 0;
    std::ptrdiff_t least = 0;
    for (int cluster = 1; cluster <= largest_cluster(ctx); cluster *= 2) {
      const std::int32_t share = member_share(kv_len, cluster);
      if (share > most) continue;
      const std::ptrdiff_t positions = share > 8192 ? share : 8192;  // fewer pay for no larger cluster
      const std::ptrdiff_t each = (groups * cluster + ctx.multiprocessors() - 1) / ctx.multiprocessors();
      const std::ptrdiff_t waves = (groups * cluster - 1) / ctas_at_once(ctx, share, most) + 1;
      const std::ptrdiff_t time = each * (2304 + positions) + waves * (16384 + positions);
      if (best != 0 && time >= least) continue;
      best = cluster;
      least = time;
    }
    return best;
  }

  template <class... Arguments>
  static void start(context<cuda>& ctx, void (*kernel)(Arguments...), std::ptrdiff_t groups, int cluster,
                    std::size_t shared_bytes, std::type_identity_t<Arguments>... arguments) {
    const std::ptrdiff_t blocks = groups * cluster;
    expects(blocks <= INT32_MAX, "select: ", groups, " groups are more than one launch takes");
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
    config.numAttrs = ctx.code_major() >= 9 ? 1 : 0;
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "select");
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "select");
  }
};

}  // namespace specattn::inline v0_1::detail
