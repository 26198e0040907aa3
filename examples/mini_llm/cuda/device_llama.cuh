// A model of the Llama family on the device. It satisfies specattn::language_model: weights and the rows that enter
// products in bf16, sums, residual, queries, keys, values and logits in float.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device_product.cuh"
#include "device_weights.cuh"
#include "model/model_config.hpp"
#include "model/model_files.hpp"
#include "row_kernels.cuh"
#include "skinny_product.cuh"
#include "specattn/buffer.hpp"
#include "specattn/cuda/context.cuh"
#include "specattn/model.hpp"
#include "specattn/rotary.hpp"

namespace mini_llm {

/// One forward() at a time: it has one set of scratch rows. Rounding to bf16 moves logits by about 1 % of their spread
/// against the CPU's; how many rows stand beside a row may move them in the last places (few rows are multiplied by
/// skinny_product(), many by cuBLAS, which picks its kernel by the shape), so two ways of decoding may part where two
/// tokens are as good as equal.
class device_llama {
 public:
  /// Loads onto the device that is current. `files` is not needed afterwards.
  /// \param max_slots the most tokens one forward() takes
  /// \throws input_error for missing, mis-shaped, non-float, NaN or infinite weights, specattn::contract_error for
  ///         sizes that are no multiples of 8, specattn::device_error
  device_llama(const model_config& config, const model_files& files, std::int32_t max_slots);
  /// With random weights, made on the device (see device_weights), for benchmarks at the shape of a real model.
  device_llama(const model_config& config, std::uint64_t seed, std::int32_t max_slots);

  const specattn::model_shape& shape() const { return shape_; }
  std::size_t weight_bytes() const { return weights_.bytes(); }
  std::size_t scratch_bytes() const;
  /// A hash of all weights: the CPU model's. 0 for random ones.
  std::uint64_t fingerprint() const { return weights_.fingerprint(); }

  /// See specattn::language_model. Everything goes on the context's stream and can be captured in a graph: what the
  /// batch's views hold is read when the work runs. Allocates nothing, waits for nothing. Without wanted rows the last
  /// layer ends with its attention.
  /// \param attention takes a rotary_view (see attention_pass), for queries and keys come to it not rotated
  /// \param logits [logit_rows, vocab], rows of adjacent elements; may be empty when no rows are wanted
  /// \pre    tokens in [0, vocab), positions in [0, max_positions), logit_rows in [0, slots) (not checked)
  /// \throws contract_error for extents that do not fit, device_error
  /// \cost   reads the weights once; 4 launches a layer besides the attention's where rows are few, 8 where they are many
  template <class Attention>
  void forward(specattn::context<specattn::cuda>& ctx, const specattn::forward_batch<specattn::cuda>& batch,
               Attention& attention, specattn::view<float, 2, specattn::cuda> logits) {
    check(batch, logits);
    const std::ptrdiff_t slots = batch.tokens.extent(0);
    begin(ctx, batch);
    for (std::int32_t layer = 0; layer < shape_.layers; ++layer) {
      make_queries_keys_values(ctx, layer, slots);
      attention(layer, heads(slots, 0, shape_.q_heads), heads(slots, shape_.q_heads, shape_.kv_heads),
                heads(slots, shape_.q_heads + shape_.kv_heads, shape_.kv_heads), attended(slots),
                specattn::rotary_view<specattn::cuda>{batch.positions, frequencies_.shaped({shape_.head_dim / 2})});
      if (layer + 1 < shape_.layers) finish_layer(ctx, layer, slots);
    }
    if (batch.logit_rows.extent(0) > 0) finish(ctx, batch.logit_rows, logits);
  }

 private:
  device_llama(const model_config& config, device_weights weights, std::int32_t max_slots);

  void check(const specattn::forward_batch<specattn::cuda>& batch, device_view<float, 2> logits) const;
  void begin(specattn::context<specattn::cuda>& ctx, const specattn::forward_batch<specattn::cuda>& batch);
  void make_queries_keys_values(specattn::context<specattn::cuda>& ctx, std::int32_t layer, std::ptrdiff_t slots);
  /// From the attention's output to the next layer's normed input.
  void finish_layer(specattn::context<specattn::cuda>& ctx, std::int32_t layer, std::ptrdiff_t slots);
  /// The rest of the last layer, and the head, for the wanted rows.
  void finish(specattn::context<specattn::cuda>& ctx, device_view<const std::int32_t, 1> rows,
              device_view<float, 2> logits);
  /// What follows the attention of a layer, on `residual`, and the norm that follows.
  void feed_forward(specattn::context<specattn::cuda>& ctx, const device_layer& layer, const skinny_rows& attended,
                    device_view<float, 2> residual, device_norm next);
  /// residual += rows * weights^T; its norm becomes the next product's input.
  void add_and_norm(specattn::context<specattn::cuda>& ctx, const skinny_rows& rows, const device_matrix& weights,
                    device_view<float, 2> residual, device_norm next);
  /// y = rows * weights^T by what suits their number. Rows that are neither few nor rounded are rounded first.
  /// \pre many rows: they have no squares
  void multiply(specattn::context<specattn::cuda>& ctx, const skinny_rows& rows, const device_matrix& weights,
                const skinny_result& y);

  device_view<float, 3> heads(std::ptrdiff_t slots, std::ptrdiff_t first_head, std::ptrdiff_t count) const {
    const std::ptrdiff_t row = std::ptrdiff_t{shape_.q_heads + 2 * shape_.kv_heads} * shape_.head_dim;
    return {heads_.data() + first_head * shape_.head_dim, {slots, count, shape_.head_dim}, {row, shape_.head_dim, 1}};
  }
  device_view<float, 3> attended(std::ptrdiff_t slots) const {
    return attended_.shaped({slots, shape_.q_heads, shape_.head_dim});
  }
  device_norm norm(const float* gain) const { return {gain, static_cast<float>(config_.rms_norm_eps)}; }

  model_config config_;
  specattn::model_shape shape_;
  device_weights weights_;
  device_product product_;
  specattn::buffer<float, specattn::cuda> frequencies_;  // [head_dim / 2]
  // Rows of the pass, [max_slots, …].
  specattn::buffer<float, specattn::cuda> residual_, kept_, heads_, attended_, gate_up_, squares_;
  specattn::buffer<specattn::bf16, specattn::cuda> rounded_, normed_, active_;
  skinny_rows input_;  // of the next product: the residual's norm, made or prepared
};

}  // namespace mini_llm
