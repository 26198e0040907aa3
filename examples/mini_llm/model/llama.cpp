#include "llama.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "input_error.hpp"
#include "row_math.hpp"
#include "specattn/error.hpp"
#include "unread_weights.hpp"

namespace mini_llm {
namespace {

using specattn::context;
using specattn::cpu;
using specattn::detail::expects;

constexpr std::int64_t half_panel = packed_matrix::panel_outputs / 2;

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// Calls body(row) for every row, on the caller's thread when there are too few to be worth a fork.
template <class Body>
void for_rows(context<cpu>& ctx, std::int64_t rows, const Body& body) {
  constexpr std::int64_t task_rows = 16;
  if (rows <= task_rows) {
    for (std::int64_t r = 0; r < rows; ++r) body(r);
    return;
  }
  ctx.parallel_for((rows + task_rows - 1) / task_rows, [&](std::ptrdiff_t task, int) {
    for (std::int64_t r = task * task_rows; r < std::min(rows, (task + 1) * task_rows); ++r) body(r);
  });
}

void add(float* to, const float* values, std::int64_t size) {
  for (std::int64_t i = 0; i < size; ++i) to[i] += values[i];
}

/// Adds 64 outputs to a row that is as long as the panels are.
void add_to(float* row, std::int64_t panel, const float* values) {
  add(row + panel * packed_matrix::panel_outputs, values, packed_matrix::panel_outputs);
}

}  // namespace

llama::llama(const model_config& config, const model_files& files, std::int32_t max_slots, std::string name)
    : config_(config), frequencies_(rope_frequencies(config.rope, config.head_dim)), store_(files) {
  expects(max_slots > 0, "llama: max_slots is ", max_slots, "; at least one is needed");
  const auto count = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
  shape_ = {count(config.layers),
            count(config.q_heads),
            count(config.kv_heads),
            count(config.head_dim),
            count(config.vocab),
            count(config.max_context),
            max_slots};
  plan_weights(config, store_, weights_);
  refuse_unread_weights(config, files, store_.names());
  plan_ = plan_scratch(config, max_slots);
  scratch_ = specattn::buffer<float>(plan_.size);
  store_.load();
  fingerprint_ = {std::move(name), shape_.layers, shape_.q_heads,      shape_.kv_heads,
                  shape_.head_dim, shape_.vocab,  store_.fingerprint()};
}

std::size_t llama::weight_bytes(const model_config& config, const model_files& files) {
  weight_store store(files);
  model_weights weights;
  plan_weights(config, store, weights);
  return store.bytes();
}

std::size_t llama::scratch_bytes(const model_config& config, std::int32_t max_slots) {
  return plan_scratch(config, max_slots).size * sizeof(float);
}

std::int64_t llama::layer_products() const {
  std::int64_t sum = 0;
  for (const layer_weights& w : weights_.layers) {
    for (const packed_matrix* m : {&w.queries_keys_values, &w.output, &w.gate_up, &w.down}) {
      sum += m->outputs * m->inputs;
    }
  }
  return sum;
}

void llama::plan_weights(const model_config& config, weight_store& store, model_weights& weights) {
  weights.layers.resize(static_cast<std::size_t>(config.layers));
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    plan_layer(config, store, layer, weights.layers[static_cast<std::size_t>(layer)]);
  }
  store.plan(weights.final_gain, config.hidden, "model.norm.weight");
  constexpr const char* embedding_name = "model.embed_tokens.weight";
  if (config.tie_word_embeddings) {
    store.plan(weights.head, config.vocab, config.hidden, {{embedding_name, config.vocab, {}}});
  } else {
    store.plan(weights.embedding, config.vocab, config.hidden, {{embedding_name, config.vocab, {}}});
    store.plan(weights.head, config.vocab, config.hidden, {{"lm_head.weight", config.vocab, {}}});
  }
}

void llama::plan_layer(const model_config& config, weight_store& store, std::int64_t layer, layer_weights& weights) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".";
  const std::int64_t q_size = config.q_heads * config.head_dim;
  const std::int64_t kv_size = config.kv_heads * config.head_dim;
  store.plan(weights.attention_gain, config.hidden, prefix + "input_layernorm.weight");
  store.plan(weights.queries_keys_values, q_size + 2 * kv_size, config.hidden,
             {{prefix + "self_attn.q_proj.weight", q_size, {}},
              {prefix + "self_attn.k_proj.weight", kv_size, {q_size}},
              {prefix + "self_attn.v_proj.weight", kv_size, {q_size + kv_size}}});
  if (config.query_key_value_biases) {
    store.plan(weights.query_bias, q_size, prefix + "self_attn.q_proj.bias");
    store.plan(weights.key_bias, kv_size, prefix + "self_attn.k_proj.bias");
    store.plan(weights.value_bias, kv_size, prefix + "self_attn.v_proj.bias");
  }
  if (config.query_key_norms) {
    store.plan(weights.query_gain, config.head_dim, prefix + "self_attn.q_norm.weight");
    store.plan(weights.key_gain, config.head_dim, prefix + "self_attn.k_norm.weight");
  }
  store.plan(weights.output, config.hidden, q_size, {{prefix + "self_attn.o_proj.weight", config.hidden, {}}});
  store.plan(weights.feed_forward_gain, config.hidden, prefix + "post_attention_layernorm.weight");
  constexpr std::int64_t panel = packed_matrix::panel_outputs;
  store.plan(weights.gate_up, round_up(config.ffn, half_panel) * 2, config.hidden,
             {{prefix + "mlp.gate_proj.weight", config.ffn, {0, half_panel, panel}},
              {prefix + "mlp.up_proj.weight", config.ffn, {half_panel, half_panel, panel}}});
  store.plan(weights.down, config.hidden, config.ffn, {{prefix + "mlp.down_proj.weight", config.hidden, {}}});
}

llama::scratch_plan llama::plan_scratch(const model_config& config, std::int32_t max_slots) {
  scratch_plan plan;
  const auto take = [&](std::int64_t row_size) {
    constexpr std::int64_t line = 16;  // rows begin at cache lines
    const scratch_plan::rows rows{plan.size, round_up(row_size, line)};
    plan.size += static_cast<std::size_t>(rows.stride) * static_cast<std::size_t>(max_slots);
    return rows;
  };
  // What takes whole panels has room for the outputs behind the last.
  constexpr std::int64_t panel = packed_matrix::panel_outputs;
  plan.residual = take(round_up(config.hidden, panel));
  plan.normed = take(config.hidden);
  plan.heads = take(round_up((config.q_heads + 2 * config.kv_heads) * config.head_dim, panel));
  plan.attended = take(config.q_heads * config.head_dim);
  plan.active = take(round_up(config.ffn, half_panel));
  plan.cosines = take(config.head_dim / 2);
  plan.sines = take(config.head_dim / 2);
  return plan;
}

void llama::check(const specattn::forward_batch<>& batch, specattn::view<float, 2> logits) const {
  const std::size_t slots = batch.tokens.size();
  expects(slots > 0 && slots <= static_cast<std::size_t>(shape_.max_slots), "forward: ", slots,
          " tokens; the model was made for 1 to ", shape_.max_slots, " at a time");
  expects(batch.positions.size() == slots, "forward: ", batch.positions.size(), " positions for ", slots, " tokens");
  for (std::size_t i = 0; i < slots; ++i) {
    const std::int32_t token = batch.tokens[i];
    const std::int32_t position = batch.positions[i];
    expects(token >= 0 && token < shape_.vocab, "forward: token ", token, " in slot ", i, "; the vocabulary has ",
            shape_.vocab);
    expects(position >= 0 && position < shape_.max_positions, "forward: position ", position, " in slot ", i,
            "; the context has ", shape_.max_positions);
  }
  std::int32_t before = -1;
  for (const std::int32_t wanted : batch.logit_rows) {
    expects(wanted > before && static_cast<std::size_t>(wanted) < slots, "forward: logit row ", wanted, " after ",
            before, " among ", slots, " slots; rows ascend");
    before = wanted;
  }
  const auto rows = static_cast<std::ptrdiff_t>(batch.logit_rows.size());
  expects(rows == 0 || (logits.extent(0) == rows && logits.extent(1) == shape_.vocab && logits.stride(1) == 1),
          "forward: logits are [", logits.extent(0), ", ", logits.extent(1), "], needed [", rows, ", ", shape_.vocab,
          "] with adjacent elements");
}

void llama::embed(context<cpu>& ctx, const specattn::forward_batch<>& batch) {
  const packed_matrix& embedding = weights_.embedding.outputs > 0 ? weights_.embedding : weights_.head;
  for_rows(ctx, static_cast<std::int64_t>(batch.tokens.size()), [&](std::int64_t r) {
    const auto slot = static_cast<std::size_t>(r);
    if (batch.tokens[slot] < config_.vocab) {
      embedding.read_row(batch.tokens[slot], row(plan_.residual, r));
    } else {
      std::fill_n(row(plan_.residual, r), config_.hidden, 0.0f);  // see show_vocab()
    }
    rope_angles(frequencies_, batch.positions[slot], row(plan_.cosines, r), row(plan_.sines, r),
                config_.rope.attention_factor);
    rms_norm(row(plan_.residual, r), weights_.layers.front().attention_gain, config_.rms_norm_eps, config_.hidden,
             row(plan_.normed, r));
  });
}

void llama::make_queries_keys_values(context<cpu>& ctx, std::int32_t layer, std::int64_t slots) {
  const layer_weights& weights = weights_.layers[static_cast<std::size_t>(layer)];
  product(ctx, weights.queries_keys_values, input(plan_.normed, slots),
          [&](std::int64_t r, std::int64_t panel, const float* values) {
            std::memcpy(row(plan_.heads, r) + panel * packed_matrix::panel_outputs, values,
                        packed_matrix::panel_outputs * sizeof(float));
          });
  for_rows(ctx, slots, [&](std::int64_t r) { finish_heads(weights, r); });
}

void llama::finish_heads(const layer_weights& weights, std::int64_t slot) {
  const std::int64_t dim = config_.head_dim;
  float* const queries = row(plan_.heads, slot);
  float* const keys = queries + config_.q_heads * dim;
  if (weights.query_bias != nullptr) {
    add(queries, weights.query_bias, config_.q_heads * dim);
    add(keys, weights.key_bias, config_.kv_heads * dim);
    add(keys + config_.kv_heads * dim, weights.value_bias, config_.kv_heads * dim);
  }
  for (std::int64_t head = 0; head < config_.q_heads + config_.kv_heads; ++head) {
    float* const values = queries + head * dim;
    const float* const gain = head < config_.q_heads ? weights.query_gain : weights.key_gain;
    if (gain != nullptr) rms_norm(values, gain, config_.rms_norm_eps, dim, values);
    rotate_head(values, row(plan_.cosines, slot), row(plan_.sines, slot), dim / 2);
  }
}

void llama::check_keys_values(const specattn::forward_batch<>& batch, std::int32_t layer) const {
  const std::int64_t size = 2 * config_.kv_heads * config_.head_dim;
  for (std::size_t slot = 0; slot < batch.tokens.size(); ++slot) {
    const float* const values =
        row(plan_.heads, static_cast<std::int64_t>(slot)) + config_.q_heads * config_.head_dim;
    int outside = 0;
    for (std::int64_t i = 0; i < size; ++i) outside |= static_cast<int>(!(std::abs(values[i]) < key_value_limit_));
    if (outside == 0) continue;
    float largest = 0.0f;
    for (std::int64_t i = 0; i < size; ++i) largest = std::max(largest, std::abs(values[i]));
    throw input_error(fingerprint_.name, "layer " + std::to_string(layer) + " makes a key or value of magnitude " +
                                             std::to_string(static_cast<double>(largest)) + " at position " +
                                             std::to_string(batch.positions[slot]) +
                                             ", past the range of f16 (65504); --kv bf16 (or f32) holds it");
  }
}

void llama::keep_rows(std::span<const std::int32_t> rows) {
  for (std::size_t to = 0; to < rows.size(); ++to) {
    const auto r = static_cast<std::int64_t>(to);
    if (rows[to] == r) continue;  // rows ascend: none is overwritten before it has been moved
    for (const scratch_plan::rows* part : {&plan_.residual, &plan_.attended}) {
      std::memcpy(row(*part, r), row(*part, rows[to]), static_cast<std::size_t>(part->stride) * sizeof(float));
    }
  }
}

void llama::finish_layer(context<cpu>& ctx, std::int32_t layer, std::int64_t slots) {
  const layer_weights& weights = weights_.layers[static_cast<std::size_t>(layer)];
  const bool last = layer + 1 == shape_.layers;
  const float* const next_gain =
      last ? weights_.final_gain : weights_.layers[static_cast<std::size_t>(layer) + 1].attention_gain;
  const auto add_to_residual = [&](std::int64_t r, std::int64_t panel, const float* values) {
    add_to(row(plan_.residual, r), panel, values);
  };
  const auto norm_all = [&](const float* gain) {
    for_rows(ctx, slots, [&](std::int64_t r) {
      rms_norm(row(plan_.residual, r), gain, config_.rms_norm_eps, config_.hidden, row(plan_.normed, r));
    });
  };
  product(ctx, weights.output, input(plan_.attended, slots), add_to_residual);
  norm_all(weights.feed_forward_gain);
  product(ctx, weights.gate_up, input(plan_.normed, slots),
          [&](std::int64_t r, std::int64_t panel, const float* values) {
            silu_multiply(values, values + half_panel, half_panel, row(plan_.active, r) + panel * half_panel);
          });
  product(ctx, weights.down, input(plan_.active, slots), add_to_residual);
  norm_all(next_gain);
}

void llama::write_logits(context<cpu>& ctx, std::int64_t rows, specattn::view<float, 2> logits) {
  product(ctx, weights_.head, input(plan_.normed, rows),
          [&](std::int64_t r, std::int64_t panel, const float* values) {
            const std::int64_t first = panel * packed_matrix::panel_outputs;
            const std::int64_t vocab = std::min<std::int64_t>(config_.vocab, shape_.vocab);
            const std::int64_t count = std::min(packed_matrix::panel_outputs, vocab - first);
            if (count <= 0) return;
            std::memcpy(&logits(r, first), values, static_cast<std::size_t>(count) * sizeof(float));
          });
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = config_.vocab; i < shape_.vocab; ++i) {
      logits(r, i) = -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace mini_llm
