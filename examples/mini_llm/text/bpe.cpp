#include "bpe.hpp"

#include <cstddef>
#include <queue>
#include <utility>

#include "byte_alphabet.hpp"
#include "input_error.hpp"
#include "json_document.hpp"
#include "utf8.hpp"

namespace mini_llm {
namespace {

constexpr std::size_t max_piece_bytes = std::size_t{1} << 30;  // symbols are numbered with 32 bits

int hex_digit(char c) noexcept {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

std::string hex_byte(unsigned char byte) {
  constexpr std::string_view digits = "0123456789ABCDEF";
  return {'0', 'x', digits[byte >> 4], digits[byte & 15]};
}

/// The token that byte fallback uses: "<0x0A>".
std::string byte_token(unsigned char byte) {
  std::string token(1, '<');
  token += hex_byte(byte);
  token += '>';
  return token;
}

/// A merge that may be due; the queue may hold ones that have become void.
struct candidate {
  std::int32_t rank;
  std::int32_t position;  // of the left symbol
  std::int32_t id;        // of the result
};

struct comes_later {
  bool operator()(const candidate& a, const candidate& b) const noexcept {
    return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
  }
};

}  // namespace

std::optional<unsigned char> byte_of_token(std::string_view text) noexcept {
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return std::nullopt;
  const int high = hex_digit(text[3]);
  const int low = hex_digit(text[4]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<unsigned char>(high * 16 + low);
}

std::size_t bpe_model::pair_hash::operator()(std::uint64_t pair) const noexcept {
  // Ids are small and dense: mix, so that the table's buckets see more than the low bits.
  pair ^= pair >> 32;
  pair *= 0x9e3779b97f4a7c15ULL;
  return static_cast<std::size_t>(pair ^ (pair >> 29));
}

std::uint64_t bpe_model::pair_key(std::int32_t left, std::int32_t right) noexcept {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) | static_cast<std::uint32_t>(right);
}

bpe_model::bpe_model(const tokenizer_settings& settings, const vocabulary& tokens, std::string_view source)
    : byte_level_(settings.pre_tokenizer.byte_level),
      fuse_unknown_(settings.fuse_unknown),
      ignore_merges_(settings.ignore_merges),
      source_(source) {
  byte_ids_.fill(-1);
  for (int byte = 0; byte < 256; ++byte) {
    const auto value = static_cast<unsigned char>(byte);
    if (byte_level_) {
      const char c = static_cast<char>(value);
      byte_ids_[value] = tokens.find(to_byte_alphabet({&c, 1})).value_or(-1);
    } else if (settings.byte_fallback) {
      byte_ids_[value] = tokens.find(byte_token(value)).value_or(-1);
    }
  }
  if (!settings.unknown_token.empty()) {
    const auto id = tokens.find(settings.unknown_token);
    if (!id) {
      throw input_error(source,
                        "model.unk_token: " + in_quotes(settings.unknown_token) + " is not in the vocabulary");
    }
    unknown_id_ = *id;
  }
  read_merges(settings, tokens, source);
}

void bpe_model::read_merges(const tokenizer_settings& settings, const vocabulary& tokens, std::string_view source) {
  merges_.reserve(settings.merges.size());  // hence less than one in a bucket on the average
  std::int32_t rank = 0;
  for (const auto& [left, right] : settings.merges) {
    const auto find = [&](const std::string& text) {
      const auto id = tokens.find(text);
      if (!id) {
        throw input_error(source, "model.merges: merge " + std::to_string(rank) + " needs the token " +
                                      in_quotes(text) + ", which is not in the vocabulary");
      }
      return *id;
    };
    const std::uint64_t key = pair_key(find(left), find(right));
    const std::size_t place = static_cast<std::size_t>(rank);
    const std::int32_t own = settings.merge_ranks.empty() ? rank : settings.merge_ranks[place];
    merges_.insert_or_assign(key, merge_result{own, find(left + right)});
    if (is_crowded(merges_, key)) {
      throw input_error(source, "model.merges: merge " + std::to_string(rank) + ": more than " +
                                    std::to_string(max_bucket) + " merges collide in the hash table");
    }
    ++rank;
  }
}

void bpe_model::encode(const vocabulary& tokens, std::string_view piece, std::vector<std::int32_t>& ids) const {
  if (piece.size() > max_piece_bytes) {
    throw input_error("a text of " + std::to_string(piece.size()) + " bytes is too long to tokenise (1 GiB at most)");
  }
  if (ignore_merges_) {
    if (const auto whole = byte_level_ ? tokens.find(to_byte_alphabet(piece)) : tokens.find(piece)) {
      ids.push_back(*whole);
      return;
    }
  }
  std::vector<std::int32_t> symbols;
  symbols.reserve(piece.size());
  if (byte_level_) {
    start_from_bytes(piece, symbols);
  } else {
    start_from_characters(tokens, piece, symbols);
  }
  merge(symbols);
  ids.insert(ids.end(), symbols.begin(), symbols.end());
}

void bpe_model::start_from_bytes(std::string_view piece, std::vector<std::int32_t>& symbols) const {
  for (const char c : piece) {
    const auto byte = static_cast<unsigned char>(c);
    const std::int32_t id = byte_ids_[byte] >= 0 ? byte_ids_[byte] : unknown_id_;
    if (id < 0) throw input_error(source_, "the vocabulary has no token for the byte " + hex_byte(byte));
    symbols.push_back(id);
  }
}

bool bpe_model::fall_back_to_bytes(std::string_view character, std::vector<std::int32_t>& symbols) const {
  for (const char c : character) {
    if (byte_ids_[static_cast<unsigned char>(c)] < 0) return false;
  }
  for (const char c : character) symbols.push_back(byte_ids_[static_cast<unsigned char>(c)]);
  return true;
}

void bpe_model::start_from_characters(const vocabulary& tokens, std::string_view piece,
                                      std::vector<std::int32_t>& symbols) const {
  bool after_unknown = false;
  for (std::size_t at = 0; at < piece.size();) {
    const std::string_view character = piece.substr(at, read_utf8(piece, at).length);
    at += character.size();
    const auto id = tokens.find(character);
    if (id) symbols.push_back(*id);
    if (id || fall_back_to_bytes(character, symbols)) {
      after_unknown = false;
      continue;
    }
    if (unknown_id_ < 0) throw input_error(source_, "the vocabulary has no token for " + in_quotes(character));
    if (!(after_unknown && fuse_unknown_)) symbols.push_back(unknown_id_);
    after_unknown = true;
  }
}

void bpe_model::merge(std::vector<std::int32_t>& ids) const {
  const auto count = static_cast<std::int32_t>(ids.size());
  std::vector<symbol> symbols(ids.size());
  std::priority_queue<candidate, std::vector<candidate>, comes_later> due;
  const auto consider = [&](std::int32_t left, std::int32_t right) {
    if (left < 0 || right < 0) return;
    const auto found = merges_.find(
        pair_key(symbols[static_cast<std::size_t>(left)].id, symbols[static_cast<std::size_t>(right)].id));
    if (found != merges_.end()) due.push({found->second.rank, left, found->second.id});
  };
  for (std::int32_t i = 0; i < count; ++i) {
    symbols[static_cast<std::size_t>(i)] = {ids[static_cast<std::size_t>(i)], i - 1, i + 1 < count ? i + 1 : -1,
                                            true};
    if (i > 0) consider(i - 1, i);
  }
  while (!due.empty()) {
    const candidate best = due.top();
    due.pop();
    symbol& left = symbols[static_cast<std::size_t>(best.position)];
    if (!left.alive || left.next < 0) continue;
    symbol& right = symbols[static_cast<std::size_t>(left.next)];
    // Void when either symbol has changed since, unless the two still make the same token.
    const auto still = merges_.find(pair_key(left.id, right.id));
    if (still == merges_.end() || still->second.id != best.id) continue;
    left.id = best.id;
    left.next = right.next;
    right.alive = false;
    if (right.next >= 0) symbols[static_cast<std::size_t>(right.next)].previous = best.position;
    consider(left.previous, best.position);
    consider(best.position, left.next);
  }
  ids.clear();
  for (std::int32_t i = count > 0 ? 0 : -1; i >= 0; i = symbols[static_cast<std::size_t>(i)].next) {
    ids.push_back(symbols[static_cast<std::size_t>(i)].id);
  }
}

}  // namespace mini_llm
