#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
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
  explicit token_finder(const std::vector<added_token>& tokens);

  /// Appends the stretches of `text` in order, none empty; they view `text`.
  /// \cost O(length of text * length of the longest token)
  void split(std::string_view text, std::vector<text_stretch>& stretches) const;

 private:
  struct node {
    std::map<unsigned char, std::size_t> next;
    std::size_t token = no_token;  // index in tokens_
  };
  static constexpr std::size_t no_token = static_cast<std::size_t>(-1);

  /// The longest token that starts at `at`, or nullptr.
  const added_token* longest_at(std::string_view text, std::size_t at) const;

  std::vector<added_token> tokens_;
  std::vector<node> nodes_;  // a trie over the tokens' bytes; the first is its root
};

}  // namespace mini_llm
