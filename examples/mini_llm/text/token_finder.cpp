#include "token_finder.hpp"

#include <algorithm>
#include <utility>

#include "utf8.hpp"

namespace mini_llm {
namespace {

/// Where the white space that ends at `end` begins, but not before `low`.
std::size_t space_begin(std::string_view text, std::size_t low, std::size_t end) {
  while (end > low) {
    std::size_t start = end - 1;
    while (start > low && end - start < 4 && (static_cast<unsigned char>(text[start]) & 0xc0) == 0x80) --start;
    const utf8_character last = read_utf8(text.substr(0, end), start);
    if (!last.whole || start + last.length != end || !is_white_space(last.code_point)) break;
    end = start;
  }
  return end;
}

/// Where the white space that begins at `begin` ends.
std::size_t space_end(std::string_view text, std::size_t begin) {
  while (begin < text.size()) {
    const utf8_character next = read_utf8(text, begin);
    if (!next.whole || !is_white_space(next.code_point)) break;
    begin += next.length;
  }
  return begin;
}

}  // namespace

token_finder::token_finder(std::vector<added_token> tokens) : tokens_(std::move(tokens)) {
  const auto earlier = [](const added_token& a, const added_token& b) { return a.content < b.content; };
  std::stable_sort(tokens_.begin(), tokens_.end(), earlier);
  // Of tokens that are spelt alike the one listed last counts.
  std::size_t kept = 0;
  for (std::size_t i = 0; i < tokens_.size(); ++i) {
    if (i + 1 < tokens_.size() && tokens_[i].content == tokens_[i + 1].content) continue;
    if (kept != i) tokens_[kept] = std::move(tokens_[i]);
    ++kept;
  }
  tokens_.erase(tokens_.begin() + static_cast<std::ptrdiff_t>(kept), tokens_.end());
  for (std::size_t i = tokens_.size(); i-- > 0;) {
    first_with_[static_cast<unsigned char>(tokens_[i].content.front())] = {i, tokens_.size()};
  }
  for (std::size_t i = 0; i < tokens_.size(); ++i) {
    first_with_[static_cast<unsigned char>(tokens_[i].content.front())].end = i + 1;
  }
}

const added_token* token_finder::longest_at(std::string_view text, std::size_t at) const {
  const added_token* longest = nullptr;
  range same = first_with_[static_cast<unsigned char>(text[at])];  // tokens that begin as the text does
  for (std::size_t depth = 1; same.begin < same.end; ++depth) {
    // The one that ends here is the least: the others go on.
    if (tokens_[same.begin].content.size() == depth) longest = &tokens_[same.begin++];
    if (same.begin == same.end || at + depth == text.size()) break;
    const auto byte = [&](std::size_t token) { return static_cast<unsigned char>(tokens_[token].content[depth]); };
    const auto wanted = static_cast<unsigned char>(text[at + depth]);
    if (byte(same.begin) == wanted && byte(same.end - 1) == wanted) continue;
    const auto tokens_from = [&](unsigned value) {
      std::size_t low = same.begin;
      for (std::size_t high = same.end; low < high;) {
        const std::size_t middle = low + (high - low) / 2;
        if (byte(middle) < value) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      return low;
    };
    same = {tokens_from(wanted), tokens_from(wanted + 1U)};
  }
  return longest;
}

void token_finder::split(std::string_view text, std::vector<text_stretch>& stretches) const {
  const auto add = [&](std::size_t begin, std::size_t end, std::int32_t id) {
    if (begin < end) stretches.push_back({text.substr(begin, end - begin), id});
  };
  std::size_t done = 0;  // everything before it is in stretches
  for (std::size_t at = 0; !tokens_.empty() && at < text.size();) {
    const added_token* const token = longest_at(text, at);
    if (token == nullptr) {
      ++at;
      continue;
    }
    const std::size_t begin = token->takes_space_before ? space_begin(text, done, at) : at;
    const std::size_t token_end = at + token->content.size();
    const std::size_t end = token->takes_space_after ? space_end(text, token_end) : token_end;
    add(done, begin, -1);
    add(begin, end, static_cast<std::int32_t>(token->id));
    done = at = end;
  }
  add(done, text.size(), -1);
}

}  // namespace mini_llm
