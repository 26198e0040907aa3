// What a decoder allocates, known before it is made.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#include "decode_options.hpp"
#include "decode_state.hpp"
#include "guide.hpp"
#include "kv_cache.hpp"
#include "model.hpp"
#include "query_memory.hpp"
#include "selection.hpp"

namespace specattn::inline SPECATTN_CODE {

/// Bytes a decoder of these models and options allocates besides the guide's own and the context's workspace.
template <storage T, backend B = cpu>
decode_memory decoder_bytes(const model_shape& target, const model_shape& draft, const decode_options& options,
                            guide_needs needs) {
  const detail::decode_sizes sizes(target, draft, options, std::same_as<B, cpu>);
  const auto vocab = static_cast<std::size_t>(target.vocab);
  decode_memory memory;
  memory.target_cache = kv_cache<T, B>::bytes(sizes.target_cache);
  memory.selections = selection<B>::bytes(sizes.target_groups, sizes.positions);
  memory.logits = static_cast<std::size_t>(sizes.judged) * 2 * vocab * sizeof(float);
  if (needs.target_weights) memory.recordings += sizes.target_weights * sizeof(float);
  if (options.draft_length > 0) {
    memory.draft_cache = kv_cache<T, B>::bytes(sizes.draft_cache);
    memory.logits += static_cast<std::size_t>(sizes.sequences) * vocab * sizeof(float);
    if (needs.draft_weights || options.sparse_draft) {
      memory.recordings += sizes.draft_weights * sizeof(recorded_weight<B>);
      if (std::same_as<B, cuda> || options.sparse_draft)
        memory.recordings += detail::query_memory<B>::bytes(draft, sizes);
    }
    if (std::same_as<B, cuda> && options.sparse_draft && options.draft_rule.rows == combine::mean)
      memory.recordings += std::size_t(sizes.draft_groups * sizes.recording_capacity) * sizeof(fp16);
    if (options.sparse_draft) memory.selections += selection<B>::bytes(sizes.draft_groups, sizes.positions);
  }
  return memory;
}

}  // namespace specattn::inline SPECATTN_CODE
