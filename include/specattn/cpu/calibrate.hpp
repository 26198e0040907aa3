// From texts to an alignment: both models read them, and their attention is compared.
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
#include "alignment.hpp"
#include "context.hpp"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

struct calibration_options {
  std::int32_t prefill = 128;                         ///< leading tokens of a text that only fill the caches
  std::int32_t draft_length = 4;                      ///< γ of the rounds imitated: blocks of γ + 1 tokens
  std::int32_t record_steps = 0;                      ///< draft steps that will guide a round; 0: all γ + 1
  std::int32_t every = 1;                             ///< sample every n-th block
  std::vector<std::int32_t> windows = {16, 64, 256};  ///< recency signals
  std::int32_t sinks = 4;                             ///< sink signal; 0: none
  bool history = false;                               ///< the target's own previous round as a signal
};

/// An alignment, and what the two simpler rules would have left: for reading, not for guiding.
struct calibration {
  alignment fitted;
  std::vector<float> head_divergence;   ///< [target layers, kv_heads, draft layers, draft q_heads] mean KL, nats
  std::vector<float> layer_divergence;  ///< [target layers, kv_heads, draft layers] the same to mean draft heads
  std::int64_t samples = 0;             ///< blocks compared
  std::int32_t iterations = 0;          ///< of the fit's slowest group
};

namespace detail {

/// Reads a text block by block, dense, with every slot's weights recorded.
template <storage T, class Model>
class recorded_reader {
 public:
  recorded_reader(context<cpu>& ctx, Model& model, std::int32_t positions, std::int32_t slots)
      : ctx_(&ctx),
        model_(&model),
        shape_(model.shape()),
        positions_(positions),
        chunk_((std::min)(128, shape_.max_slots)),
        cache_({.sequences = 1,
                .layers = shape_.layers,
                .kv_heads = shape_.kv_heads,
                .head_dim = shape_.head_dim,
                .max_positions = positions}),
        weights_(static_cast<std::size_t>(shape_.layers) * static_cast<std::size_t>(slots) *
                 static_cast<std::size_t>(shape_.q_heads) * static_cast<std::size_t>(positions)) {
    ctx.reserve_workspace(attend_workspace_bytes(
        ctx, {1, (std::max)(slots, chunk_), shape_.q_heads, shape_.kv_heads, shape_.head_dim, positions}));
  }

  const model_shape& shape() const { return shape_; }
  void restart() { cache_.clear(0); }

  /// Reads the next `count` tokens of the text. Returns their weights [layers, count, q_heads, positions].
  view<const float, 4> read(std::span<const std::int32_t> text, std::int32_t count, bool record) {
    const std::int32_t kv_len = cache_.length(0);
    std::vector<std::int32_t> positions(static_cast<std::size_t>(count));
    for (std::int32_t i = 0; i < count; ++i) positions[static_cast<std::size_t>(i)] = kv_len + i;
    const std::int32_t offsets[2] = {0, count};
    const std::int32_t row = 0;
    cache_.reserve(0, count);
    attention_pass<T, cpu> pass(*ctx_, cache_,
                                {view<const std::int32_t, 1>(offsets, {2}), view<const std::int32_t, 1>(&kv_len, {1}),
                                 view<const std::int32_t, 1>(&row, {1})});
    const view<float, 4> weights(weights_.data(), {shape_.layers, count, shape_.q_heads, positions_});
    if (record) pass.record(weights, record_slots::all);
    const forward_batch<> batch{
        text.subspan(static_cast<std::size_t>(kv_len), static_cast<std::size_t>(count)), positions, {}};
    float no_logits = 0.0f;
    model_->forward(*ctx_, batch, pass, view<float, 2>(&no_logits, {0, shape_.vocab}));
    cache_.advance(0, count);
    return weights;
  }

  void prefill(std::span<const std::int32_t> text, std::int32_t length) {
    for (std::int32_t done = 0; done < length; done += chunk_) read(text, (std::min)(chunk_, length - done), false);
  }

 private:
  context<cpu>* ctx_;
  Model* model_;
  model_shape shape_;
  std::int32_t positions_;
  std::int32_t chunk_;
  kv_cache<T, cpu> cache_;
  buffer<float, cpu> weights_;
};

/// Adds the first `length` entries of a row, scaled to unit mass times `share`.
inline void add_scaled(const float* row, std::int32_t length, float share, float* out) {
  double mass = 0.0;
  for (std::int32_t i = 0; i < length; ++i) mass += static_cast<double>(row[i]);
  if (mass <= 0.0) return;
  const auto scale = static_cast<float>(static_cast<double>(share) / mass);
  for (std::int32_t i = 0; i < length; ++i) out[i] += scale * row[i];
}

/// The mean over slots [0, slots) and heads [first, first + heads) of a layer's prefix rows, each of unit mass there.
inline void mean_prefix_row(view<const float, 4> weights, std::int32_t layer, std::int32_t slots, std::int32_t first,
                            std::int32_t heads, std::int32_t kv_len, float* out) {
  std::fill_n(out, kv_len, 0.0f);
  const float share = 1.0f / static_cast<float>(slots * heads);
  for (std::int32_t slot = 0; slot < slots; ++slot) {
    for (std::int32_t h = first; h < first + heads; ++h) add_scaled(&weights(layer, slot, h, 0), kv_len, share, out);
  }
}

/// The rows of one block: what the target attended to, and every signal that could have told. `stride` apart.
struct calibration_rows {
  calibration_rows(const model_shape& target, const signal_set& signals, std::int32_t positions)
      : groups(target.layers * target.kv_heads),
        shared(signals.count() - (signals.history ? 1 : 0)),
        stride(positions),
        targets(floats(groups)),
        shared_signals(floats(shared)),
        history(signals.history ? floats(groups) : 0),
        target_layers(floats(target.layers)),
        draft_layers(floats(signals.draft_layers)) {}

  std::size_t floats(std::int32_t rows) const { return static_cast<std::size_t>(rows) * std::size_t(stride); }
  float* row(const buffer<float, cpu>& of, std::int32_t index) const {
    return of.data() + std::ptrdiff_t{index} * stride;
  }
  view<const float, 2> shaped(const buffer<float, cpu>& of, std::int32_t rows, std::int32_t kv_len) const {
    return {of.data(), {rows, kv_len}, {stride, 1}};
  }

  std::int32_t groups;
  std::int32_t shared;
  std::int32_t stride;
  buffer<float, cpu> targets;         // [target layers * kv_heads] means over slots and heads
  buffer<float, cpu> shared_signals;  // [signals but history]
  buffer<float, cpu> history;         // [target layers * kv_heads]
  buffer<float, cpu> target_layers;   // [target layers] means over all heads
  buffer<float, cpu> draft_layers;    // [draft layers] means over all heads
};

/// Recency windows and sinks: uniform over their positions.
inline void fill_fixed_signals(const signal_set& signals, std::int32_t kv_len, calibration_rows& rows) {
  std::int32_t at = signals.draft_heads();
  const auto fill = [&](std::int32_t from, std::int32_t length) {
    float* row = rows.row(rows.shared_signals, at++);
    std::fill_n(row, kv_len, 0.0f);
    std::fill_n(row + from, length, 1.0f / static_cast<float>(length));
  };
  for (const std::int32_t window : signals.windows) {
    const std::int32_t length = (std::min)(window, kv_len);
    fill(kv_len - length, length);
  }
  if (signals.sinks > 0) fill(0, (std::min)(signals.sinks, kv_len));
}

}  // namespace detail

/// Compares the attention of two models over one text after another, then fits.
///
/// A text is read in blocks of γ + 1 tokens as a round would verify them, drafts teacher-forced. What a fit aims at is
/// the mean over the block's slots and the group's heads; the signals are the mean over the recorded draft steps. All
/// are taken over the prefix alone, but for history, which is what the target attended to in the block before, that
/// block's own tail included.
template <storage T, class Target, class Draft>
  requires language_model<Target, cpu> && language_model<Draft, cpu>
class calibrator {
 public:
  /// \param longest tokens of the longest text
  /// \throws contract_error for models whose vocabularies differ, or options and lengths out of range
  calibrator(context<cpu>& ctx, Target& target, Draft& draft, const calibration_options& options,
             std::int32_t longest)
      : ctx_(&ctx),
        options_((check(target.shape(), draft.shape(), options, longest), options)),
        slots_(options.draft_length + 1),
        steps_(options.record_steps > 0 ? (std::min)(options.record_steps, slots_) : slots_),
        signals_{draft.shape().layers, draft.shape().q_heads, options.windows, options.sinks, options.history},
        longest_(longest),
        target_(ctx, target, longest, slots_),
        draft_(ctx, draft, longest, slots_),
        rows_(target.shape(), signals_, longest),
        layers_(target.shape().layers, draft.shape().layers),
        groups_to_heads_(rows_.groups, signals_.draft_heads()),
        groups_to_layers_(rows_.groups, signals_.draft_layers),
        fit_(rows_.groups, rows_.shared, options.history ? 1 : 0) {}

  /// Reads a text. `progress(done, total)` is called after each block.
  /// \throws contract_error for fewer than prefill + 2 blocks of tokens, or more than `longest`
  /// \cost   one dense pass of both models, recorded; holds samples × (groups + signals) × length floats
  template <class Progress>
  void add(std::span<const std::int32_t> text, Progress&& progress) {
    const auto length = static_cast<std::int32_t>(text.size());
    detail::expects(length >= options_.prefill + 2 * slots_ && length <= longest_, "calibrate: a text of ", length,
                    " tokens; ", options_.prefill + 2 * slots_, " … ", longest_, " are needed");
    target_.restart();
    draft_.restart();
    target_.prefill(text, options_.prefill);
    draft_.prefill(text, options_.prefill);
    std::int32_t block = 0;
    for (std::int32_t kv_len = options_.prefill; kv_len + slots_ <= length; kv_len += slots_, ++block) {
      const auto target_weights = target_.read(text, slots_, true);
      const auto draft_weights = draft_.read(text, slots_, true);
      if (block % options_.every == 0 && (block > 0 || !options_.history)) {
        gather(target_weights, draft_weights, kv_len);
        add_sample(kv_len);
      }
      if (options_.history) remember(target_weights, kv_len);
      progress(kv_len + slots_, length);
    }
  }

  /// \throws contract_error before the first add()
  calibration fit() const {
    detail::expects(samples_ > 0, "calibrate: no text was added");
    const mixture_result mixture = fit_.solve(*ctx_);
    calibration result;
    alignment& fitted = result.fitted;
    fitted.signals = signals_;
    fitted.coefficients = mixture.coefficients;
    fitted.mixture_divergence = mixture.divergence;
    fitted.divergence = layers_.mean();
    fitted.layer_map = monotone_layer_map(
        view<const float, 2>(fitted.divergence.data(), {target_.shape().layers, draft_.shape().layers}));
    fitted.target = shape_of(target_.shape());
    fitted.draft = shape_of(draft_.shape());
    result.head_divergence = groups_to_heads_.mean();
    result.layer_divergence = groups_to_layers_.mean();
    result.samples = samples_;
    result.iterations = mixture.iterations;
    return result;
  }

 private:
  static void check(const model_shape& target, const model_shape& draft, const calibration_options& options,
                    std::int32_t longest) {
    detail::expects(target.vocab == draft.vocab, "calibrate: the draft's vocab is ", draft.vocab, ", the target's ",
                    target.vocab);
    detail::expects(options.draft_length >= 1 && options.every >= 1 && options.prefill >= 1 &&
                        options.record_steps >= 0 && options.sinks >= 0,
                    "calibrate: draft_length ", options.draft_length, ", every ", options.every, " and prefill ",
                    options.prefill, " must be at least 1, record_steps ", options.record_steps, " and sinks ",
                    options.sinks, " not negative");
    for (const std::int32_t window : options.windows) {
      detail::expects(window >= 1, "calibrate: a window of ", window, " positions; give at least 1");
    }
    const std::int32_t slots = (std::min)(target.max_slots, draft.max_slots);
    detail::expects(options.draft_length + 1 <= slots, "calibrate: blocks of ", options.draft_length + 1,
                    " tokens, the models take ", slots, " a pass");
    const std::int32_t context = (std::min)(target.max_positions, draft.max_positions);
    detail::expects(longest >= 1 && longest <= context, "calibrate: texts of ", longest,
                    " tokens, the models' contexts hold ", context);
  }

  static model_fingerprint shape_of(const model_shape& shape) {
    return {.name = {},
            .layers = shape.layers,
            .q_heads = shape.q_heads,
            .kv_heads = shape.kv_heads,
            .head_dim = shape.head_dim,
            .vocab = shape.vocab};
  }

  /// Fills every row of the block whose prefix is kv_len.
  void gather(view<const float, 4> target_weights, view<const float, 4> draft_weights, std::int32_t kv_len) {
    const model_shape& target = target_.shape();
    const std::int32_t heads = target.q_heads / target.kv_heads;
    ctx_->parallel_for(rows_.groups + signals_.draft_heads(), [&](std::ptrdiff_t i, int) {
      const auto g = static_cast<std::int32_t>(i);
      if (g < rows_.groups) {
        detail::mean_prefix_row(target_weights, g / target.kv_heads, slots_, g % target.kv_heads * heads, heads,
                                kv_len, rows_.row(rows_.targets, g));
      } else {
        const std::int32_t head = g - rows_.groups;
        detail::mean_prefix_row(draft_weights, head / signals_.draft_q_heads, steps_, head % signals_.draft_q_heads,
                                1, kv_len, rows_.row(rows_.shared_signals, head));
      }
    });
    detail::fill_fixed_signals(signals_, kv_len, rows_);
    mean_of_rows(rows_.targets, target.kv_heads, target.layers, kv_len, rows_.target_layers);
    mean_of_rows(rows_.shared_signals, signals_.draft_q_heads, signals_.draft_layers, kv_len, rows_.draft_layers);
  }

  /// Row j of `to` is the mean of rows j * count … j * count + count - 1 of `from`.
  void mean_of_rows(buffer<float, cpu>& from, std::int32_t count, std::int32_t rows, std::int32_t kv_len,
                    buffer<float, cpu>& to) {
    for (std::int32_t j = 0; j < rows; ++j) {
      float* out = rows_.row(to, j);
      std::fill_n(out, kv_len, 0.0f);
      for (std::int32_t i = j * count; i < (j + 1) * count; ++i) {
        detail::add_scaled(rows_.row(from, i), kv_len, 1.0f / static_cast<float>(count), out);
      }
    }
  }

  void add_sample(std::int32_t kv_len) {
    const auto targets = rows_.shaped(rows_.targets, rows_.groups, kv_len);
    const auto signals = rows_.shaped(rows_.shared_signals, rows_.shared, kv_len);
    const auto draft_layers = rows_.shaped(rows_.draft_layers, signals_.draft_layers, kv_len);
    view<const float, 3> own;
    if (options_.history) own = {rows_.history.data(), {rows_.groups, 1, kv_len}, {longest_, longest_, 1}};
    fit_.add(*ctx_, targets, signals, own);
    layers_.add(*ctx_, rows_.shaped(rows_.target_layers, target_.shape().layers, kv_len), draft_layers);
    groups_to_heads_.add(*ctx_, targets, signals.slice(0, signals_.draft_heads()));
    groups_to_layers_.add(*ctx_, targets, draft_layers);
    ++samples_;
  }

  /// The next block's history, as draft_guide keeps it: means of the whole rows, tail included.
  void remember(view<const float, 4> weights, std::int32_t kv_len) {
    const model_shape& target = target_.shape();
    const std::int32_t heads = target.q_heads / target.kv_heads;
    const float share = 1.0f / static_cast<float>(slots_ * heads);
    for (std::int32_t g = 0; g < rows_.groups; ++g) {
      float* out = rows_.row(rows_.history, g);
      std::fill_n(out, longest_, 0.0f);
      for (std::int32_t slot = 0; slot < slots_; ++slot) {
        for (std::int32_t h = g % target.kv_heads * heads; h < (g % target.kv_heads + 1) * heads; ++h) {
          const float* row = &weights(g / target.kv_heads, slot, h, 0);
          for (std::int32_t i = 0; i <= kv_len + slot; ++i) out[i] += share * row[i];
        }
      }
    }
  }

  context<cpu>* ctx_;
  calibration_options options_;
  std::int32_t slots_;
  std::int32_t steps_;
  signal_set signals_;
  std::int32_t longest_;
  detail::recorded_reader<T, Target> target_;
  detail::recorded_reader<T, Draft> draft_;
  detail::calibration_rows rows_;
  divergence_accumulator<cpu> layers_, groups_to_heads_, groups_to_layers_;
  mixture_fit<cpu> fit_;
  std::int64_t samples_ = 0;
};

/// Fits an alignment on one text. See calibrator; for several texts, or what the simpler rules leave, use that.
template <storage T, class Target, class Draft, class Progress>
  requires language_model<Target, cpu> && language_model<Draft, cpu> alignment
  calibrate(context<cpu>& ctx, Target& target, Draft& draft, std::span<const std::int32_t> text,
            const calibration_options& options, Progress&& progress) {
    calibrator<T, Target, Draft> reading(ctx, target, draft, options, static_cast<std::int32_t>(text.size()));
    reading.add(text, progress);
    return reading.fit().fitted;
  }

}  // namespace specattn::inline SPECATTN_CODE

#include "../words_end.hpp"
