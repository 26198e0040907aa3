#include "tokenizer.hpp"

#include <algorithm>
#include <system_error>
#include <utility>

#include "bounded_text.hpp"
#include "byte_alphabet.hpp"
#include "input_error.hpp"
#include "json_document.hpp"
#include "mapped_file.hpp"
#include "utf8.hpp"

namespace mini_llm {
namespace {

constexpr std::size_t max_file_bytes = std::size_t{128} << 20;  // the largest in use have 35 MB
constexpr std::size_t max_text_bytes = std::size_t{1} << 30;

vocabulary make_vocabulary(const tokenizer_settings& settings, std::string_view source) {
  auto tokens = settings.tokens;
  for (const added_token& token : settings.added) tokens.emplace_back(token.content, token.id);
  return {std::move(tokens), source};
}

std::size_t added_bytes(const tokenizer_settings& settings) {
  std::size_t bytes = 0;
  for (const added_token& token : settings.added) bytes += token.content.size();
  return bytes;
}

/// The added tokens to be sought before (or after) normalising, the latter normalised themselves.
token_finder make_finder(const tokenizer_settings& settings, bool normalized) {
  std::vector<added_token> chosen;
  growth_limit growth("normalizer of added_tokens", added_bytes(settings));
  for (const added_token& token : settings.added) {
    if (token.normalized != normalized) continue;
    chosen.push_back(token);
    if (!normalized) continue;
    std::string& content = chosen.back().content;
    content = normalize(settings.normalizer, content, growth);
    if (content.size() > max_added_bytes) {
      throw input_error("tokenizer.json: the added token " + in_quotes(token.content) + " has " +
                        std::to_string(content.size()) + " bytes once normalized (at most " +
                        std::to_string(max_added_bytes) + " are accepted)");
    }
    if (content.empty()) chosen.pop_back();
  }
  return token_finder(std::move(chosen));
}

/// The id of a token that tokenizer_config.json names; nothing when it names none.
std::optional<std::int32_t> find_mark(const vocabulary& tokens, const std::string& spelling, std::string_view field) {
  if (spelling.empty()) return std::nullopt;
  const auto id = tokens.find(spelling);
  if (!id) {
    throw input_error("tokenizer_config.json",
                      std::string(field) + ": " + in_quotes(spelling) + " is not in the vocabulary");
  }
  return id;
}

std::vector<std::int32_t> checked_ids(const std::vector<std::int64_t>& ids, const vocabulary& tokens,
                                      std::string_view source) {
  std::vector<std::int32_t> result;
  for (const std::int64_t id : ids) {
    if (id >= static_cast<std::int64_t>(tokens.size())) {
      throw input_error(source, "post_processor: token id " + std::to_string(id) + " is outside the vocabulary of " +
                                    std::to_string(tokens.size()));
    }
    result.push_back(static_cast<std::int32_t>(id));
  }
  return result;
}

[[noreturn]] void refuse_missing(std::string_view flag, std::string_view mark) {
  throw input_error("tokenizer_config.json",
                    std::string(flag) + " is true, but no " + std::string(mark) + " is named");
}

}  // namespace

tokenizer tokenizer::parse(std::string_view text, std::string_view config_text, std::string_view source) {
  return {parse_tokenizer_file(text, config_text, source), source};
}

tokenizer tokenizer::load(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "tokenizer.json";
  const std::filesystem::path config_path = directory / "tokenizer_config.json";
  std::error_code ignored;  // absent or not to be seen: the same as not given
  if (!std::filesystem::exists(path, ignored) && std::filesystem::exists(directory / "tokenizer.model", ignored)) {
    throw input_error(path.string(), "is missing; a tokenizer.model alone is not supported");
  }
  const mapped_file file(path, max_file_bytes);
  mapped_file config;
  if (std::filesystem::exists(config_path, ignored)) config = mapped_file(config_path, max_file_bytes);
  return parse(file.text(), config.text(), path.string());
}

tokenizer::tokenizer(const tokenizer_settings& settings, std::string_view source)
    : tokens_(make_vocabulary(settings, source)),
      model_(settings, tokens_, source),
      raw_tokens_(make_finder(settings, false)),
      normalized_tokens_(make_finder(settings, true)),
      normalizer_(settings.normalizer),
      pre_tokenizer_(settings.pre_tokenizer),
      decoder_(settings.decoder),
      special_(tokens_.size(), false),
      chat_template_(settings.chat_template) {
  std::size_t ranges = 0;
  for (const split_step& step : settings.pre_tokenizer.splits) {
    ranges += caseless_ranges(step.expression);
    if (ranges > max_caseless_ranges) {
      throw input_error(source, "the split patterns up to " + in_quotes(step.expression) + " have " +
                                    std::to_string(ranges) + " ranges without regard to case (at most " +
                                    std::to_string(max_caseless_ranges) + " are accepted)");
    }
    patterns_.emplace_back(step.expression, step.drop_gaps, source);
  }
  for (const added_token& token : settings.added) {
    if (token.special) special_[static_cast<std::size_t>(token.id)] = true;
  }
  make_pieces(settings);
  prefix_ids_ = checked_ids(settings.prefix_ids, tokens_, source);
  suffix_ids_ = checked_ids(settings.suffix_ids, tokens_, source);
  read_marks(settings);
}

void tokenizer::make_pieces(const tokenizer_settings& settings) {
  std::size_t spelt = 0;
  for (std::size_t id = 0; id < tokens_.size(); ++id) spelt += tokens_.text(static_cast<std::int32_t>(id)).size();
  // One token may grow by the allowance, but not each of them: there may be millions.
  growth_limit all("decoder of the vocabulary", spelt);
  pieces_.reserve(tokens_.size());
  for (std::size_t id = 0; id < tokens_.size(); ++id) {
    pieces_.push_back(read_piece(tokens_.text(static_cast<std::int32_t>(id)), false));
    all.keep(pieces_.back().size());
  }
  growth_limit growth("normalizer of added_tokens", added_bytes(settings));
  growth_limit added("decoder of added_tokens", added_bytes(settings));
  for (const added_token& token : settings.added) {
    // Such a token stands for the normalised spelling, whose word mark is a space of the text.
    if (!token.normalized) continue;
    std::string& piece = pieces_[static_cast<std::size_t>(token.id)];
    piece = read_piece(normalize(normalizer_, token.content, growth), false);
    added.keep(piece.size());
  }
}

void tokenizer::read_marks(const tokenizer_settings& settings) {
  bos_id_ = find_mark(tokens_, settings.bos_token, "bos_token");
  eos_id_ = find_mark(tokens_, settings.eos_token, "eos_token");
  if (!bos_id_ && !prefix_ids_.empty()) bos_id_ = prefix_ids_.front();
  // Flags in tokenizer_config.json win over the template, as in Hugging Face's Llama tokenizers.
  if (settings.add_bos) {
    if (*settings.add_bos && !bos_id_) refuse_missing("add_bos_token", "bos_token");
    const bool there = bos_id_ && !prefix_ids_.empty() && prefix_ids_.front() == *bos_id_;
    if (*settings.add_bos && !there) prefix_ids_.insert(prefix_ids_.begin(), *bos_id_);
    if (!*settings.add_bos && there) prefix_ids_.erase(prefix_ids_.begin());
  }
  if (settings.add_eos) {
    if (*settings.add_eos && !eos_id_) refuse_missing("add_eos_token", "eos_token");
    const bool there = eos_id_ && !suffix_ids_.empty() && suffix_ids_.back() == *eos_id_;
    if (*settings.add_eos && !there) suffix_ids_.push_back(*eos_id_);
    if (!*settings.add_eos && there) suffix_ids_.pop_back();
  }
}

std::vector<std::int32_t> tokenizer::encode(std::string_view text, bool add_special) const {
  if (text.size() > max_text_bytes) {
    throw input_error("a text of " + std::to_string(text.size()) + " bytes is too long to tokenise (1 GiB at most)");
  }
  std::vector<std::int32_t> ids;
  if (add_special) ids = prefix_ids_;
  std::vector<text_stretch> stretches;
  std::vector<text_stretch> inner;
  growth_limit growth("normalizer", text.size());
  split_budget budget;
  raw_tokens_.split(text, stretches);
  for (const text_stretch& stretch : stretches) {
    if (stretch.id >= 0) {
      ids.push_back(stretch.id);
      continue;
    }
    const std::string normalized = normalize(normalizer_, stretch.text, growth);
    inner.clear();
    normalized_tokens_.split(normalized, inner);
    for (const text_stretch& part : inner) {
      const bool at_start = stretch.text.data() == text.data() && part.text.data() == normalized.data();
      if (part.id >= 0) {
        ids.push_back(part.id);
      } else {
        encode_stretch(part.text, at_start, budget, ids);
      }
    }
  }
  if (add_special) ids.insert(ids.end(), suffix_ids_.begin(), suffix_ids_.end());
  return ids;
}

std::string_view tokenizer::add_word_marks(std::string_view text, bool at_start, std::string& storage) const {
  const bool wants_prefix =
      pre_tokenizer_.prefix == prefix_scheme::always || (pre_tokenizer_.prefix == prefix_scheme::first && at_start);
  const std::string& mark = pre_tokenizer_.word_mark;
  if (!mark.empty()) {
    storage = replace_all(text, " ", mark, growth_limit("pre_tokenizer", text.size()));
    if (wants_prefix && !storage.starts_with(mark)) storage.insert(0, mark);
    return storage;
  }
  if (!wants_prefix || text.starts_with(' ')) return text;
  storage.assign(1, ' ');
  storage += text;
  return storage;
}

void tokenizer::encode_stretch(std::string_view text, bool at_start, split_budget& budget,
                               std::vector<std::int32_t>& ids) const {
  std::string storage;
  const std::string_view marked = add_word_marks(text, at_start, storage);
  std::vector<std::string_view> pieces;
  split(marked, budget, pieces);
  for (const std::string_view piece : pieces) model_.encode(tokens_, piece, ids);
}

void tokenizer::split(std::string_view text, split_budget& budget, std::vector<std::string_view>& pieces) const {
  if (pre_tokenizer_.split_at_word_mark) {
    const std::string& mark = pre_tokenizer_.word_mark;
    for (std::size_t begin = 0; begin < text.size();) {
      // A piece ends where the next mark begins; the mark it starts with itself does not count.
      const std::size_t own_mark = text.substr(begin).starts_with(mark) ? mark.size() : 0;
      const std::size_t end = std::min(text.find(mark, begin + own_mark), text.size());
      pieces.push_back(text.substr(begin, end - begin));
      begin = end;
    }
    return;
  }
  if (patterns_.empty()) {
    if (!text.empty()) pieces.push_back(text);
    return;
  }
  // The patterns need UTF-8: they see the well-formed runs, and what lies between stays whole.
  budget.add_text(text.size());
  std::vector<std::string_view> coarse;
  std::vector<std::string_view> fine;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t run = whole_utf8_run(text, at);
    if (run == 0) {
      const std::size_t length = read_utf8(text, at).length;
      pieces.push_back(text.substr(at, length));
      at += length;
      continue;
    }
    coarse.assign(1, text.substr(at, run));
    for (const split_pattern& pattern : patterns_) {
      fine.clear();
      for (const std::string_view piece : coarse) pattern.split(piece, budget, fine);
      coarse.swap(fine);
    }
    pieces.insert(pieces.end(), coarse.begin(), coarse.end());
    at += run;
  }
}

std::string tokenizer::read_piece(const std::string& text, bool first_token) const {
  if (decoder_.byte_level) return from_byte_alphabet(text).value_or(text);
  const growth_limit growth("decoder", text.size());
  std::string piece = text;
  for (const auto& [from, to] : decoder_.replacements) piece = replace_all(piece, from, to, growth);
  if (decoder_.byte_fallback) {
    if (const auto byte = byte_of_token(piece)) return {static_cast<char>(*byte)};
  }
  if (!decoder_.word_mark.empty()) {
    piece = replace_all(piece, decoder_.word_mark, first_token && decoder_.drop_first_marks ? "" : " ", growth);
  }
  return piece;
}

void tokenizer::append_piece(std::int32_t id, bool skip_special, decode_state& state, std::string& out) const {
  if (!holds(id) || tokens_.text(id).empty() || (skip_special && is_special(id))) return;
  const bool first = std::exchange(state.first_token, false);
  std::string own;
  std::string_view piece = pieces_[static_cast<std::size_t>(id)];
  if (first && decoder_.drop_first_marks) {
    own = read_piece(tokens_.text(id), true);
    piece = own;
  }
  while (state.strips_left > 0 && piece.starts_with(decoder_.strip_text)) {
    piece.remove_prefix(decoder_.strip_text.size());
    --state.strips_left;
  }
  if (!piece.empty()) state.strips_left = 0;
  out += piece;
}

std::string tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const {
  std::string text;
  decode_state state = start_of_text();
  for (const std::int32_t id : ids) append_piece(id, skip_special, state, text);
  return text;
}

std::string_view tokenizer::token(std::int32_t id) const noexcept {
  return holds(id) ? std::string_view(tokens_.text(id)) : std::string_view();
}

std::string_view tokenizer::piece(std::int32_t id) const noexcept {
  return holds(id) ? std::string_view(pieces_[static_cast<std::size_t>(id)]) : std::string_view();
}

std::optional<std::string> same_vocabulary(const tokenizer& a, const tokenizer& b) {
  for (std::size_t i = 0; i < std::min(a.vocab_size(), b.vocab_size()); ++i) {
    const auto id = static_cast<std::int32_t>(i);
    if (a.token(id) == b.token(id) || a.token(id).empty() || b.token(id).empty()) continue;
    if (a.is_special(id) || b.is_special(id)) continue;
    return "token " + std::to_string(id) + " is " + in_quotes(a.token(id)) + " in one vocabulary and " +
           in_quotes(b.token(id)) + " in the other";
  }
  return std::nullopt;
}

}  // namespace mini_llm
