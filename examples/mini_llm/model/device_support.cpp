#include "device_support.hpp"

#include <string>

#include "input_error.hpp"

namespace mini_llm {

void require_device_model(const model_config& config, std::string_view source) {
  const auto refuse = [&](const std::string& what) {
    throw input_error(source, "the model has " + what + ", which --device cuda does not compute; the CPU runs it");
  };
  if (config.query_key_value_biases) refuse("biases of queries, keys and values (Qwen2)");
  if (config.query_key_norms) refuse("norms of queries and keys (Qwen3)");
  if (config.rope.attention_factor != 1.0) {
    refuse("a rope scaling with an attention factor of " + std::to_string(config.rope.attention_factor) + " (yarn)");
  }
}

}  // namespace mini_llm
