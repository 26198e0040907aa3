#pragma once

#include <cstdint>
#include <string_view>

namespace mini_llm {

/// Refuses a text that Unicode's normal form C might change: Qwen's tokenizers put texts into it, which is not done here.
/// Nearly all text is in it as it stands: letters with accents of their own are, letters followed by a combining accent
/// are not. Malformed bytes are passed over.
/// \throws input_error naming the first such character
void require_nfc(std::string_view text);

}  // namespace mini_llm
