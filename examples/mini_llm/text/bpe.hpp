#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizer_file.hpp"
#include "vocabulary.hpp"

namespace mini_llm {

/// The byte a token of the form "<0x0A>" stands for.
std::optional<unsigned char> byte_of_token(std::string_view text) noexcept;

/// Byte-pair encoding of one piece of text: starts from characters (or bytes) and merges the
/// neighbours whose merge ranks best, leftmost first, until none is left.
class bpe_model {
 public:
  /// \param tokens what ids mean; must outlive this and not move
  /// \throws input_error when a merge names a token that is not in the vocabulary
  bpe_model(const tokenizer_settings& settings, const vocabulary& tokens, std::string_view source);

  /// Appends the ids of `piece`. Safe to call from many threads.
  ///
  /// A byte-level model starts from the piece's bytes, whatever they are. Others start from its
  /// characters; a character that is no token becomes its bytes' tokens when there is byte
  /// fallback, else the unknown token. Bytes that are not UTF-8 are treated as such characters.
  /// \throws input_error when part of the piece has no token at all, or for a piece over 1 GiB
  /// \cost   O(n log n) in the piece's length, whatever it holds
  void encode(const vocabulary& tokens, std::string_view piece, std::vector<std::int32_t>& ids) const;

 private:
  struct merge_result {
    std::int32_t rank;
    std::int32_t id;
  };
  struct symbol {
    std::int32_t id;
    std::int32_t previous;  // neighbours in the list of symbols; -1 at either end
    std::int32_t next;
    bool alive;
  };
  struct pair_hash {
    std::size_t operator()(std::uint64_t pair) const noexcept;
  };

  static std::uint64_t pair_key(std::int32_t left, std::int32_t right) noexcept;
  void read_merges(const tokenizer_settings& settings, const vocabulary& tokens, std::string_view source);
  void start_from_bytes(std::string_view piece, std::vector<std::int32_t>& symbols) const;
  void start_from_characters(const vocabulary& tokens, std::string_view piece,
                             std::vector<std::int32_t>& symbols) const;
  bool fall_back_to_bytes(std::string_view character, std::vector<std::int32_t>& symbols) const;
  void merge(std::vector<std::int32_t>& symbols) const;

  std::unordered_map<std::uint64_t, merge_result, pair_hash> merges_;
  std::array<std::int32_t, 256> byte_ids_{};  // -1: no token
  std::int32_t unknown_id_ = -1;              // -1: none
  bool byte_level_ = false;
  bool fuse_unknown_ = false;
  bool ignore_merges_ = false;
  std::string source_;
};

}  // namespace mini_llm
