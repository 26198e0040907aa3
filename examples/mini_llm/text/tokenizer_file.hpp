#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mini_llm {

// Bounds that no file in use meets, so that a hostile one cannot ask for much memory or time.

/// Of an added token, raw or normalised: the search for them looks so far ahead at each place. Real ones: 60.
inline constexpr std::size_t max_added_bytes = 512;
inline constexpr std::size_t max_token_bytes = 4096;  ///< of a token's spelling; real ones reach some hundreds
inline constexpr std::size_t max_merges = std::size_t{1} << 21;  ///< the largest vocabularies have half a million

/// GPT-2's pattern, which ByteLevel applies when it is told to use "the" regular expression.
inline constexpr std::string_view gpt2_pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// A token that is looked for in the text before anything else is done to it.
struct added_token {
  std::string content;
  std::int64_t id = 0;
  bool takes_space_before = false;  ///< swallows the white space in front of it ("lstrip")
  bool takes_space_after = false;   ///< and behind it ("rstrip")
  bool normalized = false;          ///< looked for in the normalised text, normalised itself
  bool special = false;             ///< carries no text: skipped in decoding on request
};

/// One step of normalising: puts `to` in front of the text, or replaces every `from` by `to`, or wants it in the normal
/// form C.
struct normalizer_step {
  bool prepend = false;
  std::string from;
  std::string to;
  bool nfc = false;
};

/// A regular expression that cuts the text (see split_pattern).
struct split_step {
  std::string expression;
  bool drop_gaps = false;
};

/// When a word mark (or a space) is put in front of a stretch of text that lacks one.
enum class prefix_scheme { never, first, always };

/// What happens between normalising and the merges.
struct pre_tokenizer_steps {
  std::string word_mark;                        ///< replaces spaces when not empty ("▁")
  prefix_scheme prefix = prefix_scheme::never;  ///< of the word mark, or of a space when byte_level
  bool split_at_word_mark = false;              ///< every word mark begins a new piece
  std::vector<split_step> splits;               ///< applied one after the other
  bool byte_level = false;                      ///< the vocabulary is spelt in the byte alphabet
};

/// How token texts become text again.
struct decoder_steps {
  bool byte_level = false;
  bool byte_fallback = false;                                     ///< "<0x0A>" is the byte 10
  std::vector<std::pair<std::string, std::string>> replacements;  ///< in every token
  std::string strip_text;                                         ///< taken off the front of the whole text
  std::int64_t strip_count = 0;                                   ///< at most so many times
  std::string word_mark;                                          ///< becomes a space when not empty
  bool drop_first_marks = false;  ///< but those of a text's first token become nothing
};

/// What tokenizer.json and tokenizer_config.json say, checked and free of JSON.
struct tokenizer_settings {
  std::vector<std::pair<std::string, std::int64_t>> tokens;  ///< vocabulary without added tokens
  std::vector<std::pair<std::string, std::string>> merges;   ///< best first
  std::vector<std::int32_t> merge_ranks;                     ///< of the merges, ascending; empty: all differ
  std::string unknown_token;                                 ///< empty: there is none
  bool byte_fallback = false;
  bool fuse_unknown = false;
  bool ignore_merges = false;  ///< a piece that is itself a token is taken whole
  std::vector<added_token> added;
  std::vector<normalizer_step> normalizer;
  pre_tokenizer_steps pre_tokenizer;
  decoder_steps decoder;
  std::vector<std::int64_t> prefix_ids;  ///< what the template puts before a text
  std::vector<std::int64_t> suffix_ids;  ///< and after it
  std::optional<bool> add_bos;           ///< overrides the template's bos when given
  std::optional<bool> add_eos;
  std::string bos_token;  ///< empty: not named
  std::string eos_token;
  std::string chat_template;  ///< of a GGUF file, as it stands there; empty: none
};

/// Reads the two files' texts. What is not supported (other models than BPE, other steps than
/// those above) is refused by name.
/// \param config_text tokenizer_config.json; may be empty: no such file
/// \param source      file name of tokenizer.json for messages
/// \throws input_error
tokenizer_settings parse_tokenizer_file(std::string_view text, std::string_view config_text, std::string_view source);

}  // namespace mini_llm
