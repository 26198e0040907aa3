// The memory of a decoding loop: sequences and the arrays of one round, all allocated once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "buffer.hpp"
#include "decode_options.hpp"
#include "error.hpp"
#include "kv_cache.hpp"
#include "model.hpp"
#include "selection.hpp"
#include "view.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// One running text. The target has cached everything but its last token; the draft may lack the last two.
struct sequence_state {
  bool active = false;
  bool waiting = false;      ///< its prompt is not cached yet
  std::uint64_t ticket = 0;  ///< of the text that the row holds: ascending, in the order they came
  std::vector<std::int32_t> text;
  std::vector<std::int32_t> stop_tokens;
  std::int32_t prompt_length = 0;
  std::int32_t max_new_tokens = 0;
  std::int32_t draft_length = 0;
  std::int32_t exact_length = 0;  ///< leading target rows that dense passes over dense rows computed
  std::int32_t rounds_since_refresh = 0;
  bool refreshed = false;  ///< since the last round that stands
  bool fresh = true;       ///< no guided round yet: what is remembered of its row is of another text
  sampler_options sampler;
  finish_reason finish = finish_reason::running;
  decode_counts counts;
};

/// A part of a prefill pass: a row's text is cached up to position `to`.
struct prefill_part {
  std::int32_t row;
  std::span<const std::int32_t> text;
  std::int32_t to;
};

/// Every size a decoder derives from its options and models, in one place, so that what is announced is what is
/// allocated.
struct decode_sizes {
  decode_sizes() = default;
  /// \param replays a refresh takes slots of the verify pass
  decode_sizes(const model_shape& target, const model_shape& draft, const decode_options& options, bool replays) {
    sequences = options.max_sequences;
    positions = options.max_positions > 0 ? options.max_positions : target.max_positions;
    const std::int64_t slots = std::int64_t{sequences} * (std::int64_t{options.draft_length} + 1);
    judged = bounded(static_cast<double>(slots));
    verify_slots = bounded(static_cast<double>(slots) * (replays ? 1.0 + options.refresh_every : 1.0));
    const std::int32_t asked = options.draft_length == 0 ? 0 : options.draft_length + 1;
    steps = options.record_steps == 0 ? asked : (std::min)(options.record_steps, asked);
    target_cache = {.sequences = sequences,
                    .layers = target.layers,
                    .kv_heads = target.kv_heads,
                    .head_dim = target.head_dim,
                    .max_positions = positions,
                    .page_size = options.page_size};
    draft_cache = {.sequences = sequences,
                   .layers = draft.layers,
                   .kv_heads = draft.kv_heads,
                   .head_dim = draft.head_dim,
                   .max_positions = (std::min)(positions, draft.max_positions),
                   .page_size = options.page_size};
    target_groups = std::ptrdiff_t{target.layers} * sequences * target.kv_heads;
    draft_groups = std::ptrdiff_t{draft.layers} * sequences * draft.kv_heads;
    recorded_rows = options.sparse_draft ? (std::min)(steps, 1) : steps;
    recording_capacity = (std::ptrdiff_t{positions} + 63) / 64 * 64;
    const std::size_t heads = std::size_t(draft.layers) * std::size_t(sequences) * std::size_t(draft.q_heads);
    draft_weights = std::size_t(recorded_rows) * heads * std::size_t(recording_capacity);
    draft_queries = 2 * std::size_t(steps) * heads;
    target_weights = std::size_t(target.layers) * std::size_t(verify_slots) * std::size_t(target.q_heads) *
                     std::size_t(recording_capacity);
  }

  /// A product of options, which check_decode() refuses long before it reaches the bound.
  static std::int32_t bounded(double product) {
    return static_cast<std::int32_t>((std::clamp)(product, 0.0, 2147483647.0));
  }

  std::int32_t sequences = 0;
  std::int32_t positions = 0;
  std::int32_t judged = 0;         ///< slots whose logits are wanted
  std::int32_t verify_slots = 0;   ///< with replayed ones
  std::int32_t steps = 0;          ///< draft steps that guide a round
  std::int32_t recorded_rows = 0;  ///< sets of weights they leave: one each, or their mean when the draft is sparse
  kv_cache_shape target_cache, draft_cache;
  std::ptrdiff_t target_groups = 0;
  std::ptrdiff_t draft_groups = 0;
  std::ptrdiff_t recording_capacity = 0;  ///< entries of a recorded row: positions, up to whole cache lines
  std::size_t draft_weights = 0;          ///< numbers
  std::size_t draft_queries = 0;          ///< that recorded steps ask, two slots a sequence in each layer
  std::size_t target_weights = 0;         ///< floats
};

/// Makes a member that is a buffer; and the bytes of its elements. Parts of a decoder list their buffers once, for both.
template <class Owner, class T, backend B>
void allocate(Owner& owner, buffer<T, B> Owner::*array, std::size_t count) {
  owner.*array = buffer<T, B>(count);
}
template <class Owner, class T, backend B>
constexpr std::size_t element_bytes(buffer<T, B> Owner::*) {
  return sizeof(T);
}

/// What a decoder refuses, with the values.
inline void check_decode(const model_shape& target, const model_shape& draft, const decode_options& o,
                         const decode_sizes& sizes) {
  expects(o.draft_length >= 0 && o.draft_length <= max_draft_length, "decode: draft_length ", o.draft_length,
          " is outside 0 … ", max_draft_length);
  expects(draft.layers > 0 || o.draft_length == 0, "decode: draft_length ", o.draft_length, " without a draft model");
  expects(o.max_sequences >= 1, "decode: max_sequences ", o.max_sequences, " must be at least 1");
  expects(o.record_every >= 1, "decode: record_every ", o.record_every, " must be at least 1");
  expects(o.record_steps >= 0 && o.refresh_every >= 0 && o.min_context >= 0 && o.dense_layers >= 0,
          "decode: record_steps ", o.record_steps, ", refresh_every ", o.refresh_every, ", min_context ",
          o.min_context, " and dense_layers ", o.dense_layers, " must not be negative");
  expects(sizes.positions >= 1 && sizes.positions <= target.max_positions, "decode: max_positions ", sizes.positions,
          " is outside 1 … ", target.max_positions, ", the target's context");
  expects(sizes.verify_slots <= target.max_slots, "decode: a verify pass may take ", sizes.verify_slots,
          " slots (max_sequences × (draft_length + 1) × (refresh_every + 1)), the target takes ", target.max_slots);
  expects(o.prefill_chunk >= 1, "decode: prefill_chunk ", o.prefill_chunk, " must be at least 1");
  if (o.draft_length == 0) return;
  expects(draft.vocab == target.vocab, "decode: the draft's vocab is ", draft.vocab, ", the target's ", target.vocab);
  expects(draft.max_positions >= 1, "decode: the draft's context of ", draft.max_positions,
          " positions must hold at least 1");
  expects(2 * o.max_sequences <= draft.max_slots,
          "decode: a draft step needs two slots a sequence: ", 2 * o.max_sequences, ", the draft takes ",
          draft.max_slots);
}

/// The options that a decoder runs by: checked, and cut to what the models take in a pass.
/// \param replays as decode_sizes has it
inline decode_options checked_options(decode_options options, const model_shape& target, const model_shape& draft,
                                      bool replays) {
  check_decode(target, draft, options, decode_sizes(target, draft, options, replays));
  options.prefill_chunk = (std::min)(options.prefill_chunk, target.max_slots);
  if (options.draft_length > 0) options.prefill_chunk = (std::min)(options.prefill_chunk, draft.max_slots);
  return options;
}

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "words_end.hpp"
