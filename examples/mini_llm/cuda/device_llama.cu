#include "device_llama.cuh"

#include <utility>
#include <vector>

#include "../row_math.hpp"
#include "specattn/error.hpp"

namespace mini_llm {
namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's
using specattn::bf16;
using specattn::buffer;
using specattn::context;
using specattn::detail::expects;

device_view<const bf16, 2> rows_of(const device_matrix& matrix) {
  return {matrix.data, {matrix.outputs, matrix.inputs}};
}

}  // namespace

device_llama::device_llama(const model_config& config, const model_files& files, std::int32_t max_slots)
    : device_llama(config, device_weights(config, files), max_slots) {}

device_llama::device_llama(const model_config& config, std::uint64_t seed, std::int32_t max_slots)
    : device_llama(config, device_weights(config, seed), max_slots) {}

device_llama::device_llama(const model_config& config, device_weights weights, std::int32_t max_slots)
    : config_(config), weights_(std::move(weights)) {
  expects(max_slots > 0, "device_llama: max_slots is ", max_slots, "; at least one is needed");
  const auto count = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
  shape_ = {count(config.layers),
            count(config.q_heads),
            count(config.kv_heads),
            count(config.head_dim),
            count(config.vocab),
            count(config.max_context),
            max_slots};
  const std::vector<double> frequencies = rope_frequencies(config.rope, config.head_dim);
  frequencies_ = buffer<double, device>(frequencies.size());
  specattn::detail::check_cuda(
      cudaMemcpy(frequencies_.data(), frequencies.data(), frequencies_.bytes(), cudaMemcpyHostToDevice),
      "device_llama");
  const auto room = [&](std::int64_t row) {
    return static_cast<std::size_t>(max_slots) * static_cast<std::size_t>(row);
  };
  residual_ = buffer<float, device>(room(config.hidden));
  kept_ = buffer<float, device>(room(config.hidden));
  heads_ = buffer<float, device>(room((config.q_heads + 2 * config.kv_heads) * config.head_dim));
  attended_ = buffer<float, device>(room(config.q_heads * config.head_dim));
  gate_up_ = buffer<float, device>(room(2 * config.ffn));
  cosines_ = buffer<float, device>(room(config.head_dim / 2));
  sines_ = buffer<float, device>(room(config.head_dim / 2));
  normed_ = buffer<bf16, device>(room(config.hidden));
  rounded_ = buffer<bf16, device>(room(config.q_heads * config.head_dim));
  active_ = buffer<bf16, device>(room(config.ffn));
}

std::size_t device_llama::scratch_bytes() const {
  std::size_t sum = product_.workspace_bytes() + frequencies_.bytes();
  for (const auto* rows : {&residual_, &kept_, &heads_, &attended_, &gate_up_, &cosines_, &sines_}) {
    sum += rows->bytes();
  }
  for (const auto* rows : {&normed_, &rounded_, &active_}) sum += rows->bytes();
  return sum;
}

void device_llama::check(const specattn::forward_batch<device>& batch, device_view<float, 2> logits) const {
  const std::ptrdiff_t slots = batch.tokens.extent(0), rows = batch.logit_rows.extent(0);
  expects(slots > 0 && slots <= shape_.max_slots, "forward: ", slots, " tokens; the model was made for 1 to ",
          shape_.max_slots, " at a time");
  expects(batch.positions.extent(0) == slots, "forward: ", batch.positions.extent(0), " positions for ", slots,
          " tokens");
  expects(rows <= shape_.max_slots, "forward: ", rows, " logit rows; the model was made for at most ",
          shape_.max_slots);
  expects(rows == 0 || (logits.extent(0) == rows && logits.extent(1) == shape_.vocab && logits.stride(1) == 1),
          "forward: logits are [", logits.extent(0), ", ", logits.extent(1), "], needed [", rows, ", ", shape_.vocab,
          "] with adjacent elements");
}

void device_llama::begin(context<device>& ctx, const specattn::forward_batch<device>& batch) {
  const std::ptrdiff_t slots = batch.tokens.extent(0), half = shape_.head_dim / 2;
  product_.use(ctx);
  embed(ctx, batch, rows_of(weights_.embedding()), norm(weights_.layer(0).attention_gain),
        frequencies_.shaped({half}), residual_.shaped({slots, config_.hidden}),
        normed_.shaped({slots, config_.hidden}), cosines_.shaped({slots, half}), sines_.shaped({slots, half}));
}

void device_llama::make_queries_keys_values(context<device>& ctx, std::int32_t layer, std::ptrdiff_t slots) {
  const device_matrix& matrix = weights_.layer(layer).queries_keys_values;
  const std::ptrdiff_t half = shape_.head_dim / 2;
  product_(normed_.shaped({slots, config_.hidden}), matrix, heads_.shaped({slots, matrix.outputs}));
  rotate(ctx, heads(slots, 0, shape_.q_heads + shape_.kv_heads), cosines_.shaped({slots, half}),
         sines_.shaped({slots, half}));
}

void device_llama::finish_layer(context<device>& ctx, std::int32_t layer, std::ptrdiff_t slots) {
  const std::ptrdiff_t q_size = config_.q_heads * config_.head_dim;
  round_rows(ctx, attended_.shaped({slots, q_size}), rounded_.shaped({slots, q_size}));
  feed_forward(ctx, weights_.layer(layer), residual_.shaped({slots, config_.hidden}),
               norm(weights_.layer(layer + 1).attention_gain));
}

void device_llama::finish(context<device>& ctx, device_view<const std::int32_t, 1> rows,
                          device_view<float, 2> logits) {
  const std::ptrdiff_t count = rows.extent(0), q_size = config_.q_heads * config_.head_dim;
  gather_rows(ctx, rows, attended_.shaped({shape_.max_slots, q_size}),
              residual_.shaped({shape_.max_slots, config_.hidden}), rounded_.shaped({count, q_size}),
              kept_.shaped({count, config_.hidden}));
  feed_forward(ctx, weights_.layer(shape_.layers - 1), kept_.shaped({count, config_.hidden}),
               norm(weights_.final_gain()));
  product_(normed_.shaped({count, config_.hidden}), weights_.head(), logits);
}

void device_llama::feed_forward(context<device>& ctx, const device_layer& layer, device_view<float, 2> residual,
                                device_norm next) {
  const std::ptrdiff_t rows = residual.extent(0), ffn = config_.ffn;
  const device_view<bf16, 2> normed = normed_.shaped({rows, config_.hidden}), active = active_.shaped({rows, ffn});
  const device_view<float, 2> gate_up = gate_up_.shaped({rows, 2 * ffn});
  product_(rounded_.shaped({rows, layer.output.inputs}), layer.output, residual, true);
  rms_norm(ctx, residual, norm(layer.feed_forward_gain), normed);
  product_(normed, layer.gate_up, gate_up);
  silu_multiply(ctx, gate_up, active);
  product_(active, layer.down, residual, true);
  rms_norm(ctx, residual, next, normed);
}

}  // namespace mini_llm
