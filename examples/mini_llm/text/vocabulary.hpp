#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace mini_llm {

/// Tokens that a file may list, and added tokens besides: the largest vocabularies in use have 262144.
inline constexpr std::size_t max_tokens = std::size_t{1} << 21;

/// Entries that may meet in one bucket of a hash table. Chance puts a dozen there at most; a file made to put its
/// tokens or merges into few buckets would make every search walk through all of them.
inline constexpr std::size_t max_bucket = 64;

/// Whether the bucket of this key of the table holds more than that.
template <class Table, class Key>
bool is_crowded(const Table& table, const Key& key) {
  return table.bucket_size(table.bucket(key)) > max_bucket;
}

/// Token texts by id and ids by text. Ids start at 0 and may have holes. Movable, not copyable.
class vocabulary {
 public:
  vocabulary() = default;
  vocabulary(vocabulary&&) = default;
  vocabulary& operator=(vocabulary&&) = default;
  // The index views the texts.
  vocabulary(const vocabulary&) = delete;
  vocabulary& operator=(const vocabulary&) = delete;

  /// \param tokens (text, id) pairs; a pair may be given twice
  /// \throws input_error when an id is negative, is far beyond the number of tokens, or is given
  ///         to two texts, when a text has two ids, when there is no token at all, and when the
  ///         tokens' texts are made to collide
  vocabulary(std::vector<std::pair<std::string, std::int64_t>> tokens, std::string_view source);

  /// One more than the highest id.
  std::size_t size() const noexcept { return texts_.size(); }
  /// The text of a token as the file spells it; empty for a hole. \pre 0 <= id < size()
  const std::string& text(std::int32_t id) const noexcept { return texts_[static_cast<std::size_t>(id)]; }
  /// The id of exactly this text.
  std::optional<std::int32_t> find(std::string_view text) const;

 private:
  std::vector<std::string> texts_;
  std::unordered_map<std::string_view, std::int32_t> ids_;
};

}  // namespace mini_llm
