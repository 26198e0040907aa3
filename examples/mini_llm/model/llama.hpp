// A model of the Llama family on the CPU. It satisfies specattn::language_model and computes in float throughout.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "linear.hpp"
#include "model_config.hpp"
#include "model_files.hpp"
#include "specattn/alignment.hpp"
#include "specattn/buffer.hpp"
#include "specattn/cpu/context.hpp"
#include "specattn/model.hpp"
#include "specattn/view.hpp"
#include "weight_store.hpp"

namespace mini_llm {

/// Weights in memory as in the files (2 bytes a weight where those are bf16 or f16), arithmetic in float. A row's
/// logits have the same bits whether it is evaluated alone, among the slots of a verify pass or in a prefill chunk,
/// with any number of threads, as far as the attention keeps that rule too.
class llama {
 public:
  /// Loads and packs the weights. `files` is not needed afterwards, and its pages are given back on the way.
  /// \param max_slots the most tokens one forward() takes
  /// \param name      for messages and the fingerprint
  /// \throws input_error for missing, mis-shaped, non-float, NaN or infinite weights, and for those it would not read
  llama(const model_config& config, const model_files& files, std::int32_t max_slots, std::string name = "model");

  /// What the constructor will allocate, known beforehand. \throws input_error as the constructor, NaN aside
  static std::size_t weight_bytes(const model_config& config, const model_files& files);
  static std::size_t scratch_bytes(const model_config& config, std::int32_t max_slots);

  /// Keys and values of a magnitude from `limit` on are refused: what stores them would make infinities of them, and
  /// wrong text of those.
  void refuse_keys_values_from(float limit) { key_value_limit_ = limit; }
  /// Makes a draft of a model whose embedding has more or fewer rows than the target's (`vocab`), which are padding:
  /// rows past `vocab` are left out, missing ones have logits of -infinity and read as no token at all.
  void show_vocab(std::int32_t vocab) { shape_.vocab = vocab; }

  std::size_t weight_bytes() const { return store_.bytes(); }
  std::size_t scratch_bytes() const { return scratch_.bytes(); }
  const specattn::model_shape& shape() const { return shape_; }
  const model_config& config() const { return config_; }
  /// Identifies the model to an alignment; `weights` is a hash of all weights.
  const specattn::model_fingerprint& fingerprint() const { return fingerprint_; }
  /// Multiply-adds of the products for one token, the LM head apart.
  std::int64_t layer_products() const;
  /// Multiply-adds of the LM head for one row.
  std::int64_t head_products() const { return weights_.head.outputs * weights_.head.inputs; }

  /// See specattn::language_model. Rows outside batch.logit_rows are not computed further than the attention of the
  /// last layer. Allocates nothing.
  /// \param logits [logit_rows, vocab], rows contiguous; may be empty when no rows are wanted
  /// \throws contract_error for tokens, positions or sizes out of range; nothing is computed then. input_error for keys
  ///         or values that are not to be had: see refuse_keys_values_from()
  template <class Attention>
  void forward(specattn::context<specattn::cpu>& ctx, const specattn::forward_batch<>& batch, Attention& attention,
               specattn::view<float, 2> logits) {
    check(batch, logits);
    const auto slots = static_cast<std::int64_t>(batch.tokens.size());
    embed(ctx, batch);
    for (std::int32_t layer = 0; layer < shape_.layers; ++layer) {
      make_queries_keys_values(ctx, layer, slots);
      if (std::isfinite(key_value_limit_)) check_keys_values(batch, layer);
      using rows = specattn::view<const float, 3>;
      attention(layer, rows(heads(slots, 0, shape_.q_heads)), rows(heads(slots, shape_.q_heads, shape_.kv_heads)),
                rows(heads(slots, shape_.q_heads + shape_.kv_heads, shape_.kv_heads)), attended(slots));
      if (layer + 1 < shape_.layers) {
        finish_layer(ctx, layer, slots);
      } else {
        keep_rows(batch.logit_rows);
        finish_layer(ctx, layer, static_cast<std::int64_t>(batch.logit_rows.size()));
      }
    }
    write_logits(ctx, static_cast<std::int64_t>(batch.logit_rows.size()), logits);
  }

 private:
  struct layer_weights {
    const float* attention_gain = nullptr;  ///< [hidden]
    packed_matrix queries_keys_values;      ///< q heads, k heads, v heads
    const float* query_bias = nullptr;      ///< [q heads * head_dim]; null, as the next two: none
    const float* key_bias = nullptr;        ///< [kv heads * head_dim]
    const float* value_bias = nullptr;      ///< [kv heads * head_dim]
    const float* query_gain = nullptr;      ///< [head_dim]; null, as the next: no norm
    const float* key_gain = nullptr;        ///< [head_dim]
    packed_matrix output;
    const float* feed_forward_gain = nullptr;  ///< [hidden]
    packed_matrix gate_up;                     ///< each panel: 32 outputs of gate, then the same 32 of up
    packed_matrix down;
  };
  struct model_weights {
    std::vector<layer_weights> layers;
    const float* final_gain = nullptr;  ///< [hidden]
    packed_matrix head;                 ///< [vocab, hidden]; also the embedding when tied
    packed_matrix embedding;            ///< no outputs when tied
  };

  /// Offsets in scratch_ and strides of the rows, in floats.
  struct scratch_plan {
    struct rows {
      std::size_t offset = 0;
      std::ptrdiff_t stride = 0;
    };
    rows residual, normed, heads, attended, active, cosines, sines;
    std::size_t size = 0;
  };

  static scratch_plan plan_scratch(const model_config& config, std::int32_t max_slots);
  static void plan_weights(const model_config& config, weight_store& store, model_weights& weights);
  static void plan_layer(const model_config& config, weight_store& store, std::int64_t layer, layer_weights& weights);

  void check(const specattn::forward_batch<>& batch, specattn::view<float, 2> logits) const;
  void embed(specattn::context<specattn::cpu>& ctx, const specattn::forward_batch<>& batch);
  void make_queries_keys_values(specattn::context<specattn::cpu>& ctx, std::int32_t layer, std::int64_t slots);
  /// What stands between a row's products and its keys and queries: biases, norms of heads, rotation.
  void finish_heads(const layer_weights& weights, std::int64_t slot);
  void check_keys_values(const specattn::forward_batch<>& batch, std::int32_t layer) const;
  void keep_rows(std::span<const std::int32_t> rows);
  void finish_layer(specattn::context<specattn::cpu>& ctx, std::int32_t layer, std::int64_t slots);
  void write_logits(specattn::context<specattn::cpu>& ctx, std::int64_t rows, specattn::view<float, 2> logits);

  float* row(const scratch_plan::rows& of, std::int64_t index) const {
    return scratch_.data() + of.offset + index * of.stride;
  }
  rows_in input(const scratch_plan::rows& of, std::int64_t count) const { return {row(of, 0), of.stride, count}; }
  specattn::view<float, 3> heads(std::int64_t slots, std::int64_t first_head, std::int64_t count) const {
    return {row(plan_.heads, 0) + first_head * shape_.head_dim,
            {slots, count, shape_.head_dim},
            {plan_.heads.stride, shape_.head_dim, 1}};
  }
  specattn::view<float, 3> attended(std::int64_t slots) const {
    return {row(plan_.attended, 0),
            {slots, shape_.q_heads, shape_.head_dim},
            {plan_.attended.stride, shape_.head_dim, 1}};
  }

  model_config config_;
  specattn::model_shape shape_;
  specattn::model_fingerprint fingerprint_;
  float key_value_limit_ = std::numeric_limits<float>::infinity();
  std::vector<double> frequencies_;  ///< [head_dim / 2]
  weight_store store_;
  model_weights weights_;
  scratch_plan plan_;
  specattn::buffer<float> scratch_;
};

}  // namespace mini_llm
