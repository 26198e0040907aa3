// Queries and log-sum-exps of a round's draft steps, from which recompute_steps() makes their weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention_pass.hpp"
#include "buffer.hpp"
#include "decode_state.hpp"
#include "kv_cache.hpp"
#include "model.hpp"
#include "recompute.hpp"
#include "view.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Queries and log-sum-exps of a round's recorded steps, of as many slots as the largest step has: two a sequence.
template <backend B>
class query_memory {
 public:
  query_memory() = default;
  query_memory(const model_shape& draft, const decode_sizes& sizes)
      : shape_(draft),
        q_(sizes.draft_queries * static_cast<std::size_t>(draft.head_dim)),
        lse_(sizes.draft_queries) {}
  static std::size_t bytes(const model_shape& draft, const decode_sizes& sizes) {
    return sizes.draft_queries * static_cast<std::size_t>(draft.head_dim + 1) * sizeof(float);
  }

  /// Where step `step` of a round of so many sequences leaves them.
  query_log<B> log(std::int32_t step, std::int32_t sequences) const {
    const std::ptrdiff_t layers = shape_.layers, slots = 2 * sequences, heads = shape_.q_heads;
    const std::ptrdiff_t first = step * layers * slots * heads;
    return {{q_.data() + first * shape_.head_dim, {layers, slots, heads, shape_.head_dim}},
            {lse_.data() + first, {layers, slots, heads}}};
  }

  /// The first `steps` steps over the draft's cache. Who asked, what is recorded, and over which prefixes, is left to the
  /// caller.
  template <storage T>
  recompute_steps_args<T, B> asked(std::int32_t steps, std::int32_t sequences, const kv_cache<T, B>& cache) const {
    const std::ptrdiff_t slots = 2 * sequences;
    recompute_steps_args<T, B> args;
    args.q = q_.shaped({steps, shape_.layers, slots, shape_.q_heads, shape_.head_dim});
    args.lse = lse_.shaped({steps, shape_.layers, slots, shape_.q_heads});
    args.kv = cache.layer(0);
    if (shape_.layers > 1) args.layer_stride = cache.layer(1).keys - args.kv.keys;
    args.key_scales = cache.key_scales();
    return args;
  }

 private:
  model_shape shape_;
  buffer<float, B> q_, lse_;  // [steps, layers, 2 * sequences, q_heads], q_ times head_dim
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "words_end.hpp"
