// From a text to an alignment: both models read it, and their attention is compared.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../alignment.hpp"
#include "../attention_pass.hpp"
#include "../buffer.hpp"
#include "../error.hpp"
#include "../kv_cache.hpp"
#include "../model.hpp"
#include "../view.hpp"
#include "context.hpp"

namespace specattn::inline v0_1 {

struct calibration_options {
  std::int32_t prefill = 128;      ///< leading tokens that only fill the caches
  std::int32_t draft_length = 4;   ///< γ of the rounds imitated: blocks of γ + 1 tokens
  std::int32_t record_steps = 0;   ///< draft steps that will guide a round; 0: all γ
  std::int32_t every = 1;          ///< sample every n-th block
  std::vector<std::int32_t> windows = {16, 64, 256};  ///< recency signals
  std::int32_t sinks = 4;          ///< sink signal; 0: none
  bool history = false;            ///< the target's own previous round as a signal
};

namespace detail {

/// Reads a text block by block, dense, with every slot's weights recorded.
template <storage T, class Model>
class recorded_reader {
 public:
  recorded_reader(context<cpu>& ctx, Model& model, std::int32_t positions, std::int32_t slots)
      : ctx_(&ctx), model_(&model), shape_(model.shape()), positions_(positions),
        cache_({.sequences = 1, .layers = shape_.layers, .kv_heads = shape_.kv_heads, .head_dim = shape_.head_dim,
                .max_positions = positions}),
        weights_(static_cast<std::size_t>(shape_.layers) * static_cast<std::size_t>(slots) *
                 static_cast<std::size_t>(shape_.q_heads) * static_cast<std::size_t>(positions)) {
    ctx.reserve_workspace(attend_workspace_bytes(
        ctx, {1, (std::max)(slots, chunk), shape_.q_heads, shape_.kv_heads, shape_.head_dim, positions}));
  }

  const model_shape& shape() const { return shape_; }

  /// Reads tokens [length, length + count) of the text; weights(): [layers, count, q_heads, positions].
  view<const float, 4> read(std::span<const std::int32_t> text, std::int32_t count, bool record) {
    const std::int32_t kv_len = cache_.length(0);
    std::vector<std::int32_t> positions(static_cast<std::size_t>(count));
    for (std::int32_t i = 0; i < count; ++i) positions[static_cast<std::size_t>(i)] = kv_len + i;
    const std::int32_t offsets[2] = {0, count};
    const std::int32_t row = 0;
    cache_.reserve(0, count);
    attention_pass<T, cpu> pass(*ctx_, cache_, {view<const std::int32_t, 1>(offsets, {2}),
                                                view<const std::int32_t, 1>(&kv_len, {1}),
                                                view<const std::int32_t, 1>(&row, {1})});
    const view<float, 4> weights(weights_.data(), {shape_.layers, count, shape_.q_heads, positions_});
    if (record) pass.record(weights, record_slots::all);
    const forward_batch batch{text.subspan(static_cast<std::size_t>(kv_len), static_cast<std::size_t>(count)),
                              positions, {}};
    float no_logits = 0.0f;
    model_->forward(*ctx_, batch, pass, view<float, 2>(&no_logits, {0, shape_.vocab}));
    cache_.advance(0, count);
    return weights;
  }

  static constexpr std::int32_t chunk = 128;
  void prefill(std::span<const std::int32_t> text, std::int32_t length) {
    for (std::int32_t done = 0; done < length; done += chunk) read(text, (std::min)(chunk, length - done), false);
  }

 private:
  context<cpu>* ctx_;
  Model* model_;
  model_shape shape_;
  std::int32_t positions_;
  kv_cache<T, cpu> cache_;
  buffer<float, cpu> weights_;
};

/// Adds the prefix part of a row, scaled to unit mass times `share`.
inline void add_scaled_prefix(const float* row, std::int32_t kv_len, float share, float* out) {
  double mass = 0.0;
  for (std::int32_t i = 0; i < kv_len; ++i) mass += static_cast<double>(row[i]);
  if (mass <= 0.0) return;
  const auto scale = static_cast<float>(share / mass);
  for (std::int32_t i = 0; i < kv_len; ++i) out[i] += scale * row[i];
}

/// The mean over slots [0, slots) and heads [first, first + heads) of a layer's prefix rows.
inline void mean_prefix_row(view<const float, 4> weights, std::int32_t layer, std::int32_t slots, std::int32_t first,
                            std::int32_t heads, std::int32_t kv_len, float* out) {
  std::fill_n(out, kv_len, 0.0f);
  const float share = 1.0f / static_cast<float>(slots * heads);
  for (std::int32_t slot = 0; slot < slots; ++slot) {
    for (std::int32_t h = first; h < first + heads; ++h) {
      add_scaled_prefix(&weights(layer, slot, h, 0), kv_len, share, out);
    }
  }
}

/// The rows of one block: what the target attended to, and every signal that could have told.
struct calibration_rows {
  calibration_rows(const model_shape& target, const signal_set& signals, std::int32_t positions)
      : groups(target.layers * target.kv_heads), shared(signals.count() - (signals.history ? 1 : 0)),
        target_rows(static_cast<std::size_t>(groups) * static_cast<std::size_t>(positions)),
        signal_rows(static_cast<std::size_t>(shared) * static_cast<std::size_t>(positions)),
        history_rows(signals.history ? target_rows.size() : 0), capacity(positions) {}

  float* target_row(std::int32_t g) { return target_rows.data() + std::ptrdiff_t{g} * capacity; }
  float* signal_row(std::int32_t i) { return signal_rows.data() + std::ptrdiff_t{i} * capacity; }

  std::int32_t groups;
  std::int32_t shared;
  std::vector<float> target_rows, signal_rows, history_rows;
  std::int32_t capacity;
};

inline void fill_fixed_signals(const signal_set& signals, std::int32_t kv_len, calibration_rows& rows) {
  std::int32_t at = signals.draft_heads();
  for (std::int32_t window : signals.windows) {
    const std::int32_t length = (std::min)(window, kv_len);
    float* row = rows.signal_row(at++);
    std::fill_n(row, kv_len, 0.0f);
    std::fill_n(row + kv_len - length, length, 1.0f / static_cast<float>(length));
  }
  if (signals.sinks > 0) {
    const std::int32_t length = (std::min)(signals.sinks, kv_len);
    float* row = rows.signal_row(at);
    std::fill_n(row, kv_len, 0.0f);
    std::fill_n(row, length, 1.0f / static_cast<float>(length));
  }
}

}  // namespace detail

/// Fits an alignment on `text`: blocks of γ + 1 tokens as a round would verify them, drafts teacher-forced. The
/// target of a fit is the mean over the block's slots and the group's heads, the signals the mean over the recorded
/// draft steps; all over the prefix alone. Also fills the layer divergences and the paper's monotone map.
///
/// \param text   at least prefill + 2 blocks
/// \cost   one dense pass of both models over the text, plus samples × groups × signals × length a fit iteration;
///         holds samples × (groups + signals) × length floats
/// \throws contract_error for models whose vocabularies differ, or a text too short or over either context
template <storage T, class Target, class Draft, class Progress>
  requires language_model<Target, cpu> && language_model<Draft, cpu>
alignment calibrate(context<cpu>& ctx, Target& target_model, Draft& draft_model, std::span<const std::int32_t> text,
                    const calibration_options& options, Progress&& progress) {
  const auto length = static_cast<std::int32_t>(text.size());
  const std::int32_t slots = options.draft_length + 1;
  const std::int32_t steps = options.record_steps > 0 ? (std::min)(options.record_steps, options.draft_length)
                                                      : options.draft_length;
  const model_shape target_shape = target_model.shape();
  const model_shape draft_shape = draft_model.shape();
  detail::expects(target_shape.vocab == draft_shape.vocab, "calibrate: the draft's vocab is ", draft_shape.vocab,
                  ", the target's ", target_shape.vocab);
  detail::expects(options.draft_length >= 1 && options.every >= 1 && options.prefill >= 1, "calibrate: draft_length ",
                  options.draft_length, ", every ", options.every, " and prefill ", options.prefill,
                  " must be at least 1");
  detail::expects(length >= options.prefill + 2 * slots, "calibrate: ", length, " tokens; at least ",
                  options.prefill + 2 * slots, " are needed");
  detail::expects(length <= (std::min)(target_shape.max_positions, draft_shape.max_positions), "calibrate: ", length,
                  " tokens, the contexts are ", target_shape.max_positions, " and ", draft_shape.max_positions);

  alignment result;
  result.signals = {draft_shape.layers, draft_shape.q_heads, options.windows, options.sinks, options.history};
  detail::recorded_reader<T, Target> target(ctx, target_model, length, slots);
  detail::recorded_reader<T, Draft> draft(ctx, draft_model, length, slots);
  target.prefill(text, options.prefill);
  draft.prefill(text, options.prefill);
  detail::calibration_rows rows(target_shape, result.signals, length);
  divergence_accumulator divergence(target_shape.layers, draft_shape.layers);
  mixture_fit fit(rows.groups, rows.shared, options.history ? 1 : 0);
  std::vector<float> target_means(static_cast<std::size_t>(target_shape.layers) * static_cast<std::size_t>(length));
  std::vector<float> draft_means(static_cast<std::size_t>(draft_shape.layers) * static_cast<std::size_t>(length));
  const std::int32_t heads = target_shape.q_heads / target_shape.kv_heads;

  std::int32_t block = 0;
  for (std::int32_t kv_len = options.prefill; kv_len + slots <= length; kv_len += slots, ++block) {
    const auto target_weights = target.read(text, slots, true);
    const auto draft_weights = draft.read(text, slots, true);
    for (std::int32_t g = 0; g < rows.groups; ++g) {
      detail::mean_prefix_row(target_weights, g / target_shape.kv_heads, slots, g % target_shape.kv_heads * heads,
                              heads, kv_len, rows.target_row(g));
    }
    if (block % options.every == 0 && (block > 0 || !options.history)) {
      for (std::int32_t i = 0; i < draft_shape.layers * draft_shape.q_heads; ++i) {
        detail::mean_prefix_row(draft_weights, i / draft_shape.q_heads, steps, i % draft_shape.q_heads, 1, kv_len,
                                rows.signal_row(i));
      }
      detail::fill_fixed_signals(result.signals, kv_len, rows);
      const view<const float, 2> targets(rows.target_rows.data(), {rows.groups, kv_len}, {length, 1});
      const view<const float, 2> signals(rows.signal_rows.data(), {rows.shared, kv_len}, {length, 1});
      view<const float, 3> own;
      if (options.history) own = {rows.history_rows.data(), {rows.groups, 1, kv_len}, {length, length, 1}};
      fit.add(targets, signals, own);
      for (std::int32_t j = 0; j < target_shape.layers; ++j) {
        detail::mean_prefix_row(target_weights, j, slots, 0, target_shape.q_heads, kv_len,
                                target_means.data() + std::ptrdiff_t{j} * length);
      }
      for (std::int32_t j = 0; j < draft_shape.layers; ++j) {
        detail::mean_prefix_row(draft_weights, j, steps, 0, draft_shape.q_heads, kv_len,
                                draft_means.data() + std::ptrdiff_t{j} * length);
      }
      divergence.add(ctx, view<const float, 2>(target_means.data(), {target_shape.layers, kv_len}, {length, 1}),
                     view<const float, 2>(draft_means.data(), {draft_shape.layers, kv_len}, {length, 1}));
    }
    // The next block's history is this block's target, with nothing yet at the positions in between.
    rows.history_rows.assign(rows.history_rows.size(), 0.0f);
    if (options.history) rows.history_rows = rows.target_rows;
    for (std::int32_t g = 0; options.history && g < rows.groups; ++g) {
      float* row = rows.history_rows.data() + std::ptrdiff_t{g} * length;
      std::fill(row + kv_len, row + length, 0.0f);
    }
    progress(kv_len + slots, length);
  }

  const mixture_fit::result mixture = fit.solve(ctx);
  result.coefficients = mixture.coefficients;
  result.mixture_divergence = mixture.divergence;
  result.divergence = divergence.mean();
  result.layer_map = monotone_layer_map(
      view<const float, 2>(result.divergence.data(), {target_shape.layers, draft_shape.layers}));
  result.target = {.name = {}, .layers = target_shape.layers, .q_heads = target_shape.q_heads,
                   .kv_heads = target_shape.kv_heads, .head_dim = target_shape.head_dim,
                   .vocab = target_shape.vocab};
  result.draft = {.name = {}, .layers = draft_shape.layers, .q_heads = draft_shape.q_heads,
                  .kv_heads = draft_shape.kv_heads, .head_dim = draft_shape.head_dim, .vocab = draft_shape.vocab};
  return result;
}

}  // namespace specattn::inline v0_1
