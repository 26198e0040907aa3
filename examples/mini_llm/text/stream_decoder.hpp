#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "tokenizer.hpp"

namespace mini_llm {

/// Text with every stretch that is not UTF-8 replaced by U+FFFD.
std::string replace_invalid_utf8(std::string_view text);

/// Turns tokens into text as they come. A token may end inside a character; what comes out is
/// always whole, valid UTF-8: at most three bytes wait for their continuation, and bytes that can
/// no longer become a character come out as U+FFFD. The outputs joined, flush included, are
/// replace_invalid_utf8 of tokenizer::decode of all the tokens.
class stream_decoder {
 public:
  /// \param source       must outlive this
  /// \param continuation the tokens go on after a prompt, so the space that a word-mark tokenizer
  ///                     drops at the beginning of a text is kept
  /// \param skip_special leave out tokens marked special
  explicit stream_decoder(const tokenizer& source, bool continuation = false, bool skip_special = true);

  /// The text that became certain with this token; may be empty.
  std::string push(std::int32_t id);
  /// The same for several tokens.
  std::string push(std::span<const std::int32_t> ids);
  /// What was still waiting, as U+FFFD; empty when nothing was. Call it at the end of a text.
  std::string flush();

 private:
  std::string take_whole();

  const tokenizer* source_;
  bool skip_special_;
  tokenizer::decode_state state_;
  std::string pending_;
};

}  // namespace mini_llm
