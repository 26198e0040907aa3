// What a decoder allocates, known before it is made.
#pragma once

#include <concepts>

#include "decode.hpp"

namespace specattn::inline SPECATTN_CODE {

/// Bytes a decoder of these models and options allocates besides the guide's own and the context's workspace: what its parts
/// say that they allocate. On cuda page-locked memory of the host, a few KB, is not counted.
/// \param guided false: with no_guide, which on cuda needs no lists
/// \throws contract_error as the decoder would
template <storage T, backend B = cpu>
decode_memory decoder_bytes(const model_shape& target, const model_shape& draft, const decode_options& options,
                            const guide_needs& needs, bool guided = true) {
  const decode_options used = detail::checked_options(options, target, draft, std::same_as<B, cpu>);
  const detail::decode_sizes sizes(target, draft, used, std::same_as<B, cpu>);
  return detail::round_engine<T, no_draft, no_draft, no_guide, B>::bytes(target, draft, used, sizes, needs, guided);
}

}  // namespace specattn::inline SPECATTN_CODE
