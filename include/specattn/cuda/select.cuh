// select() on the device: one launch, a cluster of CTAs for each group.
//
// A row is read once, kept in the cluster's shared memory, and chosen from by a sample; a union is such rows one after
// the other: select/resident.cuh. Rows combined in any other way, capped unions or those whose mass is asked for are read once
// too, their scores kept in shared memory. Rows too long for that, pages and the paper's bisection are swept in memory:
// select/swept.cuh. All count masses in integers, so their lists are the CPU's to the bit. Kept positions become bits,
// and lists by a scan over the words: ascending without a sort.
//
// After FlashInfer's and CUB's radix selections (their key and their one-read residency), with mass in place of counts.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../select.hpp"
#include "context.cuh"
#include "device/launch.cuh"
#include "select/plan.cuh"
#include "select/resident.cuh"
#include "select/swept.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

/// What select_row leaves: rare, so no part of its code.
template <storage T>
static __device__ __noinline__ void sweep_group(const select_launch<T>& launch, select_team& team,
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
    const select_planner planner(select_device::of(ctx));
    return static_cast<std::size_t>(groups) * planner.most_group_bytes(rows, kv_len, rule);
  }

  template <storage T>
  static void run(context<cuda>& ctx, const weight_rows<T, cuda>& from, const selection_rule& rule,
                  const selection_view<cuda>& out) {
    const std::ptrdiff_t groups = out.groups();
    const std::ptrdiff_t rows = from.weights.extent(1);
    const std::ptrdiff_t kv_len = from.weights.extent(2);
    if (groups == 0) return;
    select_launch<T> launch{from, rule, out};
    const bool cap_may_bite = rule.max_tokens < kv_len || out.capacity() < kv_len;
    const bool combined = rows > 1 && (rule.rows != combine::unite || cap_may_bite || !out.mass.empty());
    const select_planner planner(select_device::of(ctx));
    const select_plan plan = planner.plan(groups, kv_len, sizeof(T), rule, combined);
    if (plan.way == select_way::resident)
      return start(ctx, rows > 1 ? select_rows_kernel<T, true> : select_rows_kernel<T, false>, groups, plan, launch);
    if (plan.way == select_way::scored) return start(ctx, select_combined_kernel<T>, groups, plan, launch);
    launch.group_bytes = planner.group_bytes(kv_len, rule, combined);
    launch.workspace = ctx.workspace(static_cast<std::size_t>(groups) * launch.group_bytes, "select");
    start(ctx, select_groups_kernel<T>, groups, plan, launch, combined);
  }

 private:
  template <class... Arguments>
  static void start(context<cuda>& ctx, void (*kernel)(Arguments...), std::ptrdiff_t groups, const select_plan& plan,
                    const std::type_identity_t<Arguments>&... arguments) {
    expects(groups * plan.cluster <= INT32_MAX, "select: ", groups, " groups are more than one launch takes");
    queue_kernel(ctx, kernel,
                 {.grid = dim3(static_cast<unsigned>(groups * plan.cluster)),
                  .threads = select_threads,
                  .shared_bytes = plan.shared_bytes,
                  .most_shared_bytes = plan.most_shared_bytes,
                  .cluster = plan.cluster},
                 "select", arguments...);
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail
