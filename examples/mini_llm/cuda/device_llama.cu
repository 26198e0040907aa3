#include "device_llama.cuh"

#include <utility>
#include <vector>

#include "model/row_math.hpp"
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
  const std::vector<float> rounded(frequencies.begin(), frequencies.end());
  frequencies_ = buffer<float, device>(rounded.size());
  specattn::detail::check_cuda(
      cudaMemcpy(frequencies_.data(), rounded.data(), frequencies_.bytes(), cudaMemcpyHostToDevice), "device_llama");
  const auto room = [&](std::int64_t row) {
    return static_cast<std::size_t>(max_slots) * static_cast<std::size_t>(row);
  };
  residual_ = buffer<float, device>(room(config.hidden));
  kept_ = buffer<float, device>(room(config.hidden));
  heads_ = buffer<float, device>(room((config.q_heads + 2 * config.kv_heads) * config.head_dim));
  attended_ = buffer<float, device>(room(config.q_heads * config.head_dim));
  gate_up_ = buffer<float, device>(room(2 * config.ffn));
  rounded_ = buffer<bf16, device>(room(config.q_heads * config.head_dim));
  normed_ = buffer<bf16, device>(room(config.hidden));
  squares_ = buffer<float, device>(room(config.hidden / skinny_part));
  active_ = buffer<bf16, device>(room(config.ffn));
}

std::size_t device_llama::scratch_bytes() const {
  std::size_t sum = product_.workspace_bytes() + frequencies_.bytes();
  for (const auto* rows : {&residual_, &kept_, &heads_, &attended_, &gate_up_, &squares_}) sum += rows->bytes();
  for (const auto* rows : {&rounded_, &normed_, &active_}) sum += rows->bytes();
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
  const std::ptrdiff_t slots = batch.tokens.extent(0);
  product_.use(ctx);
  const device_view<bf16, 2> normed = normed_.shaped({slots, config_.hidden});
  embed(ctx, batch.tokens, rows_of(weights_.embedding()), norm(weights_.layer(0).attention_gain),
        residual_.shaped({slots, config_.hidden}), normed);
  input_ = {.rounded = normed};
}

void device_llama::make_queries_keys_values(context<device>& ctx, std::int32_t layer, std::ptrdiff_t slots) {
  const device_matrix& weights = weights_.layer(layer).queries_keys_values;
  multiply(ctx, input_, weights, {.sums = heads_.shaped({slots, weights.outputs})});
}

void device_llama::finish_layer(context<device>& ctx, std::int32_t layer, std::ptrdiff_t slots) {
  feed_forward(ctx, weights_.layer(layer), {.wide = attended_.shaped({slots, config_.q_heads * config_.head_dim})},
               residual_.shaped({slots, config_.hidden}), norm(weights_.layer(layer + 1).attention_gain));
}

void device_llama::finish(context<device>& ctx, device_view<const std::int32_t, 1> rows,
                          device_view<float, 2> logits) {
  const std::ptrdiff_t count = rows.extent(0), q_size = config_.q_heads * config_.head_dim;
  const device_view<bf16, 2> rounded = rounded_.shaped({count, q_size});
  const device_view<float, 2> kept = kept_.shaped({count, config_.hidden});
  gather_rows(ctx, rows, attended_.shaped({shape_.max_slots, q_size}),
              residual_.shaped({shape_.max_slots, config_.hidden}), rounded, kept);
  feed_forward(ctx, weights_.layer(shape_.layers - 1), {.rounded = rounded}, kept, norm(weights_.final_gain()));
  multiply(ctx, input_, weights_.head(), {.sums = logits});
}

void device_llama::feed_forward(context<device>& ctx, const device_layer& layer, const skinny_rows& attended,
                                device_view<float, 2> residual, device_norm next) {
  const device_view<bf16, 2> active = active_.shaped({residual.extent(0), config_.ffn});
  add_and_norm(ctx, attended, layer.output, residual, norm(layer.feed_forward_gain));
  multiply(ctx, input_, layer.gate_up, {.active = active});
  add_and_norm(ctx, {.rounded = active}, layer.down, residual, next);
}

void device_llama::add_and_norm(context<device>& ctx, const skinny_rows& rows, const device_matrix& weights,
                                device_view<float, 2> residual, device_norm next) {
  const std::ptrdiff_t count = residual.extent(0);
  const device_view<bf16, 2> normed = normed_.shaped({count, config_.hidden});
  input_ = {.rounded = normed};
  if (is_skinny(ctx, count, weights.inputs) && is_skinny(ctx, count, config_.hidden)) {
    const device_view<float, 2> squares = squares_.shaped({count, config_.hidden / skinny_part});
    input_.squares = squares;
    input_.eps = next.eps;
    return skinny_product(ctx, rows, weights, {.sums = residual, .add = true, .next = {next.gain, normed, squares}});
  }
  multiply(ctx, rows, weights, {.sums = residual, .add = true});
  rms_norm(ctx, residual, next, normed);
}

void device_llama::multiply(context<device>& ctx, const skinny_rows& rows, const device_matrix& weights,
                            const skinny_result& y) {
  const bool wide = rows.rounded.empty();
  const std::ptrdiff_t count = wide ? rows.wide.extent(0) : rows.rounded.extent(0);
  if (is_skinny(ctx, count, weights.inputs)) return skinny_product(ctx, rows, weights, y);
  device_view<const bf16, 2> x = rows.rounded;
  if (wide) {
    const device_view<bf16, 2> rounded = rounded_.shaped({count, weights.inputs});
    round_rows(ctx, rows.wide, rounded);
    x = rounded;
  }
  if (y.active.empty()) return product_(x, weights, y.sums, y.add);
  const device_view<float, 2> gate_up = gate_up_.shaped({count, weights.outputs});
  product_(x, weights, gate_up);
  silu_multiply(ctx, gate_up, y.active);
}

}  // namespace mini_llm
