// The embedded pair and its golden values, and a run of a model over a text.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <string>
#include <vector>

#include "model/llama.hpp"
#include "model/model_files.hpp"
#include "model/safetensors.hpp"

inline std::filesystem::path source_path(const std::string& below) {
  return std::filesystem::path(SPECATTN_SOURCE_DIR) / below;
}

/// A model of examples/models.
inline mini_llm::llama load_model(const std::string& name, std::int32_t max_slots = 256) {
  const std::filesystem::path directory = source_path("examples/models/" + name);
  return mini_llm::llama(mini_llm::load_model_config(directory), mini_llm::model_files::open(directory), max_slots,
                         name);
}

/// Values of one file of tests/golden.
class golden_values {
 public:
  explicit golden_values(const std::string& name)
      : file_(mini_llm::safetensors_file::open(source_path("tests/golden/" + name + ".safetensors"))) {}

  template <class T>
  std::vector<T> get(const std::string& tensor_name) const {
    const mini_llm::stored_tensor& tensor = *file_.find(tensor_name);
    std::vector<T> values(tensor.size());
    std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
    return values;
  }
  std::vector<float> floats(const std::string& tensor_name) const { return get<float>(tensor_name); }
  std::vector<std::int32_t> ids(const std::string& tensor_name) const { return get<std::int32_t>(tensor_name); }

 private:
  mini_llm::safetensors_file file_;
};

/// Feeds tokens behind what the attention holds, `chunk` at a time, and returns the logits of every token.
/// \return [tokens, vocab]
template <class Attention>
std::vector<float> all_logits(specattn::context<specattn::cpu>& ctx, mini_llm::llama& model, Attention& attention,
                              const std::vector<std::int32_t>& tokens, std::size_t chunk) {
  const auto vocab = static_cast<std::size_t>(model.shape().vocab);
  std::vector<float> logits(tokens.size() * vocab);
  for (std::size_t first = 0; first < tokens.size(); first += chunk) {
    const std::size_t count = std::min(chunk, tokens.size() - first);
    std::vector<std::int32_t> positions(count);
    std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(attention.length()));
    std::vector<std::int32_t> rows(count);
    std::iota(rows.begin(), rows.end(), 0);
    model.forward(ctx, {{tokens.data() + first, count}, positions, rows}, attention,
                  specattn::view<float, 2>(logits.data() + first * vocab,
                                           {static_cast<std::ptrdiff_t>(count), model.shape().vocab}));
    attention.advance(static_cast<std::int64_t>(count));
  }
  return logits;
}
