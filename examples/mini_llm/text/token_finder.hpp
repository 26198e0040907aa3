#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "tokenizer_file.hpp"

namespace mini_llm {

/// A stretch of text: an added token found there, or (id < 0) text between such tokens.
struct text_stretch {
  std::string_view text;
  std::int32_t id = -1;
};

/// Finds added tokens in text: leftmost first, the longest where several start.
class token_finder {
 public:
  token_finder() = default;

  /// \param tokens each with non-empty content; their `normalized` flag is not looked at
  /// \cost   O(n log n) time, and no memory but theirs: twenty thousand may have 512 bytes each
  explicit token_finder(std::vector<added_token> tokens);

  /// Appends the stretches of `text` in order, none empty; they view `text`.
  /// \cost O(length of text * length of the longest token * log of their number), at worst
  void split(std::string_view text, std::vector<text_stretch>& stretches) const;

 private:
  struct range {
    std::size_t begin = 0;
    std::size_t end = 0;
  };

  /// The longest token that starts at `at`, or nullptr.
  const added_token* longest_at(std::string_view text, std::size_t at) const;

  std::vector<added_token> tokens_;      // by content, each once
  std::array<range, 256> first_with_{};  // of tokens_, by first byte
};

}  // namespace mini_llm
