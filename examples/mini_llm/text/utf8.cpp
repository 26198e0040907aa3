#include "utf8.hpp"

namespace mini_llm {
namespace {

struct lead_byte {
  std::size_t length;         // of the character; 0 when no character starts with this byte
  unsigned char second_low;   // the range of the second byte excludes overlong forms,
  unsigned char second_high;  // surrogates and what lies past 0x10ffff
};

lead_byte classify(unsigned char byte) noexcept {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xc2) return {0, 0, 0};
  if (byte < 0xe0) return {2, 0x80, 0xbf};
  if (byte == 0xe0) return {3, 0xa0, 0xbf};
  if (byte == 0xed) return {3, 0x80, 0x9f};
  if (byte < 0xf0) return {3, 0x80, 0xbf};
  if (byte == 0xf0) return {4, 0x90, 0xbf};
  if (byte < 0xf4) return {4, 0x80, 0xbf};
  if (byte == 0xf4) return {4, 0x80, 0x8f};
  return {0, 0, 0};
}

}  // namespace

utf8_character read_utf8(std::string_view text, std::size_t at) noexcept {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const lead_byte lead = classify(byte(0));
  if (lead.length == 0) return {0, 1, false, false};
  if (lead.length == 1) return {byte(0), 1, true, false};
  const std::size_t available = text.size() - at;
  std::uint32_t code_point = byte(0) & (0x7fU >> lead.length);
  for (std::size_t i = 1; i < lead.length; ++i) {
    if (i == available) return {0, i, false, true};
    const unsigned char low = i == 1 ? lead.second_low : 0x80;
    const unsigned char high = i == 1 ? lead.second_high : 0xbf;
    if (byte(i) < low || byte(i) > high) return {0, i, false, false};
    code_point = (code_point << 6) | (byte(i) & 0x3fU);
  }
  return {code_point, lead.length, true, false};
}

void append_utf8(std::string& text, std::uint32_t code_point) {
  const auto add = [&](std::uint32_t byte) { text.push_back(static_cast<char>(byte)); };
  const auto add_tail = [&](int shift) { add(0x80U | ((code_point >> shift) & 0x3fU)); };
  if (code_point < 0x80) return add(code_point);
  if (code_point < 0x800) {
    add(0xc0U | (code_point >> 6));
  } else if (code_point < 0x10000) {
    add(0xe0U | (code_point >> 12));
    add_tail(6);
  } else {
    add(0xf0U | (code_point >> 18));
    add_tail(12);
    add_tail(6);
  }
  add_tail(0);
}

std::size_t whole_utf8_run(std::string_view text, std::size_t at) noexcept {
  std::size_t end = at;
  while (end < text.size()) {
    const utf8_character character = read_utf8(text, end);
    if (!character.whole) break;
    end += character.length;
  }
  return end - at;
}

bool is_white_space(std::uint32_t code_point) noexcept {
  switch (code_point) {
    case 0x20:
    case 0x85:
    case 0xa0:
    case 0x1680:
    case 0x2028:
    case 0x2029:
    case 0x202f:
    case 0x205f:
    case 0x3000:
      return true;
    default:
      return (code_point >= 0x09 && code_point <= 0x0d) || (code_point >= 0x2000 && code_point <= 0x200a);
  }
}

}  // namespace mini_llm
