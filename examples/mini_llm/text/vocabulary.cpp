#include "vocabulary.hpp"

#include <algorithm>
#include <utility>

#include "input_error.hpp"
#include "json_document.hpp"

namespace mini_llm {
vocabulary::vocabulary(std::vector<std::pair<std::string, std::int64_t>> tokens, std::string_view source) {
  if (tokens.empty()) throw input_error(source, "the vocabulary has no tokens");
  if (tokens.size() > 2 * max_tokens) {
    throw input_error(source, "the vocabulary and the added tokens are " + std::to_string(tokens.size()) +
                                  " tokens (at most " + std::to_string(2 * max_tokens) + " are accepted)");
  }
  // A single huge id must not make us allocate a table for all the ids below it.
  const std::size_t limit = std::min(2 * max_tokens, 2 * tokens.size() + 4096);
  std::size_t size = 0;
  for (const auto& [text, id] : tokens) {
    if (id < 0 || static_cast<std::uint64_t>(id) >= limit) {
      throw input_error(source, "token " + in_quotes(text) + ": id " + std::to_string(id) +
                                    " is out of range for a vocabulary of " + std::to_string(tokens.size()) +
                                    " tokens");
    }
    size = std::max(size, static_cast<std::size_t>(id) + 1);
  }
  texts_.resize(size);
  for (auto& [text, id] : tokens) {
    std::string& place = texts_[static_cast<std::size_t>(id)];
    if (!place.empty() && place != text) {
      throw input_error(source, "the tokens " + in_quotes(place) + " and " + in_quotes(text) + " both have id " +
                                    std::to_string(id));
    }
    place = std::move(text);
  }
  ids_.reserve(size);
  for (std::size_t id = 0; id < size; ++id) {
    if (texts_[id].empty()) continue;
    const auto [other, fresh] = ids_.emplace(texts_[id], static_cast<std::int32_t>(id));
    if (!fresh) {
      throw input_error(source, "token " + in_quotes(texts_[id]) + " has the ids " + std::to_string(other->second) +
                                    " and " + std::to_string(id));
    }
    if (is_crowded(ids_, std::string_view(texts_[id]))) {
      throw input_error(source, "token " + in_quotes(texts_[id]) + ": more than " + std::to_string(max_bucket) +
                                    " tokens collide in the hash table");
    }
  }
}

std::optional<std::int32_t> vocabulary::find(std::string_view text) const {
  const auto found = ids_.find(text);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

}  // namespace mini_llm
