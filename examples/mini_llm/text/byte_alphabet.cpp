#include "byte_alphabet.hpp"

#include <array>
#include <cstdint>

#include "utf8.hpp"

namespace mini_llm {
namespace {

constexpr std::uint32_t alphabet_end = 0x100 + 68;

struct alphabet {
  std::array<std::uint32_t, 256> character{};     // of a byte
  std::array<std::int16_t, alphabet_end> byte{};  // of a character; -1: none
};

constexpr alphabet make_alphabet() {
  alphabet result;
  result.byte.fill(-1);
  std::uint32_t next = 0x100;
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
    const std::uint32_t character = printable ? byte : next++;
    result.character[byte] = character;
    result.byte[character] = static_cast<std::int16_t>(byte);
  }
  return result;
}

constexpr alphabet letters = make_alphabet();

}  // namespace

std::string to_byte_alphabet(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size() * 2);
  for (const char c : bytes) append_utf8(text, letters.character[static_cast<unsigned char>(c)]);
  return text;
}

std::optional<std::string> from_byte_alphabet(std::string_view text) {
  std::string bytes;
  bytes.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const utf8_character next = read_utf8(text, at);
    if (!next.whole || next.code_point >= alphabet_end || letters.byte[next.code_point] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(letters.byte[next.code_point]));
    at += next.length;
  }
  return bytes;
}

}  // namespace mini_llm
