#include "unread_weights.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string_view>

#include "input_error.hpp"
#include "json_document.hpp"

namespace mini_llm {
namespace {

constexpr std::string_view head_name = "lm_head.weight";
constexpr std::string_view embedding_name = "model.embed_tokens.weight";
constexpr std::string_view layer_prefix = "model.layers.";

/// Angles of the rotary embedding, which older checkpoints store.
bool is_rotary_table(std::string_view name) {
  for (const std::string_view table :
       {"rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "rope.freqs", "freqs_cis"}) {
    if (name == table || (name.ends_with(table) && name[name.size() - table.size() - 1] == '.')) return true;
  }
  return false;
}

/// Whether a head of its own is the embedding again.
bool is_embedding_copy(const model_files& files) {
  const stored_tensor* const head = files.find(head_name);
  const stored_tensor* const embedding = files.find(embedding_name);
  return head != nullptr && embedding != nullptr && head->type == embedding->type &&
         head->shape == embedding->shape &&
         std::equal(head->bytes.begin(), head->bytes.end(), embedding->bytes.begin(), embedding->bytes.end());
}

bool contains(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

/// Why the model has no use for a tensor.
std::string reason(const std::string& name, const model_config& config) {
  if (name == head_name) return "config.json ties it to " + in_quotes(embedding_name) + ", which is not the same";
  if (name.starts_with(layer_prefix) &&
      std::strtoll(name.c_str() + layer_prefix.size(), nullptr, 10) >= config.layers) {
    return "config.json has num_hidden_layers " + std::to_string(config.layers);
  }
  if (contains(name, "lora_")) return "adapters are not supported; merge them into the weights first";
  if (name.ends_with("bias")) return "biases are not supported, but for Qwen2's of queries, keys and values";
  if (contains(name, "norm"))
    return "norms other than those before attention, feed-forward and head, and Qwen3's of heads, are not supported";
  if (contains(name, "scale") || contains(name, "zero") || contains(name, "quant")) {
    return "quantised weights are not supported";
  }
  return "the model that config.json describes has no such weight";
}

}  // namespace

void refuse_unread_weights(const model_config& config, const model_files& files, std::span<const std::string> read) {
  const std::set<std::string_view> wanted(read.begin(), read.end());
  std::string first;
  int others = -1;
  for (const std::string& name : files.names()) {
    if (wanted.count(name) != 0 || is_rotary_table(name)) continue;
    if (name == head_name && config.tie_word_embeddings && is_embedding_copy(files)) continue;
    if (++others == 0) first = name;
  }
  if (others < 0) return;
  throw input_error(files.find(first)->source,
                    "tensor " + in_quotes(first) +
                        (others > 0 ? " (and " + std::to_string(others) + " more)" : std::string()) +
                        " would be left out: " + reason(first, config));
}

}  // namespace mini_llm
