#include "model_config.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>
#include <system_error>

#include "config_fields.hpp"
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

struct family {
  std::string_view type;
  std::string_view architecture;
  std::int64_t head_dim = 0;       ///< where the field is absent; 0: hidden over heads
  bool window_unless_told = true;  ///< where use_sliding_window is absent
  bool query_key_value_biases = false;
  bool query_key_norms = false;
};

constexpr family families[] = {{"llama", "LlamaForCausalLM"},
                               {"mistral", "MistralForCausalLM"},
                               {"qwen2", "Qwen2ForCausalLM", 0, false, true, false},
                               {"qwen3", "Qwen3ForCausalLM", 128, false, false, true}};

/// From `architectures` or, where that is absent, from `model_type`.
const family& read_family(const json_field& root) {
  const auto find = [](std::string_view family::*member, const std::string& name) -> const family* {
    for (const family& known : families) {
      if (known.*member == name) return &known;
    }
    return nullptr;
  };
  if (const auto type = root.find("model_type"); type && find(&family::type, type->text()) == nullptr) {
    type->refuse("\"llama\", \"mistral\", \"qwen2\" or \"qwen3\" expected, got " + in_quotes(type->text()));
  }
  if (const auto architectures = root.find("architectures")) {
    for (std::size_t i = 0; i < architectures->size(); ++i) {
      if (const family* known = find(&family::architecture, architectures->at(i).text())) return *known;
    }
    const std::string first =
        architectures->size() == 0 ? "none" : in_quotes(architectures->at(std::size_t{0}).text());
    architectures->refuse(
        "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM expected, got " + first);
  }
  return *find(&family::type, root.at("model_type").text());
}

/// Attention may be limited to the newest positions; up to that many it is the same as without a limit, so the limit
/// becomes one of the context.
void read_window(const json_field& root, const family& of, model_config& config) {
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
  if (!flag_or(root, "use_sliding_window", of.window_unless_told)) return;
  // Mistral's default, when the field is absent, is a window of 4096; null switches it off.
  const bool by_default = of.type == "mistral" && !root.object().contains("sliding_window");
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

/// Where the scaling does not state it: 0.1 ln(factor) + 1, or what DeepSeek's two fields make of it.
double default_attention_factor(const json_field& field, double factor) {
  const auto grown = [&](double scale) { return factor <= 1.0 ? 1.0 : 0.1 * scale * std::log(factor) + 1.0; };
  const auto scale = field.find("mscale");
  const auto scale_all = field.find("mscale_all_dim");
  if (!scale || !scale_all) return grown(1.0);
  const double one = scale->number(0.0, 1e3);
  const double all = scale_all->number(0.0, 1e3);
  return one == 0.0 || all == 0.0 ? grown(1.0) : grown(one) / grown(all);
}

/// What may stand in a scaling of the kind yarn: what is read, and what changes nothing.
constexpr std::string_view yarn_fields[] = {"rope_type",
                                            "type",
                                            "rope_theta",
                                            "factor",
                                            "original_max_position_embeddings",
                                            "attention_factor",
                                            "beta_fast",
                                            "beta_slow",
                                            "mscale",
                                            "truncate",
                                            "mscale_all_dim",
                                            "finetuned",
                                            "partial_rotary_factor"};

void read_yarn(const json_field& field, model_config& config) {
  rope_config& rope = config.rope;
  for (const auto& [name, value] : field.object().get_ref<const nlohmann::json::object_t&>()) {
    if (value.is_null() || std::find(std::begin(yarn_fields), std::end(yarn_fields), name) != std::end(yarn_fields)) {
      continue;
    }
    field.at(name).refuse((value.is_structured() ? "" : value.dump().substr(0, 40) + ": ") +
                          "this part of rope scaling of the kind \"yarn\" is not supported");
  }
  rope.scaling = rope_scaling::yarn;
  if (rope.theta <= 1.0) field.refuse("yarn needs a rope_theta above 1, got " + std::to_string(rope.theta));
  rope.factor = field.at("factor").number(1.0, 1e6);
  rope.original_max_context = config.max_context;
  if (const auto original = field.find("original_max_position_embeddings")) {
    rope.original_max_context = original->integer(1, max_positions);
    // Qwen's recipe for a longer context adds the scaling and leaves max_position_embeddings as it was.
    const double longer =
        std::min(rope.factor * static_cast<double>(rope.original_max_context), static_cast<double>(max_positions));
    config.max_context = std::max(config.max_context, static_cast<std::int64_t>(longer));
  }
  const auto number_or = [&](std::string_view name, double low, double absent) {
    const auto number = field.find(name);
    return number ? number->number(low, 1e6) : absent;
  };
  rope.ramp.fast = number_or("beta_fast", 1e-6, rope.ramp.fast);
  rope.ramp.slow = number_or("beta_slow", 1e-6, rope.ramp.slow);
  rope.ramp.whole_pairs = flag_or(field, "truncate", rope.ramp.whole_pairs);
  rope.attention_factor = number_or("attention_factor", 1e-6, default_attention_factor(field, rope.factor));
  if (rope.ramp.fast < rope.ramp.slow) {
    field.refuse("beta_fast " + std::to_string(rope.ramp.fast) + " must be at least beta_slow " +
                 std::to_string(rope.ramp.slow));
  }
}

/// The scaling itself: {"rope_type" or "type": kind, ...}.
void read_scaling(const json_field& field, model_config& config) {
  rope_config& rope = config.rope;
  auto kind = field.find("rope_type");
  if (!kind) kind = field.find("type");
  if (const auto partial = field.find("partial_rotary_factor")) partial->number(1.0, 1.0);
  if (!kind && field.find("factor")) field.refuse("a factor, but no rope_type that says what it scales");
  if (!kind || kind->text() == "default") return;
  if (kind->text() == "linear") {
    rope.scaling = rope_scaling::linear;
    rope.factor = field.at("factor").number(1.0, 1e6);
  } else if (kind->text() == "llama3") {
    read_llama3(field, rope);
  } else if (kind->text() == "yarn") {
    read_yarn(field, config);
  } else {
    kind->refuse("rope scaling of the kind " + in_quotes(kind->text()) +
                 " is not supported (default, linear, llama3 and yarn are)");
  }
}

void read_rope(const json_field& root, model_config& config) {
  constexpr double max_theta = 1e15;
  rope_config& rope = config.rope;
  if (const auto theta = root.find("rope_theta")) rope.theta = theta->number(1.0, max_theta);
  if (const auto scaling = root.find("rope_scaling")) {
    if (const auto theta = scaling->find("rope_theta")) rope.theta = theta->number(1.0, max_theta);
    read_scaling(*scaling, config);
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
    read_scaling(*parameters, config);
  }
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

void read_shape(const json_field& root, const family& of, model_config& config) {
  config.layers = root.at("num_hidden_layers").integer(1, max_layers);
  config.hidden = root.at("hidden_size").integer(1, max_hidden);
  config.q_heads = root.at("num_attention_heads").integer(1, max_heads);
  config.kv_heads = count_or(root, "num_key_value_heads", max_heads, config.q_heads);
  if (config.q_heads % config.kv_heads != 0) {
    root.refuse("num_attention_heads " + std::to_string(config.q_heads) +
                " is not a multiple of num_key_value_heads " + std::to_string(config.kv_heads));
  }
  config.head_dim = count_or(root, "head_dim", max_head_dim, of.head_dim);
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
  const family& of = read_family(root);
  model_config config;
  config.query_key_value_biases = of.query_key_value_biases;
  config.query_key_norms = of.query_key_norms;
  read_shape(root, of, config);
  refuse_unread_fields(root);
  if (const auto eps = root.find("rms_norm_eps")) config.rms_norm_eps = eps->number(0.0, 1.0);
  read_rope(root, config);
  read_window(root, of, config);
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
