// sample() and verify() on the device: a cluster of CTAs reads each row of logits once, into its shared memory. A second,
// tiny kernel of verify() finds each sequence's first rejected slot.
//
// Tokens, accepted counts and probabilities are the CPU's to the bit: weights are computed by the same rounded operations
// (see product()) and summed as whole numbers. They depend on a row, its sampler and its position alone.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../verify.hpp"
#include "context.cuh"
#include "device/launch.cuh"
#include "device/slots.cuh"
#include "verify/sampling.cuh"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

struct sample_launch {
  view<const float, 2, cuda> logits;
  view<const sampler_options, 1, cuda> samplers;
  view<const std::int64_t, 1, cuda> positions;
  random_use use;
  view<float, 2, cuda> probabilities;
  view<std::int32_t, 1, cuda> tokens;
  float* workspace;  // rows that shared memory does not hold
};

struct verify_launch {
  verify_args<cuda> args;
  std::int32_t* judgements;  // [slots] accepted, or the token in place of the drafted one
  float* workspace;
};

inline constexpr std::int32_t token_accepted = -2;

/// Where a CTA keeps its part of row number `row`.
template <bool Resident>
__device__ float* row_room(const sampling_team& team, float* workspace, std::ptrdiff_t row, std::ptrdiff_t vocab) {
  extern __shared__ float4 member_row[];
  if constexpr (Resident) return reinterpret_cast<float*>(member_row);
  const std::ptrdiff_t share = std::ptrdiff_t{sampling_warps} * segment_length(vocab, team.size());
  return workspace + (row * team.size() + team.rank()) * share;
}

template <bool Resident>
__global__ void __launch_bounds__(sampling_threads, 3) sample_kernel(const __grid_constant__ sample_launch args) {
  __shared__ sampling_team_memory memory;
  sampling_team team(memory);
  const std::ptrdiff_t row = blockIdx.x / static_cast<unsigned>(team.size()), vocab = args.logits.extent(1);
  const sampler_options options = args.samplers[row];
  sampled_row mine(team, row_room<Resident>(team, args.workspace, row, vocab), vocab);
  if (options.greedy()) {
    mine.read<false>(args.logits[row]);
    team.meet();
    const std::int32_t token = mine.peak();
    if (team.rank() == 0 && team.thread() == 0) args.tokens[row] = token;
    return;
  }
  mine.read<true>(args.logits[row]);
  team.meet();
  float scale = 0.0f;
  if (mine.peak() == no_token) {
    if (team.rank() == 0 && team.thread() == 0) args.tokens[row] = no_token;
  } else {
    const std::uint64_t total = mine.make_weights(options, vocab);
    const double u = uniform(options.seed, static_cast<std::uint64_t>(args.positions[row]), args.use);
    const std::int32_t token = mine.draw(u, total);
    if (token != no_token && team.lane() == 0) args.tokens[row] = token;
    scale = probability_scale(static_cast<double>(total) * 0x1p-34);
  }
  if (args.probabilities.empty()) return;
  const view<float, 1, cuda> out = args.probabilities[row];
  mine.for_each([&](std::int32_t token, float weight) { out[token] = scale > 0.0f ? product(weight, scale) : 0.0f; });
}

/// What one slot decides on its own.
template <bool Resident>
__global__ void __launch_bounds__(sampling_threads, 3) judge_kernel(const __grid_constant__ verify_launch launch) {
  __shared__ sampling_team_memory memory;
  const verify_args<cuda>& args = launch.args;
  sampling_team team(memory);
  const std::ptrdiff_t slot = blockIdx.x / static_cast<unsigned>(team.size()), vocab = args.target_logits.extent(1);
  const std::int32_t s = sequence_of(args.slot_offsets, slot);
  if (s == args.samplers.extent(0)) return team.meet();
  const sampler_options options = args.samplers[s];
  const std::int32_t begin = args.slot_offsets[s], end = args.slot_offsets[s + 1];
  const std::ptrdiff_t entry = slot - s;
  const bool last = slot + 1 >= end || entry < 0 || entry >= args.drafted.extent(0);
  const std::int32_t drafted = last ? no_token : args.drafted[entry];
  const view<const float, 1, cuda> logits = args.target_logits[slot];
  sampled_row mine(team, row_room<Resident>(team, launch.workspace, slot, vocab), vocab);
  std::int32_t* const out = launch.judgements + slot;
  const bool speaker = team.rank() == 0 && team.thread() == 0;
  if (options.greedy()) {
    mine.read<false>(logits);
    team.meet();
    const std::int32_t token = mine.peak();
    if (speaker) *out = !last && token == drafted && token != no_token ? token_accepted : token;
    return;
  }
  mine.read<true>(logits);
  team.meet();
  if (mine.peak() == no_token) {
    if (speaker) *out = no_token;
    return;
  }
  std::uint64_t total = mine.make_weights(options, vocab);
  const auto position = static_cast<std::uint64_t>(args.positions[s] + (slot - begin));
  if (!last && !args.draft_probabilities.empty()) {
    const view<const float, 1, cuda> draft = args.draft_probabilities[entry];
    const float scale = probability_scale(static_cast<double>(total) * 0x1p-34);
    if (drafted >= 0 && drafted < vocab &&
        accepts(uniform(options.seed, position, random_use::accept),
                product(mine.weight(logits[drafted], drafted), scale), draft[drafted])) {
      if (speaker) *out = token_accepted;
      return;
    }
    total = mine.leave_residual(draft, scale);
    if (total == 0) {
      mine.read<true>(logits);
      total = mine.make_weights(options, vocab);
    }
  }
  const std::int32_t token = mine.draw(uniform(options.seed, position, random_use::emit), total);
  if (token != no_token && team.lane() == 0) *out = token;
}

static __global__ void settle_kernel(const __grid_constant__ verify_launch launch) {
  const verify_args<cuda>& args = launch.args;
  const std::ptrdiff_t s = std::ptrdiff_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (s >= args.samplers.extent(0)) return;
  const std::ptrdiff_t begin = args.slot_offsets[s], end = args.slot_offsets[s + 1];
  std::ptrdiff_t slot = begin;
  while (slot < end && launch.judgements[slot] == token_accepted) ++slot;  // the last slot accepts nothing
  args.accepted[s] = static_cast<std::int32_t>(slot - begin);
  args.next_token[s] = slot < end ? launch.judgements[slot] : no_token;
}

template <>
struct verify_impl<cuda> {
  static std::size_t workspace_bytes(const context<cuda>& ctx, std::ptrdiff_t slots, std::ptrdiff_t vocab) {
    return judgement_bytes(slots) + row_bytes(ctx, slots, vocab);
  }

  static void sample(context<cuda>& ctx, view<const float, 2, cuda> logits,
                     view<const sampler_options, 1, cuda> samplers, view<const std::int64_t, 1, cuda> positions,
                     random_use use, view<float, 2, cuda> probabilities, view<std::int32_t, 1, cuda> tokens) {
    const std::ptrdiff_t rows = logits.extent(0), vocab = logits.extent(1);
    std::byte* workspace = ctx.workspace(row_bytes(ctx, rows, vocab), "sample");
    const sample_launch launch{
        logits, samplers, positions, use, probabilities, tokens, reinterpret_cast<float*>(workspace)};
    start(ctx, resident(ctx, vocab) ? sample_kernel<true> : sample_kernel<false>, rows, vocab, launch);
  }

  static void run(context<cuda>& ctx, const verify_args<cuda>& args) {
    const std::ptrdiff_t slots = args.target_logits.extent(0), vocab = args.target_logits.extent(1);
    const std::ptrdiff_t sequences = args.samplers.extent(0);
    if (sequences == 0) return;
    std::byte* workspace = ctx.workspace(workspace_bytes(ctx, slots, vocab), "verify");
    const verify_launch launch{args, reinterpret_cast<std::int32_t*>(workspace),
                               reinterpret_cast<float*>(workspace + judgement_bytes(slots))};
    start(ctx, resident(ctx, vocab) ? judge_kernel<true> : judge_kernel<false>, slots, vocab, launch);
    constexpr int threads = 128;
    start_kernel(ctx, settle_kernel, dim3(blocks_of(sequences, threads)), threads, launch, "verify");
  }

 private:
  static std::size_t judgement_bytes(std::ptrdiff_t slots) {
    return (static_cast<std::size_t>(slots) * sizeof(std::int32_t) + 63) / 64 * 64;
  }
  /// As many CTAs as leave a thread a few tokens each.
  static int cluster_for(const context<cuda>& ctx, std::ptrdiff_t vocab) {
    int cluster = 1;
    while (ctx.code_major() >= 9 && cluster < sampling_max_cluster && vocab > std::ptrdiff_t{4096} * cluster)
      cluster *= 2;
    return cluster;
  }
  /// Bytes of a CTA's part of a row.
  static std::size_t part_bytes(const context<cuda>& ctx, std::ptrdiff_t vocab) {
    return sizeof(float) * sampling_warps * static_cast<std::size_t>(segment_length(vocab, cluster_for(ctx, vocab)));
  }
  static std::size_t most_part_bytes(const context<cuda>& ctx) {
    return static_cast<std::size_t>(ctx.block_shared_bytes()) - static_shared_bytes(sizeof(sampling_team_memory));
  }
  static bool resident(const context<cuda>& ctx, std::ptrdiff_t vocab) {
    return part_bytes(ctx, vocab) <= most_part_bytes(ctx);
  }
  static std::size_t row_bytes(const context<cuda>& ctx, std::ptrdiff_t rows, std::ptrdiff_t vocab) {
    if (resident(ctx, vocab)) return 0;
    return static_cast<std::size_t>(rows) * static_cast<std::size_t>(cluster_for(ctx, vocab)) *
           part_bytes(ctx, vocab);
  }

  template <class Launch>
  static void start(context<cuda>& ctx, void (*kernel)(Launch), std::ptrdiff_t rows, std::ptrdiff_t vocab,
                    const Launch& launch) {
    if (rows == 0) return;
    const int cluster = cluster_for(ctx, vocab);
    expects(rows <= INT32_MAX / cluster, "verify: ", rows, " rows are more than one launch takes");
    const bool holds_rows = resident(ctx, vocab);
    queue_kernel(ctx, kernel,
                 {.grid = dim3(static_cast<unsigned>(rows * cluster)),
                  .threads = sampling_threads,
                  .shared_bytes = holds_rows ? part_bytes(ctx, vocab) : 0,
                  .most_shared_bytes = holds_rows ? most_part_bytes(ctx) : 0,
                  .cluster = cluster},
                 "verify", launch);
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
