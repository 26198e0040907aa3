// What a draft's steps asked in a round, for record_keys().
#pragma once

#include <cstddef>
#include <cstdint>

#include "buffer.hpp"
#include "decode_state.hpp"
#include "key_recording.hpp"
#include "kv_cache.hpp"
#include "model.hpp"
#include "view.hpp"

namespace specattn::inline v0_1::detail {

/// Queries and log-sum-exps of a round's recorded steps.
template <backend B>
class query_memory {
 public:
  query_memory() = default;
  query_memory(const model_shape& draft, const decode_sizes& sizes)
      : shape_(draft),
        q_(sizes.draft_queries * static_cast<std::size_t>(draft.head_dim)),
        lse_(sizes.draft_queries),
        slot_lse_(sizes.slot_queries) {}
  static std::size_t bytes(const model_shape& draft, const decode_sizes& sizes) {
    return (sizes.draft_queries * static_cast<std::size_t>(draft.head_dim + 1) + sizes.slot_queries) * sizeof(float);
  }

  /// Where step `step` of a round of so many sequences leaves them.
  query_log<B> log(std::int32_t step, std::int32_t sequences) const {
    const std::ptrdiff_t layers = shape_.layers, heads = shape_.q_heads, rows = layers * sequences * heads;
    return {{q_.data() + step * rows * shape_.head_dim, {layers, sequences, heads, shape_.head_dim}},
            {lse_.data() + step * rows, {layers, sequences, heads}},
            slot_lse_.shaped({std::ptrdiff_t{2} * sequences, heads})};
  }

  /// The first `steps` steps over the draft's cache; what is recorded, and over which prefixes, is left to the caller.
  template <storage T>
  key_recording_args<T, B> asked(std::int32_t steps, std::int32_t sequences, const kv_cache<T, B>& cache) const {
    key_recording_args<T, B> args;
    args.q = q_.shaped({steps, shape_.layers, sequences, shape_.q_heads, shape_.head_dim});
    args.lse = lse_.shaped({steps, shape_.layers, sequences, shape_.q_heads});
    args.kv = cache.layer(0);
    if (shape_.layers > 1) args.layer_stride = cache.layer(1).keys - args.kv.keys;
    args.key_scales = cache.key_scales();
    return args;
  }

 private:
  model_shape shape_;
  buffer<float, B> q_, lse_;   // [steps, layers, sequences, q_heads], q_ times head_dim
  buffer<float, B> slot_lse_;  // [2 * sequences, q_heads]
};

}  // namespace specattn::inline v0_1::detail
