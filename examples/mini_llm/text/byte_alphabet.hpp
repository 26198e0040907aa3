#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace mini_llm {

// Byte-level vocabularies write every byte as one printable character: printable Latin-1 bytes as
// themselves, the other 68 as U+0100 onwards (a space becomes "Ġ").

/// The spelling of these bytes in that alphabet, as UTF-8.
std::string to_byte_alphabet(std::string_view bytes);

/// The bytes spelt by `text`, or nothing when some character is not of the alphabet.
std::optional<std::string> from_byte_alphabet(std::string_view text);

}  // namespace mini_llm
