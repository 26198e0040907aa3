#include "gguf_model.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "config_fields.hpp"
#include "gguf_blocks.hpp"
#include "input_error.hpp"
#include "json_document.hpp"
#include "specattn/scalar.hpp"

namespace mini_llm {
namespace {

constexpr std::string_view architecture = "llama";
constexpr std::string_view rope_table = "rope_freqs.weight";
constexpr std::int64_t no_token = 0xffffffff;  // -1 in 32 bits, which some files have for a token that there is not

/// Keys of the architecture that are read here, or that change nothing although a word of theirs says so.
constexpr std::string_view known_keys[] = {"block_count",
                                           "embedding_length",
                                           "feed_forward_length",
                                           "vocab_size",
                                           "context_length",
                                           "attention.head_count",
                                           "attention.head_count_kv",
                                           "attention.key_length",
                                           "attention.value_length",
                                           "attention.layer_norm_rms_epsilon",
                                           "attention.causal",
                                           "attention.sliding_window",
                                           "rope.dimension_count",
                                           "rope.freq_base",
                                           "rope.scale_linear",
                                           "rope.scaling.type",
                                           "rope.scaling.factor",
                                           "rope.scaling.original_context_length",
                                           "rope.scaling.finetuned"};

std::string llama_key(std::string_view name) { return std::string(architecture) + "." + std::string(name); }

std::optional<gguf_value> find(const gguf_file& file, std::string_view name) { return file.find(llama_key(name)); }

std::int64_t count_of(const gguf_file& file, std::string_view name, std::int64_t high) {
  return file.at(llama_key(name)).integer(1, high);
}

std::int64_t count_or(const gguf_file& file, std::string_view name, std::int64_t high, std::int64_t absent) {
  const auto value = find(file, name);
  return value ? value->integer(1, high) : absent;
}

void refuse_other_models(const gguf_file& file) {
  const gguf_value value = file.at("general.architecture");
  if (value.text() != architecture) {
    value.refuse("models of the architecture " + in_quotes(value.text()) + " are not supported (\"llama\" is)");
  }
  if (const auto type = file.find("general.type"); type && type->text() != "model") {
    type->refuse("\"model\" expected, got " + in_quotes(type->text()));
  }
  if (const auto parts = file.find("split.count"); parts && parts->integer(0, 65535) > 1) {
    parts->refuse("the file is one of " + std::to_string(parts->integer(0, 65535)) +
                  " parts of a model, which are not read; `llama-gguf-split --merge` joins them");
  }
  if (const auto causal = find(file, "attention.causal"); causal && !causal->boolean()) {
    causal->refuse("attention to what follows is not supported");
  }
}

/// As JSON, which has no other characters: what is not ASCII matters to no comparison here.
std::string as_ascii(std::string_view text) {
  std::string result(text.substr(0, 100));
  for (char& c : result) c = c >= ' ' && c <= '~' ? c : '?';
  return result;
}

/// What config.json is asked, too: fields about arithmetic that nobody reads, known by their words.
void refuse_unread_keys(const gguf_file& file) {
  nlohmann::json unread = nlohmann::json::object();
  const std::string prefix = llama_key("");
  for (const auto& [key, value] : file.values()) {
    if (!key.starts_with(prefix)) continue;
    const std::string_view rest = key.substr(prefix.size());
    if (std::find(std::begin(known_keys), std::end(known_keys), rest) != std::end(known_keys)) continue;
    nlohmann::json& field = unread[as_ascii(key)];
    if (value.is_array()) {
      field = nlohmann::json::array({value.size()});
    } else if (value.is_text()) {
      field = as_ascii(value.text());
    } else if (value.type() == gguf_type::boolean) {
      field = value.boolean();
    } else {
      field = value.number(std::numeric_limits<double>::lowest(), std::numeric_limits<double>::max());
    }
  }
  refuse_unread_fields(json_field(unread, file.source()));
}

void read_heads(const gguf_file& file, model_config& config) {
  config.q_heads = count_of(file, "attention.head_count", max_heads);
  config.kv_heads = count_or(file, "attention.head_count_kv", max_heads, config.q_heads);
  if (config.q_heads % config.kv_heads != 0) {
    throw input_error(file.source(), llama_key("attention.head_count") + " " + std::to_string(config.q_heads) +
                                         " is not a multiple of " + llama_key("attention.head_count_kv") + " " +
                                         std::to_string(config.kv_heads));
  }
  const std::int64_t even_share = config.hidden % config.q_heads == 0 ? config.hidden / config.q_heads : 0;
  config.head_dim = count_or(file, "attention.key_length", max_head_dim, even_share);
  if (config.head_dim < 1 || config.head_dim > max_head_dim || config.head_dim % 2 != 0) {
    throw input_error(file.source(),
                      llama_key("embedding_length") + " " + std::to_string(config.hidden) + " over " +
                          llama_key("attention.head_count") + " " + std::to_string(config.q_heads) + ", or " +
                          llama_key("attention.key_length") + ", does not give a usable size of a head: " +
                          std::to_string(config.head_dim) + " (even, at most " + std::to_string(max_head_dim) + ")");
  }
  for (const std::string_view name : {"attention.value_length", "rope.dimension_count"}) {
    const auto value = find(file, name);
    if (value && value->integer(0, max_head_dim) != config.head_dim) {
      value->refuse(value->shown() + " differs from the size of a head, " + std::to_string(config.head_dim) +
                    ", which is not supported");
    }
  }
}

/// rope_freqs.weight: what the frequency of each pair is divided by.
std::vector<double> read_divisors(const gguf_file& file, std::int64_t head_dim) {
  const auto found = file.tensors().find(rope_table);
  if (found == file.tensors().end()) return {};
  const gguf_tensor& table = found->second;
  const std::string what = "tensor " + in_quotes(rope_table);
  if (table.type->name != "F32" || table.shape != std::vector<std::int64_t>{head_dim / 2}) {
    throw input_error(file.source(), what + " is of type " + std::string(table.type->name) + " and shape " +
                                         shape_text(table.shape) + "; F32 and [" + std::to_string(head_dim / 2) +
                                         "] are called for");
  }
  std::vector<double> divisors;
  for (std::size_t i = 0; i < table.bytes.size(); i += sizeof(float)) {
    float value = 0;
    std::memcpy(&value, table.bytes.data() + i, sizeof value);
    if (!(value >= 1e-6F && value <= 1e6F)) {
      throw input_error(file.source(), what + ": element " + std::to_string(i / sizeof value) + " is " +
                                           std::to_string(static_cast<double>(value)) +
                                           "; numbers from 1e-06 to 1e+06 are accepted");
    }
    divisors.push_back(static_cast<double>(value));
  }
  return divisors;
}

rope_config read_rope(const gguf_file& file, std::int64_t head_dim) {
  rope_config rope;
  if (const auto theta = find(file, "rope.freq_base")) rope.theta = theta->number(1.0, 1e15);
  rope.divisors = read_divisors(file, head_dim);
  const auto type = find(file, "rope.scaling.type");
  if (type && type->text() != "none" && type->text() != "linear") {
    type->refuse("rope scaling of the kind " + in_quotes(type->text()) +
                 " is not supported (none, linear and the table rope_freqs.weight are)");
  }
  auto factor = find(file, "rope.scaling.factor");
  if (!factor) factor = find(file, "rope.scale_linear");  // its name before there were kinds
  if (type && type->text() == "linear" && !factor) type->refuse("linear scaling without rope.scaling.factor");
  if (!factor || (type && type->text() == "none")) return rope;
  rope.factor = factor->number(0.0, 1e6);
  if (rope.factor == 0.0 || rope.factor == 1.0) return rope;  // 0 stands for none, too
  rope.factor = factor->number(1.0, 1e6);
  rope.scaling = rope_scaling::linear;
  return rope;
}

std::optional<std::int32_t> token_id(const gguf_file& file, std::string_view name, std::int64_t vocab) {
  const auto value = file.find("tokenizer.ggml." + std::string(name));
  if (!value || value->integer(-1, no_token) == -1 || value->integer(-1, no_token) == no_token) return std::nullopt;
  return static_cast<std::int32_t>(value->integer(0, vocab - 1));
}

/// A tensor that the model calls for, by both names.
struct wanted_tensor {
  std::string name;     // in the file
  std::string hf_name;  // of a Hugging Face directory
  std::vector<std::int64_t> shape;
  std::int64_t interleaved_heads =
      0;  // whose rows alternate between the two halves of a head; 0: rows are as they are
};

std::vector<wanted_tensor> wanted_tensors(const model_config& c) {
  const std::int64_t q_size = c.q_heads * c.head_dim;
  const std::int64_t kv_size = c.kv_heads * c.head_dim;
  std::vector<wanted_tensor> wanted;
  wanted.push_back({"token_embd.weight", "model.embed_tokens.weight", {c.vocab, c.hidden}});
  wanted.push_back({"output_norm.weight", "model.norm.weight", {c.hidden}});
  if (!c.tie_word_embeddings) wanted.push_back({"output.weight", "lm_head.weight", {c.vocab, c.hidden}});
  for (std::int64_t layer = 0; layer < c.layers; ++layer) {
    const std::string from = "blk." + std::to_string(layer) + ".";
    const std::string to = "model.layers." + std::to_string(layer) + ".";
    const auto add = [&](const char* name, const char* hf_name, std::vector<std::int64_t> shape,
                         std::int64_t heads = 0) {
      wanted.push_back({from + name + ".weight", to + hf_name + ".weight", std::move(shape), heads});
    };
    add("attn_norm", "input_layernorm", {c.hidden});
    add("attn_q", "self_attn.q_proj", {q_size, c.hidden}, c.q_heads);
    add("attn_k", "self_attn.k_proj", {kv_size, c.hidden}, c.kv_heads);
    add("attn_v", "self_attn.v_proj", {kv_size, c.hidden});
    add("attn_output", "self_attn.o_proj", {c.hidden, q_size});
    add("ffn_norm", "post_attention_layernorm", {c.hidden});
    add("ffn_gate", "mlp.gate_proj", {c.ffn, c.hidden});
    add("ffn_up", "mlp.up_proj", {c.ffn, c.hidden});
    add("ffn_down", "mlp.down_proj", {c.hidden, c.ffn});
  }
  return wanted;
}

/// Writes rows of a tensor as bf16.
struct row_reader {
  gguf_tensor tensor;
  std::int64_t interleaved_heads;

  void operator()(std::int64_t first, std::int64_t rows, std::span<std::byte> out) const {
    const auto inputs = static_cast<std::size_t>(tensor.shape.size() > 1 ? tensor.shape.back() : 1);
    // Elements of a vector are its rows; all at once, then.
    const std::int64_t step = tensor.shape.size() > 1 ? 1 : rows;
    const std::size_t row_bytes = inputs / tensor.type->block_elements * tensor.type->block_bytes;
    const auto read = gguf_blocks::reader_of(tensor.type->id);
    std::vector<float> values(inputs * static_cast<std::size_t>(step));
    std::byte* to = out.data();
    for (std::int64_t r = 0; r < rows; r += step) {
      const std::byte* const from =
          tensor.bytes.data() + static_cast<std::size_t>(row_in_file(first + r)) * row_bytes;
      read(from, tensor.type->block_bytes, tensor.type->block_elements, values.size() / tensor.type->block_elements,
           values.data());
      for (const float value : values) {
        const auto rounded = specattn::from_float<specattn::bf16>(value);
        std::memcpy(to, &rounded, sizeof rounded);
        to += sizeof rounded;
      }
    }
  }

  std::int64_t row_in_file(std::int64_t row) const {
    if (interleaved_heads == 0) return row;
    const std::int64_t head_dim = tensor.shape.front() / interleaved_heads;
    const std::int64_t in_head = row % head_dim;
    return row - in_head + in_head % (head_dim / 2) * 2 + in_head / (head_dim / 2);
  }
};

std::string reason_unread(std::string_view name, const model_config& config) {
  if (name.starts_with("blk.") && std::strtoll(std::string(name.substr(4)).c_str(), nullptr, 10) >= config.layers) {
    return llama_key("block_count") + " is " + std::to_string(config.layers);
  }
  if (name.find("lora_") != name.npos) return "adapters are not supported; merge them into the weights first";
  if (name.ends_with(".bias")) return "biases are not supported";
  if (name.find("norm") != name.npos) {
    return "norms other than those before attention, feed-forward and head are not supported";
  }
  if (name.find("exp") != name.npos) return "experts are not supported";
  return "the model that the metadata describe has no such weight";
}

void refuse_unread_tensors(const gguf_file& file, const model_config& config,
                           const std::vector<wanted_tensor>& wanted) {
  std::vector<std::string_view> read{rope_table};
  for (const wanted_tensor& w : wanted) read.push_back(w.name);
  std::sort(read.begin(), read.end());
  std::string_view first;
  std::size_t others = 0;
  for (const auto& [name, tensor] : file.tensors()) {
    if (std::binary_search(read.begin(), read.end(), name)) continue;
    if (others++ == 0) first = name;
  }
  if (others == 0) return;
  throw input_error(file.source(), "tensor " + in_quotes(first) +
                                       (others > 1 ? " (and " + std::to_string(others - 1) + " more)" : "") +
                                       " would be left out: " + reason_unread(first, config));
}

}  // namespace

model_config read_gguf_config(const gguf_file& file) {
  refuse_other_models(file);
  model_config config;
  config.layers = count_of(file, "block_count", max_layers);
  config.hidden = count_of(file, "embedding_length", max_hidden);
  config.ffn = count_of(file, "feed_forward_length", max_ffn);
  config.max_context = count_of(file, "context_length", max_positions);
  read_heads(file, config);
  config.vocab = count_or(file, "vocab_size", max_vocab, 0);
  if (config.vocab == 0) {
    const gguf_value tokens = file.at("tokenizer.ggml.tokens");
    config.vocab = static_cast<std::int64_t>(tokens.size());
    if (config.vocab < 1 || config.vocab > max_vocab) {
      tokens.expected("1 to " + std::to_string(max_vocab) + " tokens");
    }
  }
  refuse_unread_keys(file);
  if (const auto window = find(file, "attention.sliding_window")) {
    const std::int64_t positions = window->integer(0, max_positions);
    if (positions > 0 && positions < config.max_context) {
      config.sliding_window = positions;  // up to there it is the same as without
      config.max_context = positions;
    }
  }
  config.rms_norm_eps = file.at(llama_key("attention.layer_norm_rms_epsilon")).number(0.0, 1.0);
  config.rope = read_rope(file, config.head_dim);
  config.tie_word_embeddings = !file.tensors().contains("output.weight");
  config.bos_id = token_id(file, "bos_token_id", config.vocab);
  for (const std::string_view name : {"eos_token_id", "eot_token_id", "eom_token_id"}) {
    const auto id = token_id(file, name, config.vocab);
    if (id && std::find(config.eos_ids.begin(), config.eos_ids.end(), *id) == config.eos_ids.end()) {
      config.eos_ids.push_back(*id);
    }
  }
  return config;
}

safetensors_file::tensor_map gguf_weights(const gguf_file& file, const model_config& config) {
  const std::vector<wanted_tensor> wanted = wanted_tensors(config);
  safetensors_file::tensor_map tensors;
  for (const wanted_tensor& w : wanted) {
    const auto found = file.tensors().find(w.name);
    if (found == file.tensors().end()) {
      throw input_error(file.source(), "the weights lack the tensor " + in_quotes(w.name) + " of shape " +
                                           shape_text(w.shape) + " that the metadata call for");
    }
    const gguf_tensor& tensor = found->second;
    if (tensor.shape != w.shape) {
      throw input_error(file.source(), "tensor " + in_quotes(w.name) + " has shape " + shape_text(tensor.shape) +
                                           "; the metadata call for " + shape_text(w.shape));
    }
    if (tensor.shape.size() == 1 && tensor.type->block_elements > 1) {
      throw input_error(file.source(), "tensor " + in_quotes(w.name) + " is a vector of type " +
                                           std::string(tensor.type->name) +
                                           "; F32, F16 and BF16 are supported there");
    }
    stored_tensor& stored = tensors[w.hf_name];
    stored.type = dtype::bf16;
    stored.shape = tensor.shape;
    stored.bytes = tensor.bytes;
    stored.type_text = tensor.type->name;
    stored.source = file.source() + ": " + w.name;
    stored.decode = row_reader{tensor, w.interleaved_heads};
  }
  refuse_unread_tensors(file, config, wanted);
  return tensors;
}

}  // namespace mini_llm
