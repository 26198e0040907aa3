#include "token_finder.hpp"

#include <algorithm>

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

token_finder::token_finder(const std::vector<added_token>& tokens) : tokens_(tokens), nodes_(1) {
  for (std::size_t index = 0; index < tokens_.size(); ++index) {
    std::size_t place = 0;
    for (const char c : tokens_[index].content) {
      const auto [step, fresh] = nodes_[place].next.emplace(static_cast<unsigned char>(c), nodes_.size());
      place = step->second;
      if (fresh) nodes_.emplace_back();
    }
    nodes_[place].token = index;
  }
}

const added_token* token_finder::longest_at(std::string_view text, std::size_t at) const {
  const added_token* longest = nullptr;
  std::size_t place = 0;
  for (; at < text.size(); ++at) {
    const auto step = nodes_[place].next.find(static_cast<unsigned char>(text[at]));
    if (step == nodes_[place].next.end()) break;
    place = step->second;
    if (nodes_[place].token != no_token) longest = &tokens_[nodes_[place].token];
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
