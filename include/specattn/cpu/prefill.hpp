// One pass that caches parts of texts, of several sequences together.
#pragma once

#include <cstdint>
#include <span>

#include "../attention_pass.hpp"
#include "../decode_state.hpp"
#include "../kv_cache.hpp"
#include "../model.hpp"
#include "context.hpp"
#include "round_batch.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// Caches each part's text from what its row holds on, up to the part's end, densely. Where the model throws, no row is
/// longer; pages that were reserved stay the rows'.
template <storage T, class Model>
void prefill_parts(context<cpu>& ctx, Model& model, kv_cache<T, cpu>& cache, pass_arrays& pass,
                   std::span<const prefill_part> parts, view<float, 2, cpu> no_logits) {
  pass.clear();
  for (const prefill_part& part : parts) pass.add_text(part.row, part.text, cache.length(part.row), part.to);
  for (const prefill_part& part : parts) cache.reserve(part.row, part.to - cache.length(part.row));
  attention_pass<T, cpu> attention(ctx, cache, pass.layout(pass.cache_rows.data()));
  model.forward(ctx, pass.batch(), attention, no_logits);
  for (const prefill_part& part : parts) cache.advance(part.row, part.to - cache.length(part.row));
}

}  // namespace specattn::inline SPECATTN_CODE::detail
