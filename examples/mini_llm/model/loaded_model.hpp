// A model directory or GGUF file, ready to run: configuration, tokenizer and, for the CPU, weights.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gguf_file.hpp"
#include "llama.hpp"
#include "model_config.hpp"
#include "model_files.hpp"
#include "text/tokenizer.hpp"

namespace mini_llm {

struct loaded_model {
  std::filesystem::path directory;  ///< or GGUF file
  model_config config;
  tokenizer words;
  std::unique_ptr<llama> model;   ///< null: the weights are left for the GPU
  std::optional<gguf_file> gguf;  ///< until the weights are loaded; nothing for a directory

  /// The weights where they lie. \throws input_error
  model_files files() const;

  /// The text as tokens, with what the tokenizer puts around it. A tokenizer may have tokens that the model lacks;
  /// only a text that holds one cannot be read.
  /// \throws input_error naming such a token
  std::vector<std::int32_t> encode(std::string_view text) const;
};

/// The most tokens one pass of a model takes here: a prefill chunk, or a verify pass that refreshes.
inline constexpr std::int32_t max_slots = 256;

/// Reads config.json and tokenizer.json of a Hugging Face directory, or the metadata of a GGUF file.
/// \throws input_error naming the file and what is wrong with it
loaded_model open_model(const std::filesystem::path& directory);

/// The same, and the weights. \throws input_error
loaded_model load_model(const std::filesystem::path& directory);

/// Refuses a draft whose ordinary tokens are not the target's, and makes its vocab as long as the target's: what the
/// two differ in are names of special tokens, and rows that pad an embedding.
/// \throws input_error naming the first difference
void fit_vocabulary(const loaded_model& target, loaded_model& draft);

/// Where the models that ship with the source lie: the environment's MINI_LLM_MODELS, else the source tree.
std::filesystem::path embedded_models();

/// The contents of a file, or of standard input for "-". \throws input_error, for a directory too
std::string read_text(const std::filesystem::path& file);

/// Refuses, before the work whose input or output it is to be, a file that cannot be read ("-" is standard input), or
/// written by write_text(): a directory, a device, a name in a folder that is not there or not writable.
/// \throws input_error
void require_readable(const std::filesystem::path& file);
void require_writable(const std::filesystem::path& file);

/// Writes a file whole or not at all: to a temporary name first, then renamed. \throws input_error
void write_text(const std::filesystem::path& file, std::string_view text);

}  // namespace mini_llm
