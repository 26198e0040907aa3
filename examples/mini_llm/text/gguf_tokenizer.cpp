#include "gguf_tokenizer.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <span>
#include <unordered_map>

#include "input_error.hpp"
#include "json_document.hpp"
#include "utf8.hpp"
#include "vocabulary.hpp"

namespace mini_llm {
namespace {

/// tokenizer.ggml.token_type
enum token_kind : std::int32_t { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

constexpr std::string_view word_mark = "\u2581";
constexpr std::int64_t no_token = 0xffffffff;  // -1 in 32 bits
constexpr std::size_t max_scored_bytes = 128;  // of a token that merges make; SentencePiece's have up to 64
// Places in which tokens can be cut in two, each looked up; a vocabulary of 256000 tokens has four million.
constexpr std::size_t max_lookups = std::size_t{1} << 24;
constexpr std::size_t max_template_bytes = std::size_t{1} << 20;

constexpr std::string_view digit = R"(\p{N})";
constexpr std::string_view llama3_pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view qwen2_pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view tekken_pattern =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|)"
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|)"
    R"(\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

/// A name that tokenizer.ggml.pre may have, and what it stands for.
struct pre_tokenizer_name {
  std::string_view name;
  std::string_view first;   // pattern; empty: none
  std::string_view second;  // applied to the pieces of the first; empty: none
  bool whole_pieces;  // a piece that is a token is taken whole, and texts begin with bos unless the file says no
};
constexpr pre_tokenizer_name known_names[] = {
    {"gpt-2", gpt2_pattern, "", false},     {"gpt2", gpt2_pattern, "", false},
    {"smollm", digit, gpt2_pattern, false}, {"starcoder", digit, gpt2_pattern, false},
    {"refact", digit, gpt2_pattern, false}, {"llama-bpe", llama3_pattern, "", true},
    {"llama3", llama3_pattern, "", true},   {"llama-v3", llama3_pattern, "", true},
    {"falcon3", llama3_pattern, "", true},  {"qwen2", qwen2_pattern, "", false},
    {"tekken", tekken_pattern, "", true}};

/// The vocabulary as the file lists it.
struct token_list {
  gguf_value key;  // for messages
  std::vector<std::string_view> texts;
  std::vector<std::int32_t> kinds;

  std::int32_t kind(std::size_t id) const { return kinds.empty() ? normal : kinds[id]; }
};

std::optional<gguf_value> find(const gguf_file& file, std::string_view name) {
  return file.find("tokenizer.ggml." + std::string(name));
}

gguf_value at(const gguf_file& file, std::string_view name) { return file.at("tokenizer.ggml." + std::string(name)); }

bool flag_or(const gguf_file& file, std::string_view name, bool absent) {
  const auto value = find(file, name);
  return value ? value->boolean() : absent;
}

void require_size(const gguf_value& list, std::size_t size) {
  if (list.size() != size) list.expected(std::to_string(size) + " elements, one for each token,");
}

token_list read_tokens(const gguf_file& file) {
  const gguf_value key = at(file, "tokens");
  if (key.size() > max_tokens) {
    key.refuse(std::to_string(key.size()) + " tokens (at most " + std::to_string(max_tokens) + " are accepted)");
  }
  token_list tokens{key, key.texts(), {}};
  if (tokens.texts.empty()) key.expected("tokens");
  for (std::size_t id = 0; id < tokens.texts.size(); ++id) {
    if (tokens.texts[id].size() <= max_token_bytes) continue;
    key.refuse("token " + std::to_string(id) + " has " + std::to_string(tokens.texts[id].size()) +
               " bytes (at most " + std::to_string(max_token_bytes) + " are accepted)");
  }
  if (const auto kinds = find(file, "token_type")) {
    require_size(*kinds, tokens.texts.size());
    tokens.kinds = kinds->integers();
    for (std::size_t id = 0; id < tokens.kinds.size(); ++id) {
      if (tokens.kinds[id] >= normal && tokens.kinds[id] <= byte) continue;
      kinds->refuse("token " + std::to_string(id) + " is of type " + std::to_string(tokens.kinds[id]) +
                    "; 1 to 6 are the format's");
    }
  }
  return tokens;
}

/// Control tokens carry no text; those that the user defined do.
void read_added(const token_list& tokens, tokenizer_settings& settings) {
  for (std::size_t id = 0; id < tokens.texts.size(); ++id) {
    const std::int32_t kind = tokens.kind(id);
    const std::string_view text = tokens.texts[id];
    settings.tokens.emplace_back(text, static_cast<std::int64_t>(id));
    if (text.empty() || (kind != control && kind != unknown && kind != user_defined)) continue;
    if (text.size() > max_added_bytes) {
      tokens.key.refuse("the special token " + std::to_string(id) + " has " + std::to_string(text.size()) +
                        " bytes (at most " + std::to_string(max_added_bytes) + " are accepted)");
    }
    added_token added;
    added.content = text;
    added.id = static_cast<std::int64_t>(id);
    added.special = kind != user_defined;
    settings.added.push_back(std::move(added));
  }
}

/// The spelling of the token whose id is the value of that key; empty where there is none.
std::string spelling_of(const gguf_file& file, std::string_view name, const token_list& tokens,
                        std::optional<std::size_t> absent = std::nullopt) {
  const auto value = find(file, name);
  if (!value) return absent ? std::string(tokens.texts[*absent]) : std::string();
  const std::int64_t id = value->integer(-1, no_token);
  if (id == -1 || id == no_token) return {};
  if (id >= static_cast<std::int64_t>(tokens.texts.size())) {
    value->refuse("token " + std::to_string(id) + " is outside the vocabulary of " +
                  std::to_string(tokens.texts.size()));
  }
  return std::string(tokens.texts[static_cast<std::size_t>(id)]);
}

/// Which tokens begin and end a text, and whether they are put there.
void read_marks(const gguf_file& file, const token_list& tokens, bool begins, tokenizer_settings& settings) {
  settings.bos_token = spelling_of(file, "bos_token_id", tokens);
  settings.eos_token = spelling_of(file, "eos_token_id", tokens);
  settings.add_bos = flag_or(file, "add_bos_token", begins && !settings.bos_token.empty());
  settings.add_eos = flag_or(file, "add_eos_token", false);
  if (*settings.add_bos && settings.bos_token.empty()) {
    at(file, "add_bos_token").refuse("is true, but bos_token_id names no token");
  }
  if (*settings.add_eos && settings.eos_token.empty()) {
    at(file, "add_eos_token").refuse("is true, but eos_token_id names no token");
  }
}

const pre_tokenizer_name& read_pre_tokenizer(const gguf_file& file) {
  const gguf_value name = at(file, "pre");
  const auto* const found = std::find_if(std::begin(known_names), std::end(known_names),
                                         [text = name.text()](const auto& known) { return known.name == text; });
  if (found != std::end(known_names)) return *found;
  std::string names;
  for (const pre_tokenizer_name& known : known_names) names += (names.empty() ? "" : ", ") + std::string(known.name);
  name.refuse("how " + in_quotes(name.text()) + " splits a text is not known (" + names + " are)");
}

void read_byte_level(const gguf_file& file, const token_list& tokens, tokenizer_settings& settings) {
  const pre_tokenizer_name& pre = read_pre_tokenizer(file);
  settings.ignore_merges = pre.whole_pieces;
  settings.pre_tokenizer.byte_level = true;
  settings.decoder.byte_level = true;
  for (const std::string_view pattern : {pre.first, pre.second}) {
    if (!pattern.empty()) settings.pre_tokenizer.splits.push_back({std::string(pattern), false});
  }
  const gguf_value merges = at(file, "merges");
  if (merges.size() > max_merges) {
    merges.refuse(std::to_string(merges.size()) + " merges (at most " + std::to_string(max_merges) +
                  " are accepted)");
  }
  for (const std::string_view both : merges.texts()) {
    const std::size_t space = both.find(' ');
    if (space == 0 || space >= both.size() - 1 || both.find(' ', space + 1) != both.npos) {
      merges.refuse("merge " + std::to_string(settings.merges.size()) + " is " + in_quotes(both) +
                    "; \"left right\" expected");
    }
    settings.merges.emplace_back(both.substr(0, space), both.substr(space + 1));
  }
  read_marks(file, tokens, pre.whole_pieces, settings);
}

/// The ids of the tokens that merges may make, best score first, and their scores.
std::vector<std::size_t> by_score(const gguf_file& file, const token_list& tokens, std::vector<float>& scores) {
  const gguf_value key = at(file, "scores");
  require_size(key, tokens.texts.size());
  scores = key.floats();
  std::vector<std::size_t> order;
  for (std::size_t id = 0; id < scores.size(); ++id) {
    if (!std::isfinite(scores[id])) key.refuse("the score of token " + std::to_string(id) + " is not a number");
    const bool mergeable = tokens.kind(id) == normal || tokens.kind(id) == user_defined;
    if (!mergeable || tokens.texts[id].empty()) continue;
    if (tokens.texts[id].size() > max_scored_bytes && tokens.kind(id) == normal) {
      tokens.key.refuse("token " + std::to_string(id) + " has " + std::to_string(tokens.texts[id].size()) +
                        " bytes (at most " + std::to_string(max_scored_bytes) + " are accepted beside scores)");
    }
    if (tokens.texts[id].size() <= max_scored_bytes) order.push_back(id);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return scores[a] > scores[b]; });
  return order;
}

/// All pairs of tokens that make a token. Pairs whose tokens score alike rank alike: then the leftmost is joined first.
void read_scored_merges(const gguf_file& file, const token_list& tokens, tokenizer_settings& settings) {
  std::vector<float> scores;
  const std::vector<std::size_t> order = by_score(file, tokens, scores);
  std::unordered_map<std::string_view, std::size_t> ids;
  ids.reserve(order.size());
  for (const std::size_t id : order) {
    ids.emplace(tokens.texts[id], id);
    if (!is_crowded(ids, tokens.texts[id])) continue;
    tokens.key.refuse("more than " + std::to_string(max_bucket) + " tokens collide in the hash table");
  }
  std::size_t lookups = 0;
  std::int32_t rank = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    if (i > 0 && scores[order[i]] != scores[order[i - 1]]) ++rank;
    const std::string_view text = tokens.texts[order[i]];
    for (std::size_t cut = read_utf8(text, 0).length; cut < text.size(); cut += read_utf8(text, cut).length) {
      if (++lookups > max_lookups) {
        tokens.key.refuse("the tokens can be cut in more than " + std::to_string(max_lookups) + " places");
      }
      if (!ids.contains(text.substr(0, cut)) || !ids.contains(text.substr(cut))) continue;
      if (settings.merges.size() == max_merges) {
        tokens.key.refuse("more than " + std::to_string(max_merges) + " pairs of tokens make a token");
      }
      settings.merges.emplace_back(text.substr(0, cut), text.substr(cut));
      settings.merge_ranks.push_back(rank);
    }
  }
}

void read_sentencepiece(const gguf_file& file, const token_list& tokens, tokenizer_settings& settings) {
  if (const auto removed = find(file, "remove_extra_whitespaces"); removed && removed->boolean()) {
    removed->refuse("removing spaces is not supported");
  }
  const bool add_space = flag_or(file, "add_space_prefix", true);
  if (add_space) settings.normalizer.push_back({true, {}, std::string(word_mark)});
  settings.normalizer.push_back({false, " ", std::string(word_mark)});
  settings.decoder.replacements.emplace_back(word_mark, " ");
  settings.decoder.byte_fallback = true;
  if (add_space) {
    settings.decoder.strip_text = " ";
    settings.decoder.strip_count = 1;
  }
  settings.byte_fallback = true;
  settings.fuse_unknown = true;
  settings.unknown_token = spelling_of(file, "unknown_token_id", tokens, 0);
  read_scored_merges(file, tokens, settings);
  read_marks(file, tokens, true, settings);
}

}  // namespace

tokenizer_settings read_gguf_tokenizer(const gguf_file& file) {
  tokenizer_settings settings;
  const gguf_value model = at(file, "model");
  const bool byte_level = model.text() == "gpt2";
  if (!byte_level && model.text() != "llama") {
    model.refuse("a tokenizer of the kind " + in_quotes(model.text()) + " is not supported (gpt2 and llama are)");
  }
  const token_list tokens = read_tokens(file);
  read_added(tokens, settings);
  if (byte_level) {
    read_byte_level(file, tokens, settings);
  } else {
    read_sentencepiece(file, tokens, settings);
  }
  if (const auto chat = file.find("tokenizer.chat_template")) {
    settings.chat_template = chat->text();
    if (settings.chat_template.size() > max_template_bytes) {
      chat->refuse(std::to_string(settings.chat_template.size()) + " bytes (at most " +
                   std::to_string(max_template_bytes) + " are accepted)");
    }
  }
  return settings;
}

}  // namespace mini_llm
