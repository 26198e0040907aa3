#include "model_config.hpp"

#include <array>
#include <string>
#include <system_error>

#include "config_fields.hpp"
#include "gguf_file.hpp"
#include "gguf_model.hpp"
#include "input_error.hpp"
#include "json_document.hpp"
#include "mapped_file.hpp"

namespace mini_llm {
namespace {

constexpr std::size_t max_config_bytes = 16U << 20;

constexpr std::size_t max_token_ids = 256;  // that end a text; real models have up to five

std::int64_t count_or(const json_field& root, std::string_view name, std::int64_t high, std::int64_t absent) {
  const auto field = root.find(name);
  return field ? field->integer(1, high) : absent;
}

bool flag_or(const json_field& root, std::string_view name, bool absent) {
  const auto field = root.find(name);
  return field ? field->boolean() : absent;
}

/// "llama" or "mistral", from `architectures` or, where that is absent, from `model_type`.
std::string read_family(const json_field& root) {
  if (const auto type = root.find("model_type"); type && type->text() != "llama" && type->text() != "mistral") {
    type->refuse("\"llama\" or \"mistral\" expected, got " + in_quotes(type->text()));
  }
  if (const auto architectures = root.find("architectures")) {
    for (std::size_t i = 0; i < architectures->size(); ++i) {
      if (architectures->at(i).text() == "LlamaForCausalLM") return "llama";
      if (architectures->at(i).text() == "MistralForCausalLM") return "mistral";
    }
    const std::string first =
        architectures->size() == 0 ? "none" : in_quotes(architectures->at(std::size_t{0}).text());
    architectures->refuse("LlamaForCausalLM or MistralForCausalLM expected, got " + first);
  }
  return root.at("model_type").text();
}

/// Attention may be limited to the newest positions; up to that many it is the same as without a limit, so the limit
/// becomes one of the context.
void read_window(const json_field& root, const std::string& family, model_config& config) {
  if (const auto partial = root.find("partial_rotary_factor")) partial->number(1.0, 1.0);
  const auto window = root.find("sliding_window");
  if (const auto types = root.find("layer_types")) {
    for (std::size_t i = 0; i < types->size(); ++i) {
      const std::string& type = types->at(i).text();
      if (type != "full_attention" && !(type == "sliding_attention" && window)) {
        types->at(i).refuse(in_quotes(type) + " is not supported");
      }
    }
  }
  if (!flag_or(root, "use_sliding_window", true)) return;
  // Mistral's default, when the field is absent, is a window of 4096; null switches it off.
  const bool by_default = family == "mistral" && !root.object().contains("sliding_window");
  if (!window && !by_default) return;
  const std::int64_t positions = window ? window->integer(1, INT64_MAX) : 4096;
  if (positions >= config.max_context) return;
  config.sliding_window = positions;
  config.max_context = positions;
}

void read_llama3(const json_field& field, rope_config& rope) {
  rope.scaling = rope_scaling::llama3;
  rope.factor = field.at("factor").number(1.0, 1e6);
  rope.low_freq_factor = field.at("low_freq_factor").number(1e-6, 1e6);
  rope.high_freq_factor = field.at("high_freq_factor").number(1e-6, 1e6);
  rope.original_max_context = field.at("original_max_position_embeddings").integer(1, max_positions);
  if (rope.high_freq_factor <= rope.low_freq_factor) {
    field.refuse("high_freq_factor " + std::to_string(rope.high_freq_factor) + " must exceed low_freq_factor " +
                 std::to_string(rope.low_freq_factor));
  }
}

/// The scaling itself: {"rope_type" or "type": kind, ...}.
void read_scaling(const json_field& field, rope_config& rope) {
  auto kind = field.find("rope_type");
  if (!kind) kind = field.find("type");
  if (!kind && field.find("factor")) field.refuse("a factor, but no rope_type that says what it scales");
  if (!kind || kind->text() == "default") return;
  if (kind->text() == "linear") {
    rope.scaling = rope_scaling::linear;
    rope.factor = field.at("factor").number(1.0, 1e6);
  } else if (kind->text() == "llama3") {
    read_llama3(field, rope);
  } else {
    kind->refuse("rope scaling of the kind " + in_quotes(kind->text()) +
                 " is not supported (default, linear and llama3 are)");
  }
}

rope_config read_rope(const json_field& root) {
  constexpr double max_theta = 1e15;
  rope_config rope;
  if (const auto theta = root.find("rope_theta")) rope.theta = theta->number(1.0, max_theta);
  if (const auto scaling = root.find("rope_scaling")) {
    if (const auto theta = scaling->find("rope_theta")) rope.theta = theta->number(1.0, max_theta);
    read_scaling(*scaling, rope);
  }
  // The newer spelling holds the base and the scaling in one object.
  if (const auto parameters = root.find("rope_parameters")) {
    for (const auto& [name, value] : parameters->object().get_ref<const nlohmann::json::object_t&>()) {
      if (value.is_structured())
        parameters->at(name).refuse("parameters of its own for each kind of layer are not supported");
    }
    if (const auto theta = parameters->find("rope_theta")) {
      rope.theta = theta->number(1.0, max_theta);
    }
    if (const auto partial = parameters->find("partial_rotary_factor")) partial->number(1.0, 1.0);
    read_scaling(*parameters, rope);
  }
  return rope;
}

/// A token id or a list of them; absent and null leave `ids` as it is, -1 is no token.
void read_token_ids(const json_field& root, std::string_view name, std::int64_t vocab,
                    std::vector<std::int32_t>& ids) {
  const auto field = root.find(name);
  if (!field) return;
  ids.clear();
  if (!field->is_array()) {
    const std::int64_t id = field->integer(-1, vocab - 1);
    if (id >= 0) ids.push_back(static_cast<std::int32_t>(id));
    return;
  }
  if (field->size() > max_token_ids) {
    field->refuse(std::to_string(field->size()) + " ids (at most " + std::to_string(max_token_ids) +
                  " are accepted)");
  }
  for (std::size_t i = 0; i < field->size(); ++i) {
    ids.push_back(static_cast<std::int32_t>(field->at(i).integer(0, vocab - 1)));
  }
}

void read_marks(const json_field& root, model_config& config) {
  std::vector<std::int32_t> bos;
  read_token_ids(root, "bos_token_id", config.vocab, bos);
  if (!bos.empty()) config.bos_id = bos.front();
  read_token_ids(root, "eos_token_id", config.vocab, config.eos_ids);
}

void read_shape(const json_field& root, model_config& config) {
  config.layers = root.at("num_hidden_layers").integer(1, max_layers);
  config.hidden = root.at("hidden_size").integer(1, max_hidden);
  config.q_heads = root.at("num_attention_heads").integer(1, max_heads);
  config.kv_heads = count_or(root, "num_key_value_heads", max_heads, config.q_heads);
  if (config.q_heads % config.kv_heads != 0) {
    root.refuse("num_attention_heads " + std::to_string(config.q_heads) +
                " is not a multiple of num_key_value_heads " + std::to_string(config.kv_heads));
  }
  config.head_dim = count_or(root, "head_dim", max_head_dim, 0);
  if (config.head_dim == 0) {
    config.head_dim = config.hidden / config.q_heads;
    if (config.hidden % config.q_heads != 0 || config.head_dim > max_head_dim) {
      root.refuse("hidden_size " + std::to_string(config.hidden) + " over num_attention_heads " +
                  std::to_string(config.q_heads) + " does not give a usable head_dim");
    }
  }
  if (config.head_dim % 2 != 0) {
    root.refuse("head_dim " + std::to_string(config.head_dim) + " is odd; rotary embedding turns pairs");
  }
  config.ffn = root.at("intermediate_size").integer(1, max_ffn);
  config.vocab = root.at("vocab_size").integer(1, max_vocab);
  config.max_context = root.at("max_position_embeddings").integer(1, max_positions);
}

}  // namespace

model_config parse_model_config(std::string_view config_text, std::string_view generation_text,
                                std::string_view source) {
  const nlohmann::json document = parse_json(quote_python_numbers(config_text), source);
  const json_field root(document, source);
  const std::string family = read_family(root);
  model_config config;
  read_shape(root, config);
  refuse_unread_fields(root);
  read_window(root, family, config);
  if (const auto eps = root.find("rms_norm_eps")) config.rms_norm_eps = eps->number(0.0, 1.0);
  config.rope = read_rope(root);
  config.tie_word_embeddings = flag_or(root, "tie_word_embeddings", false);
  read_marks(root, config);
  if (!generation_text.empty()) {
    constexpr std::string_view generation_source = "generation_config.json";
    const nlohmann::json generation = parse_json(quote_python_numbers(generation_text), generation_source);
    read_marks(json_field(generation, generation_source), config);
  }
  return config;
}

model_config load_model_config(const std::filesystem::path& directory) {
  if (is_gguf_file(directory)) return read_gguf_config(gguf_file::open(directory));
  const std::filesystem::path config_path = directory / "config.json";
  const std::filesystem::path generation_path = directory / "generation_config.json";
  const mapped_file config(config_path, max_config_bytes);
  std::error_code ignored;  // absent or not to be seen: the same as not given
  mapped_file generation;
  if (std::filesystem::exists(generation_path, ignored)) {
    generation = mapped_file(generation_path, max_config_bytes);
  }
  return parse_model_config(config.text(), generation.text(), config_path.string());
}

}  // namespace mini_llm
