// The slots of a round's passes, laid out on the device: what a captured round reads instead of host arrays.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../../buffer.hpp"
#include "../../kv_cache.hpp"
#include "../../model.hpp"
#include "../../sampling.hpp"
#include "../device/launch.cuh"
#include "../device/warp.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// What the host tells of a sequence before each round.
struct sequence_input {
  std::int32_t cache_row;
  std::int32_t text_len;      ///< the target has cached all of it but the last token
  std::int32_t draft_cached;  ///< at least text_len - 2
  std::int32_t last_but_one;  ///< the tokens at the end of the text
  std::int32_t last;
  std::int32_t fresh;   ///< 1: its first round
  std::int32_t dense;   ///< 1: the round reads everything, whatever the guide
  std::int32_t drafts;  ///< tokens that are drafted and judged
  std::int32_t steps;   ///< of the draft: one a token, and one more where the last token's attention guides, too
};

/// What the host reads of a sequence after a round.
struct sequence_output {
  std::int64_t rows_read;       ///< KV rows of the verify pass, metadata aside
  std::int64_t draft_left_out;  ///< KV rows that a step of a sparse draft does not read
  std::int32_t accepted;        ///< -1: the round is void for it, its logits hold no finite value
  std::int32_t next;
  std::int32_t dense;    ///< 1: nothing was left out
  std::int32_t drafted;  ///< tokens that were judged: all, or those before the first that could not be drawn
};

/// Device arrays of a round. What is no pointer is fixed when a round is captured, and so is how many slots its passes have:
/// as many as if all sequences drafted as far as the one that drafts most. Slots that nobody has are padding, after the
/// last sequence's.
struct round_arrays {
  std::int32_t sequences = 0;
  std::int32_t drafts = 0;  // of the sequence that drafts most
  std::int32_t steps = 0;   // of the draft: drafts, or one more
  bool listed = false;      // a sparse draft has lists, from whatever round recorded last
  bool reuse = false;       // the round reads what one before has selected, and the positions since
  const sequence_input* input = nullptr;
  const sampler_options* samplers = nullptr;
  const std::int32_t* forced =
      nullptr;  // [sequences, drafts + 1] what is drafted, accepted and emitted; null: nothing
  // [sequences]
  std::int32_t* cache_rows = nullptr;
  std::int32_t* prefix_lens = nullptr;
  std::int32_t* weighed_lens = nullptr;  // prefixes that the draft's steps are weighed over; 0: it takes none
  std::int32_t* steps_of = nullptr;      // draft steps that each takes
  std::int32_t* fresh = nullptr;
  std::int32_t* recorded_lens = nullptr;  // of the texts when lists were selected
  std::int32_t* accepted = nullptr;
  std::int32_t* next = nullptr;
  std::int64_t* text_lens = nullptr;
  std::int64_t* drawn_at = nullptr;  // of a draft step's tokens
  // the draft's pass: [2 * sequences], kv_lens [sequences], offsets [sequences + 1], logit_rows [sequences]
  std::int32_t* draft_tokens = nullptr;
  std::int32_t* draft_positions = nullptr;
  std::int32_t* draft_offsets = nullptr;
  std::int32_t* draft_lens = nullptr;
  std::int32_t* draft_logit_rows = nullptr;
  std::int32_t* asking = nullptr;   // [steps, sequences] the slot that asks in each step; -1: none
  std::int32_t* drafted = nullptr;  // [sequences, drafts]
  // the verify pass: [sequences * (drafts + 1)], offsets [sequences + 1]
  std::int32_t* tokens = nullptr;
  std::int32_t* positions = nullptr;
  std::int32_t* offsets = nullptr;
  // its judgement: drafts + 1 rows of logits for each sequence, the last ones of a shorter one alike
  std::int32_t* logit_rows = nullptr;
  std::int32_t* judged_offsets = nullptr;
  float* losses = nullptr;  // [sequences, drafts + 1] of forced tokens
  sequence_output* output = nullptr;

  SPECATTN_HD std::int32_t most_slots() const { return drafts + 1; }
};

inline constexpr int layout_threads = 128;

/// Tokens of a sequence that are judged: as many as it drafts, or those before the first that could not be drawn.
SPECATTN_HD inline std::int32_t judged_drafts(const round_arrays& r, std::int32_t s) {
  std::int32_t count = 0;
  while (count < r.input[s].drafts && r.drafted[s * r.drafts + count] >= 0) ++count;
  return count;
}

/// offsets[s] = count(0) + … + count(s - 1) for s up to `sequences`. For a whole CTA, which sees them on return.
template <class Count>
__device__ void sum_counts(std::int32_t* offsets, std::int32_t sequences, Count count) {
  if (threadIdx.x < 32) {
    const auto lane = static_cast<std::int32_t>(threadIdx.x);
    std::int32_t before = 0;
    for (std::int32_t first = 0; first < sequences; first += 32) {
      const std::int32_t s = first + lane, mine = s < sequences ? count(s) : 0;
      const std::int32_t sum = prefix_sum_over_warp(mine);
      if (s < sequences) offsets[s] = before + sum - mine;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) offsets[sequences] = before;
  }
  __syncthreads();
}

/// The verify pass's layout, but for the drafted tokens. One CTA.
static __global__ void __launch_bounds__(layout_threads) begin_round_kernel(const __grid_constant__ round_arrays r) {
  sum_counts(r.offsets, r.sequences, [&](std::int32_t s) { return r.input[s].drafts + 1; });
  const std::int32_t slots = r.most_slots();
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < r.sequences * slots; i += layout_threads) {
    const std::int32_t s = i / slots, slot = i % slots;
    const sequence_input in = r.input[s];
    r.logit_rows[i] = r.offsets[s] + (slot < in.drafts ? slot : in.drafts);
    if (slot <= in.drafts) r.positions[r.offsets[s] + slot] = in.text_len - 1 + slot;
    if (i >= r.offsets[r.sequences]) r.tokens[i] = r.positions[i] = 0;
    if (r.forced != nullptr && slot < in.drafts) r.drafted[s * r.drafts + slot] = r.forced[i];
    if (slot != 0) continue;
    r.tokens[r.offsets[s]] = in.last;
    r.judged_offsets[s] = i;
    if (s + 1 == r.sequences) r.judged_offsets[s + 1] = i + slots;
    r.cache_rows[s] = in.cache_row;
    r.prefix_lens[s] = in.text_len - 1;
    r.weighed_lens[s] = in.steps > 0 ? in.text_len - 1 : 0;
    r.steps_of[s] = in.steps;
    r.fresh[s] = in.fresh;
    r.text_lens[s] = in.text_len;
    if (!r.reuse) r.recorded_lens[s] = in.text_len;
  }
}

struct draft_step_launch {
  round_arrays round;
  std::int32_t step;
};

/// Slots of a draft step's pass: the first feeds up to two tokens a sequence.
SPECATTN_HD inline std::int32_t draft_slot_count(const round_arrays& r, std::int32_t step) {
  return step == 0 ? 2 * r.sequences : r.sequences;
}

/// A token that could not be drawn stands for 0 in the passes after it, whose tokens verify() does not take.
SPECATTN_HD inline std::int32_t token_or_zero(std::int32_t token) { return token < 0 ? 0 : token; }

/// The first step feeds what the draft has not cached yet (one token, or two after a fully accepted round); later steps
/// feed the token drafted before. A sequence without a part in a step has no slot there. One CTA.
static __global__ void __launch_bounds__(layout_threads)
    draft_step_kernel(const __grid_constant__ draft_step_launch launch) {
  const round_arrays& r = launch.round;
  const std::int32_t step = launch.step;
  sum_counts(r.draft_offsets, r.sequences, [&](std::int32_t s) {
    const sequence_input& in = r.input[s];
    return step >= in.steps ? 0 : step == 0 ? in.text_len - in.draft_cached : 1;
  });
  for (auto i = r.draft_offsets[r.sequences] + static_cast<std::int32_t>(threadIdx.x); i < draft_slot_count(r, step);
       i += layout_threads)
    r.draft_tokens[i] = r.draft_positions[i] = 0;
  for (auto s = static_cast<std::int32_t>(threadIdx.x); s < r.sequences; s += layout_threads) {
    const sequence_input in = r.input[s];
    const std::int32_t first = r.draft_offsets[s], end = r.draft_offsets[s + 1];
    const bool asks = step < in.steps;
    r.drawn_at[s] = in.text_len + step;
    r.draft_logit_rows[s] = asks ? end - 1 : 0;
    r.asking[step * r.sequences + s] = asks ? end - 1 : -1;
    r.draft_lens[s] = in.steps == 0 || step == 0 ? in.draft_cached : in.text_len - 1 + (asks ? step : in.steps);
    if (asks && step > 0) {
      r.draft_tokens[first] = token_or_zero(r.drafted[s * r.drafts + step - 1]);
      r.draft_positions[first] = in.text_len + step - 1;
    }
    if (step > 0) continue;
    for (std::int32_t at = first; at < end; ++at) {
      const std::int32_t position = in.draft_cached + at - first;
      r.draft_tokens[at] = position + 1 == in.text_len ? in.last : in.last_but_one;
      r.draft_positions[at] = position;
    }
  }
}

/// A token that is not to be judged becomes no_token: verify() takes none, and draws from the target's distribution.
static __global__ void __launch_bounds__(layout_threads) take_drafted_kernel(const __grid_constant__ round_arrays r) {
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < r.sequences * r.drafts; i += layout_threads) {
    const std::int32_t s = i / r.drafts, at = i % r.drafts;
    if (at < r.input[s].drafts) {
      r.tokens[r.offsets[s] + at + 1] = token_or_zero(r.drafted[i]);
    } else {
      r.drafted[i] = no_token;
    }
  }
}

struct undrafted_launch {
  round_arrays round;
  view<float, 3, cuda> probabilities;  // [sequences, drafts, vocab]
};

/// Nothing was drawn from the distribution of a token that is not to be judged. blockIdx.x: a drafted token.
static __global__ void __launch_bounds__(layout_threads)
    clear_undrafted_kernel(const __grid_constant__ undrafted_launch launch) {
  const auto s = static_cast<std::int32_t>(blockIdx.x) / launch.round.drafts;
  const auto i = static_cast<std::int32_t>(blockIdx.x) % launch.round.drafts;
  if (i < launch.round.input[s].drafts) return;
  const view<float, 1, cuda> row = launch.probabilities[s][i];
  for (std::ptrdiff_t v = threadIdx.x; v < row.extent(0); v += layout_threads) row[v] = 0.0f;
}

/// Owns the arrays for the largest round.
class round_memory {
 public:
  round_memory() = default;
  static std::size_t bytes(std::int32_t sequences, std::int32_t drafts) {
    const std::size_t judged = size(sequences * (drafts + 1));
    return size(sequences) * (sizeof(sequence_input) + sizeof(sampler_options) + 2 * sizeof(std::int64_t) +
                              sizeof(sequence_output)) +
           (number_count(sequences, drafts) + judged) * sizeof(std::int32_t) + judged * sizeof(float);
  }
  round_memory(std::int32_t sequences, std::int32_t drafts)
      : sequences_(sequences),
        drafts_(drafts),
        input_(size(sequences)),
        samplers_(size(sequences)),
        wide_(2 * size(sequences)),
        numbers_(number_count(sequences, drafts)),
        forced_(size(sequences * (drafts + 1))),
        losses_(size(sequences * (drafts + 1))),
        output_(size(sequences)) {}

  /// The arrays of a round of so many sequences that draft so many tokens at most, in so many steps.
  round_arrays arrays(std::int32_t sequences, std::int32_t drafts, std::int32_t steps, bool forced) const {
    round_arrays r;
    r.sequences = sequences;
    r.drafts = drafts;
    r.steps = steps;
    if (forced) r.forced = forced_.data();
    r.losses = losses_.data();
    r.input = input_.data();
    r.samplers = samplers_.data();
    r.output = output_.data();
    r.text_lens = wide_.data();
    r.drawn_at = wide_.data() + sequences_;
    std::int32_t* at = numbers_.data();
    const auto take = [&](std::int32_t count) { return std::exchange(at, at + count); };
    r.cache_rows = take(sequences_);
    r.prefix_lens = take(sequences_);
    r.weighed_lens = take(sequences_);
    r.steps_of = take(sequences_);
    r.fresh = take(sequences_);
    r.recorded_lens = take(sequences_);
    r.accepted = take(sequences_);
    r.next = take(sequences_);
    r.draft_tokens = take(2 * sequences_);
    r.draft_positions = take(2 * sequences_);
    r.draft_offsets = take(sequences_ + 1);
    r.draft_lens = take(sequences_);
    r.draft_logit_rows = take(sequences_);
    r.asking = take(sequences_ * (drafts_ + 1));
    r.drafted = take(sequences_ * drafts_);
    r.tokens = take(sequences_ * (drafts_ + 1));
    r.positions = take(sequences_ * (drafts_ + 1));
    r.offsets = take(sequences_ + 1);
    r.logit_rows = take(sequences_ * (drafts_ + 1));
    r.judged_offsets = take(sequences_ + 1);
    return r;
  }
  sequence_input* input() const { return input_.data(); }
  sampler_options* samplers() const { return samplers_.data(); }
  std::int32_t* forced() const { return forced_.data(); }

 private:
  static std::size_t size(std::int32_t count) { return static_cast<std::size_t>(count); }
  /// Of all that arrays() takes.
  static std::size_t number_count(std::int32_t sequences, std::int32_t drafts) {
    return 17 * size(sequences) + 3 + size(sequences * drafts) + 4 * size(sequences * (drafts + 1));
  }

  std::int32_t sequences_ = 0;
  std::int32_t drafts_ = 0;
  buffer<sequence_input, cuda> input_;
  buffer<sampler_options, cuda> samplers_;
  buffer<std::int64_t, cuda> wide_;
  buffer<std::int32_t, cuda> numbers_, forced_;
  buffer<float, cuda> losses_;
  buffer<sequence_output, cuda> output_;
};

/// One pass's place in the arrays.
inline pass_layout<cuda> draft_layout(const round_arrays& r) {
  return {{r.draft_offsets, {r.sequences + 1}}, {r.draft_lens, {r.sequences}}, {r.cache_rows, {r.sequences}}};
}
inline pass_layout<cuda> verify_layout(const round_arrays& r) {
  return {{r.offsets, {r.sequences + 1}}, {r.prefix_lens, {r.sequences}}, {r.cache_rows, {r.sequences}}};
}
/// In a step after the last token was drafted, no logits are wanted.
inline forward_batch<cuda> draft_slots(const round_arrays& r, std::int32_t step) {
  const std::int32_t slots = draft_slot_count(r, step);
  return {{r.draft_tokens, {slots}},
          {r.draft_positions, {slots}},
          {r.draft_logit_rows, {step < r.drafts ? r.sequences : 0}}};
}
inline forward_batch<cuda> verify_slots(const round_arrays& r) {
  const std::int32_t slots = r.sequences * r.most_slots();
  return {{r.tokens, {slots}}, {r.positions, {slots}}, {r.logit_rows, {slots}}};
}

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
