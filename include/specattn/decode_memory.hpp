// What a decoder allocates, known before it is made.
#pragma once

#include <cstddef>
#include <cstdint>

#include "decode_options.hpp"
#include "decode_state.hpp"
#include "guide.hpp"
#include "kv_cache.hpp"
#include "model.hpp"
#include "selection.hpp"

namespace specattn::inline v0_1 {

/// Bytes a decoder of these models and options allocates besides the guide's own and the context's workspace.
template <storage T, backend B = cpu>
decode_memory decoder_bytes(const model_shape& target, const model_shape& draft, const decode_options& options,
                            guide_needs needs) {
  const detail::decode_sizes sizes(target, draft, options);
  const auto vocab = static_cast<std::size_t>(target.vocab);
  decode_memory memory;
  memory.target_cache = kv_cache<T, B>::bytes(sizes.target_cache);
  memory.selections = selection<B>::bytes(sizes.target_groups, sizes.positions);
  memory.logits = static_cast<std::size_t>(sizes.judged) * 2 * vocab * sizeof(float);
  if (needs.target_weights) memory.recordings += sizes.target_weights * sizeof(float);
  if (options.draft_length > 0) {
    memory.draft_cache = kv_cache<T, B>::bytes(sizes.draft_cache);
    memory.logits += static_cast<std::size_t>(sizes.sequences) * vocab * sizeof(float);
    if (needs.draft_weights || options.sparse_draft) memory.recordings += sizes.draft_weights * sizeof(float);
    if (options.sparse_draft) memory.selections += selection<B>::bytes(sizes.draft_groups, sizes.positions);
  }
  return memory;
}

}  // namespace specattn::inline v0_1
