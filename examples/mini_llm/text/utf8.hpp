#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace mini_llm {

/// What stands at one place of a text.
struct utf8_character {
  std::uint32_t code_point;  ///< meaningless unless whole
  std::size_t length;        ///< bytes, 1 to 4; where not whole, those that cannot be part of any character
  bool whole;                ///< a well-formed character (no overlong form, no surrogate)
  bool cut;                  ///< not whole, but well-formed as far as the text goes: more bytes could complete it
};

/// Reads the character that starts at byte `at`. \pre at < text.size()
utf8_character read_utf8(std::string_view text, std::size_t at) noexcept;

/// Appends the UTF-8 form of a code point below 0x110000.
void append_utf8(std::string& text, std::uint32_t code_point);

/// Length in bytes of the run of well-formed characters that starts at byte `at`; may be zero.
std::size_t whole_utf8_run(std::string_view text, std::size_t at) noexcept;

/// Whether Unicode gives the character the property White_Space.
bool is_white_space(std::uint32_t code_point) noexcept;

}  // namespace mini_llm
