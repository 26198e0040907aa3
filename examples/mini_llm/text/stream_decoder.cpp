#include "stream_decoder.hpp"

#include <cstddef>
#include <utility>

#include "utf8.hpp"

namespace mini_llm {
namespace {

constexpr std::string_view replacement_character = "\xEF\xBF\xBD";

/// Appends the text to `out`, made valid, up to a character that is cut off by the end; returns
/// where that begins, or the text's length.
std::size_t append_valid(std::string_view text, std::string& out) {
  std::size_t at = 0;
  while (at < text.size()) {
    const utf8_character character = read_utf8(text, at);
    if (character.cut) break;
    out += character.whole ? text.substr(at, character.length) : replacement_character;
    at += character.length;
  }
  return at;
}

}  // namespace

std::string replace_invalid_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  if (append_valid(text, out) < text.size()) out += replacement_character;
  return out;
}

stream_decoder::stream_decoder(const tokenizer& source, bool continuation, bool skip_special)
    : source_(&source), skip_special_(skip_special), state_(source.start_of_text()) {
  if (continuation) state_ = {false, 0};
}

std::string stream_decoder::push(std::int32_t id) { return push(std::span(&id, 1)); }

std::string stream_decoder::push(std::span<const std::int32_t> ids) {
  for (const std::int32_t id : ids) source_->append_piece(id, skip_special_, state_, pending_);
  return take_whole();
}

std::string stream_decoder::flush() { return replace_invalid_utf8(std::exchange(pending_, {})); }

std::string stream_decoder::take_whole() {
  std::string whole;
  const std::size_t used = append_valid(pending_, whole);
  pending_.erase(0, used);
  return whole;
}

}  // namespace mini_llm
