// draft_guide on the device: everything is queued, nothing is read back, and a captured round follows its lengths.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../draft_guide.hpp"
#include "context.cuh"
#include "device/launch.cuh"
#include "guide.cuh"
#include "importance.cuh"
#include "select.cuh"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

namespace detail {

inline constexpr int guide_threads = 256;

/// The length of every group's prefix. A sequence that is new in its cache row loses the history found there.
struct group_lengths_launch {
  view<const std::int32_t, 1, cuda> kv_lens, fresh;  // [sequences]
  std::int32_t layers, kv_heads;
  std::int32_t* lengths;         // [layers, sequences, kv_heads]
  std::int32_t* history_counts;  // [cache rows, groups]; null: no history
  view<const std::int32_t, 1, cuda> cache_rows;
};

static __global__ void __launch_bounds__(guide_threads)
    group_lengths_kernel(const __grid_constant__ group_lengths_launch launch) {
  const auto sequences = static_cast<std::int32_t>(launch.kv_lens.extent(0));
  const std::int32_t a_layer = sequences * launch.kv_heads;
  const auto i = static_cast<std::int32_t>(blockIdx.x * guide_threads + threadIdx.x);
  if (i >= launch.layers * a_layer) return;
  const std::int32_t layer = i / a_layer, s = i % a_layer / launch.kv_heads, head = i % launch.kv_heads;
  launch.lengths[i] = launch.kv_lens[s];
  if (launch.history_counts == nullptr || launch.fresh[s] == 0) return;
  const std::ptrdiff_t groups = std::ptrdiff_t{launch.layers} * launch.kv_heads;
  launch.history_counts[launch.cache_rows[s] * groups + layer * launch.kv_heads + head] = 0;
}

/// The mean over a round's emitted slots and a group's heads of what they attended to, for the next round.
struct history_launch {
  view<const float, 4, cuda> weights;  // [layers, slots, q_heads, capacity]
  selection_view<cuda> kept;
  view<const std::int32_t, 1, cuda> kv_lens, accepted, cache_rows, slot_offsets;
  std::int32_t kv_heads;
  float* out_weights;  // [cache rows, groups, capacity]
  std::int32_t* out_positions;
  std::int32_t* out_counts;
  std::ptrdiff_t capacity;
};

/// A CTA takes a (sequence, layer, kv head), sequences slowest.
static __global__ void __launch_bounds__(guide_threads)
    remember_kernel(const __grid_constant__ history_launch launch) {
  const auto sequences = static_cast<std::int32_t>(launch.kv_lens.extent(0));
  const std::int32_t groups = static_cast<std::int32_t>(gridDim.x) / sequences;
  const std::int32_t s = static_cast<std::int32_t>(blockIdx.x) / groups;
  const std::int32_t group = static_cast<std::int32_t>(blockIdx.x) % groups;
  const std::int32_t layer = group / launch.kv_heads, head = group % launch.kv_heads;
  const std::int32_t kv_len = launch.kv_lens[s], used = launch.accepted[s] + 1;
  if (used == 0) return;  // the sequence's round is void
  const std::ptrdiff_t list = (std::ptrdiff_t{layer} * sequences + s) * launch.kv_heads + head;
  const std::int32_t count = launch.kept.counts[list];
  const std::int32_t attended = count == keep_all ? kv_len : count;
  const auto heads = static_cast<std::int32_t>(launch.weights.extent(2)) / launch.kv_heads;
  const std::ptrdiff_t row = std::ptrdiff_t{launch.cache_rows[s]} * groups + group;
  const std::int32_t first = launch.slot_offsets[s];
  const float share = 1.0f / static_cast<float>(used * heads);
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < attended + used; i += guide_threads) {
    float sum = 0.0f;
    for (std::int32_t j = i < attended ? 0 : i - attended; j < used; ++j) {
      for (std::int32_t q = 0; q < heads; ++q) sum += launch.weights(layer, first + j, head * heads + q, i);
    }
    launch.out_weights[row * launch.capacity + i] = sum * share;
    if (count != keep_all) {
      launch.out_positions[row * launch.capacity + i] =
          i < count ? launch.kept.positions(list, i) : kv_len + i - count;
    }
  }
  if (threadIdx.x == 0) launch.out_counts[row] = count == keep_all ? keep_all : count + used;
}

}  // namespace detail

/// See draft_guide. With a rule that unites, each recorded step is selected from; any other averages them first.
/// History costs a recording of every slot of the verify pass.
template <>
class draft_guide<cuda> : public detail::draft_guide_base<draft_guide<cuda>, cuda> {
  using base = detail::draft_guide_base<draft_guide<cuda>, cuda>;

 public:
  using base::after_verify;
  using base::before_verify;

  draft_guide() = default;
  /// Uploads the mixture, waiting for the device. \throws contract_error when the alignment is inconsistent
  draft_guide(const alignment& from, const selection_rule& rule) : base(from, rule) {}

  template <storage T>
  void before_verify(context<cuda>& ctx, round_state<T, cuda>& round, memory& m) {
    const std::int32_t sequences = round.sequences();
    const std::ptrdiff_t lists = std::ptrdiff_t{groups_} * sequences;
    const std::ptrdiff_t steps = m.max_rows > 1 ? round.draft_weights.extent(0) : 1;
    find_lengths(ctx, round, m);
    const view<fp16, 3, cuda> out(m.importance.data(), {lists, steps, round.max_kv_len});
    weigh(ctx, round, out, m);
    weight_rows<fp16, cuda> from;
    from.weights = out;
    from.kv_lens = m.lengths.shaped({lists});
    select(ctx, from, rule_for(steps), round.kept);
  }

  template <storage T>
  void after_verify(context<cuda>& ctx, round_state<T, cuda>& round, memory& m) {
    if (!mixture_.signals.history) return;
    const detail::history_launch launch{round.target_weights,
                                        round.kept,
                                        round.kv_lens,
                                        round.accepted,
                                        round.rows,
                                        round.slot_offsets,
                                        round.kv_heads,
                                        m.history_weights.data(),
                                        m.history_positions.data(),
                                        m.history_counts.data(),
                                        m.max_positions};
    const dim3 grid(detail::blocks_of(std::ptrdiff_t{groups_} * round.sequences(), 1));
    detail::start_kernel(ctx, detail::remember_kernel, grid, detail::guide_threads, launch, "draft_guide");
  }

 private:
  template <storage T>
  void find_lengths(context<cuda>& ctx, const round_state<T, cuda>& round, memory& m) {
    const detail::group_lengths_launch launch{round.kv_lens,  round.fresh,      round.layers,
                                              round.kv_heads, m.lengths.data(), m.history_counts.data(),
                                              round.rows};
    const std::ptrdiff_t lists = std::ptrdiff_t{groups_} * round.sequences();
    const dim3 grid(static_cast<unsigned>((lists - 1) / detail::guide_threads + 1));
    detail::start_kernel(ctx, detail::group_lengths_kernel, grid, detail::guide_threads, launch, "draft_guide");
  }

  template <storage T>
  void weigh(context<cuda>& ctx, const round_state<T, cuda>& round, view<fp16, 3, cuda> out, memory& m) {
    importance_args<cuda, fp16, fp16> args;
    args.draft_weights = round.draft_weights;
    args.masses = round.draft_masses;
    args.history = history_of(m, round.rows);
    args.steps = round.draft_steps;
    args.kv_len = round.max_kv_len;
    args.length = round.kv_lens;
    args.separate_steps = out.extent(1) > 1;
    args.out = {out.data(), {target_layers_, round.sequences(), target_kv_heads_, out.extent(1), out.extent(2)}};
    mix_importance(ctx, mixture_, args);
  }
};

}  // namespace specattn::inline SPECATTN_CODE

#include "../words_end.hpp"
