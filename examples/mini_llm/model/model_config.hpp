#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string_view>
#include <vector>

namespace mini_llm {

// Generous for every published model; together they keep products far below 2^63.
inline constexpr std::int64_t max_layers = 1024;
inline constexpr std::int64_t max_hidden = 1 << 18;
inline constexpr std::int64_t max_ffn = 1 << 20;
inline constexpr std::int64_t max_heads = 1024;
inline constexpr std::int64_t max_head_dim = 1024;
inline constexpr std::int64_t max_vocab = 1 << 22;
inline constexpr std::int64_t max_positions = 1 << 26;

/// How the angles of rotary position embedding depend on the position.
enum class rope_scaling {
  none,    ///< position * theta^(-2i / head_dim)
  linear,  ///< the same at position / factor
  llama3,  ///< low frequencies divided by factor, a smooth passage, high frequencies kept
  yarn,    ///< the same, the passage straight over the pairs' indices (arXiv 2309.00071)
};

/// YaRN's own constants: turns in the original context from which a pair is kept, and up to which it is divided.
struct yarn_ramp {
  double fast = 32.0;
  double slow = 1.0;
  bool whole_pairs = true;  ///< the passage begins and ends at whole indices
};

/// Rotary position embedding; the fields below `ramp` are meant for llama3 only, the last for yarn too.
struct rope_config {
  double theta = 10000.0;
  rope_scaling scaling = rope_scaling::none;
  double factor = 1.0;
  double attention_factor = 1.0;  ///< on cosines and sines, so on queries and keys alike; yarn's alone
  yarn_ramp ramp;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  std::int64_t original_max_context = 0;  ///< positions
  std::vector<double> divisors{};         ///< of the frequencies, [head_dim / 2]; empty: none
};

/// Shape and constants of a model of the Llama family. Every count is positive, and small enough
/// that no product of those that occur in a tensor, times 8 bytes, overflows 64 bits.
struct model_config {
  std::int64_t layers = 0;
  std::int64_t hidden = 0;
  std::int64_t q_heads = 0;
  std::int64_t kv_heads = 0;  ///< divides q_heads
  std::int64_t head_dim = 0;  ///< even; q_heads * head_dim may differ from hidden
  std::int64_t ffn = 0;
  std::int64_t vocab = 0;                      ///< rows of the embedding; may exceed the tokenizer's vocabulary
  std::int64_t max_context = 0;                ///< positions, at most those of the sliding window
  std::optional<std::int64_t> sliding_window;  ///< positions, where that is what limits max_context
  double rms_norm_eps = 1e-6;
  bool query_key_value_biases = false;  ///< Qwen2
  bool query_key_norms = false;         ///< RMS norms of each head's queries and keys before rotation: Qwen3
  rope_config rope;
  bool tie_word_embeddings = false;
  std::optional<std::int32_t> bos_id;
  std::vector<std::int32_t> eos_ids;  ///< any of them ends a text; may be empty
};

/// Reads config.json's text, and generation_config.json's over it (begin and end tokens only).
///
/// Accepted: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM and MistralForCausalLM, within a sliding window where
/// there is one. What would change the arithmetic and is not supported (biases other than Qwen2's, activations other
/// than silu, other kinds of rope scaling, factors, soft caps, quantised weights; see refuse_unread_fields()) is
/// refused by name; other unknown fields are ignored.
/// \param generation_text may be empty: no such file
/// \param source          file name of config.json for messages
/// \throws input_error naming the field and its value
model_config parse_model_config(std::string_view config_text, std::string_view generation_text = {},
                                std::string_view source = "config.json");

/// Reads config.json and, when there, generation_config.json of a model directory. Of a GGUF file: read_gguf_config().
/// \throws input_error
model_config load_model_config(const std::filesystem::path& directory);

}  // namespace mini_llm
