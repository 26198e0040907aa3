#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bpe.hpp"
#include "split_pattern.hpp"
#include "token_finder.hpp"
#include "tokenizer_file.hpp"
#include "vocabulary.hpp"

namespace mini_llm {

class stream_decoder;

/// Text to token ids and back, as a model's tokenizer.json says: byte-level BPE (GPT-2, Llama 3)
/// and character BPE with a word mark and byte fallback (Llama 2). Immutable once made, so one
/// object serves many threads. Movable, not copyable.
class tokenizer {
 public:
  /// \param text        contents of tokenizer.json
  /// \param config_text contents of tokenizer_config.json; may be empty: no such file
  /// \param source      file name of tokenizer.json for messages
  /// \throws input_error for malformed or unsupported files, naming file, field and value
  static tokenizer parse(std::string_view text, std::string_view config_text = {},
                         std::string_view source = "tokenizer.json");

  /// What another reader of files made of them. \param source file name for messages \throws input_error
  static tokenizer make(const tokenizer_settings& settings, std::string_view source) { return {settings, source}; }

  /// Reads tokenizer.json and, when there, tokenizer_config.json of a model directory.
  /// \throws input_error
  static tokenizer load(const std::filesystem::path& directory);

  /// Token ids of a text. The spelling of an added token in the text ("</s>") becomes that token.
  ///
  /// The text should be UTF-8, but need not: bytes that are not part of a character become tokens
  /// of their own (byte level: the bytes' tokens; else byte fallback, or the unknown token), and
  /// the text around them is tokenised as if it ended there. No bytes are lost on byte level.
  /// \param add_special put the beginning-of-text token (and what else the model's template has)
  ///                    around the text, if this tokenizer does so at all
  /// \throws input_error when a byte or character has no token and there is no unknown token, when the
  ///         text is over 1 GiB, and when the file's steps are hostile: when they make more of the text
  ///         than growth_limit allows, or take more steps to cut it than split_budget does
  /// \cost   O(n log n) time and O(n) memory in the text's length, whatever file and text are
  std::vector<std::int32_t> encode(std::string_view text, bool add_special) const;

  /// The text of these tokens, byte for byte: not UTF-8 where the tokens are not (show it through
  /// stream_decoder or replace_invalid_utf8). Ids outside the vocabulary have no text.
  /// \param skip_special leave out tokens marked special, such as "</s>"
  std::string decode(std::span<const std::int32_t> ids, bool skip_special = true) const;

  /// One more than the highest id. A model's embedding may have more rows than that.
  std::size_t vocab_size() const noexcept { return tokens_.size(); }

  /// A token as the file spells it ("Ġthe", "▁the", "<0x0A>"); empty for ids without a token.
  std::string_view token(std::int32_t id) const noexcept;

  /// The bytes a token adds to a text it does not begin ("Ġthe" adds " the").
  std::string_view piece(std::int32_t id) const noexcept;

  /// The id of the token spelt exactly so.
  std::optional<std::int32_t> find(std::string_view spelling) const { return tokens_.find(spelling); }

  /// Whether decoding skips this token on request.
  bool is_special(std::int32_t id) const noexcept { return holds(id) && special_[static_cast<std::size_t>(id)]; }

  /// The beginning-of-text token named by tokenizer_config.json or else by the template.
  std::optional<std::int32_t> bos_id() const noexcept { return bos_id_; }
  /// The end-of-text token named by tokenizer_config.json. A model's configuration may name more.
  std::optional<std::int32_t> eos_id() const noexcept { return eos_id_; }

  /// How a GGUF file writes a conversation as text, as it stands there; empty: it does not say.
  const std::string& chat_template() const noexcept { return chat_template_; }

  /// What encode puts before a text when add_special is set; often one id, or none.
  std::span<const std::int32_t> prefix_ids() const noexcept { return prefix_ids_; }

 private:
  friend class stream_decoder;

  /// What decoding a token depends on besides the token.
  struct decode_state {
    bool first_token = true;
    std::int64_t strips_left = 0;
  };

  tokenizer(const tokenizer_settings& settings, std::string_view source);

  bool holds(std::int32_t id) const noexcept { return id >= 0 && static_cast<std::size_t>(id) < tokens_.size(); }
  void read_marks(const tokenizer_settings& settings);
  void make_pieces(const tokenizer_settings& settings);
  void encode_stretch(std::string_view text, bool at_start, split_budget& budget,
                      std::vector<std::int32_t>& ids) const;
  std::string_view add_word_marks(std::string_view text, bool at_start, std::string& storage) const;
  void split(std::string_view text, split_budget& budget, std::vector<std::string_view>& pieces) const;
  decode_state start_of_text() const noexcept { return {true, decoder_.strip_count}; }
  std::string read_piece(const std::string& text, bool first_token) const;
  void append_piece(std::int32_t id, bool skip_special, decode_state& state, std::string& out) const;

  vocabulary tokens_;
  bpe_model model_;
  token_finder raw_tokens_;         // added tokens sought in the text as given
  token_finder normalized_tokens_;  // and in the normalised text
  std::vector<normalizer_step> normalizer_;
  pre_tokenizer_steps pre_tokenizer_;
  std::vector<split_pattern> patterns_;
  decoder_steps decoder_;
  std::vector<std::string> pieces_;  // by id
  std::vector<bool> special_;        // by id
  std::vector<std::int32_t> prefix_ids_;
  std::vector<std::int32_t> suffix_ids_;
  std::optional<std::int32_t> bos_id_;
  std::optional<std::int32_t> eos_id_;
  std::string chat_template_;
};

/// The first difference between two vocabularies that makes their ids not exchangeable: a token that
/// each spells in its own way. Special tokens, tokens that only one has, and which tokens begin and end
/// a text do not count: the ids of text are the same. Nothing when they agree.
std::optional<std::string> same_vocabulary(const tokenizer& a, const tokenizer& b);

}  // namespace mini_llm
