// What a model must offer to be decoded, as concepts. A model asks; the attention object answers.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>
#include <type_traits>

#include "backend.hpp"
#include "view.hpp"

namespace specattn::inline SPECATTN_DATA {

/// The sizes the library needs to know of a model.
struct model_shape {
  std::int32_t layers = 0;
  std::int32_t q_heads = 0;
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t vocab = 0;
  std::int32_t max_positions = 0;  ///< the context limit
  std::int32_t max_slots = 0;      ///< the most tokens one forward() takes; longer prefills are cut into chunks
};

/// The tokens of one pass, those of all sequences one after another.
template <backend B = cpu>
struct forward_batch {
  std::span<const std::int32_t> tokens;      ///< [slots]
  std::span<const std::int32_t> positions;   ///< [slots] text positions, for the rotary embedding
  std::span<const std::int32_t> logit_rows;  ///< slots whose logits are wanted, ascending; none during prefill
};

/// The same in device memory, read when the work runs: how many slots there are is fixed when a pass is captured in a
/// graph, what they hold is not. Slots after the pass's last sequence are padding (token 0 at position 0): they are
/// computed like the others and nobody looks at them. A slot may be wanted more than once.
template <>
struct forward_batch<cuda> {
  view<const std::int32_t, 1, cuda> tokens;
  view<const std::int32_t, 1, cuda> positions;
  view<const std::int32_t, 1, cuda> logit_rows;
};

/// The seam between a model and this library, called once a layer.
/// q [slots, q_heads, head_dim] and k, v [slots, kv_heads, head_dim] are rotated and hold the pass's new rows only;
/// `out` [slots, q_heads, head_dim] is overwritten. The attention owns the cache and decides what is read.
template <class A, class B = cpu>
concept layer_attention = requires(A& attention, const std::int32_t& layer, const view<const float, 3, B>& in,
                                   const view<float, 3, B>& out) {
  attention(layer, in, in, in, out);
};

}  // namespace specattn::inline SPECATTN_DATA

namespace specattn::inline SPECATTN_CODE {

namespace detail {
/// The least an attention object is; models are checked against it.
template <backend B>
struct attention_archetype {
  void operator()(std::int32_t, view<const float, 3, B>, view<const float, 3, B>, view<const float, 3, B>,
                  view<float, 3, B>) {}
};
}  // namespace detail

/// forward() evaluates the batch, calling attention(layer, q, k, v, out) for layers 0, 1, … in order, and writes
/// logits [logit_rows, vocab]. It keeps no state between calls: the cache is the attention's. shape() returns a model_shape,
/// or a reference to one.
template <class M, class B = cpu>
concept language_model = requires(M& model, const M& constant, context<B>& ctx, const forward_batch<B>& batch,
                                  detail::attention_archetype<B>& attention, const view<float, 2, B>& logits) {
  requires std::same_as<std::remove_cvref_t<decltype(constant.shape())>, model_shape>;
  model.forward(ctx, batch, attention, logits);
};

}  // namespace specattn::inline SPECATTN_CODE
