#include "config_fields.hpp"

#include <algorithm>
#include <iterator>
#include <span>
#include <vector>

namespace mini_llm {
namespace {

/// What this program reads, and what changes nothing although its name holds one of the words below.
constexpr std::string_view harmless_fields[] = {"rms_norm_eps",
                                                "norm_eps",
                                                "layer_norm_eps",
                                                "layer_norm_epsilon",
                                                "rms_norm",
                                                "use_rms_norm",
                                                "rope_theta",
                                                "rope_scaling",
                                                "rope_parameters",
                                                "partial_rotary_factor",
                                                "sliding_window",
                                                "sliding_window_pattern",
                                                "use_sliding_window",
                                                "max_window_layers",
                                                "scale_attn_weights",
                                                "max_sliding_window",
                                                "no_bias"};

/// Words of fields about training alone.
constexpr std::string_view training_words[] = {"grad", "gradient", "train", "training",    "optimizer", "lr",
                                               "loss", "dropout",  "init",  "initializer", "aux"};

constexpr std::string_view bias_words[] = {"bias", "biases"};

/// Words that stand for arithmetic of its own, which null, false, 0 or nothing switches off.
constexpr std::string_view switch_words[] = {
    "alibi",   "qk",          "moe",          "expert",    "experts", "lora",    "adapter", "adapters",
    "logn",    "ntk",         "yarn",         "sink",      "sinks",   "clip",    "cap",     "capping",
    "softcap", "softcapping", "nope",         "cross",     "mup",     "sliding", "window",  "chunk",
    "nextn",   "compression", "quantization", "quantized", "quant",   "residual"};

/// Words that stand for a factor, which 1 switches off; 0 does not.
constexpr std::string_view factor_words[] = {"multiplier", "scale", "scales",  "scaling", "scalar", "factor",
                                             "mscale",     "pct",   "percent", "rotary",  "rope",   "mrope"};

/// Words of norms: a number is an epsilon and harmless, a kind or a switch is not.
constexpr std::string_view norm_words[] = {"norm", "norms", "layernorm", "normalization"};

std::string lower(std::string_view text) {
  std::string result(text);
  for (char& c : result) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  return result;
}

std::vector<std::string> words_of(std::string_view name) {
  std::vector<std::string> words(1);
  for (const char c : lower(name)) {
    if (c == '_' || c == '.' || c == '-') {
      words.emplace_back();
    } else {
      words.back() += c;
    }
  }
  return words;
}

bool has(const std::vector<std::string>& words, std::span<const std::string_view> listed) {
  return std::any_of(words.begin(), words.end(), [&](const std::string& word) {
    return std::find(listed.begin(), listed.end(), word) != listed.end();
  });
}

bool is_off(const nlohmann::json& value) {
  if (value.is_number()) return value.get<double>() == 0.0;
  if (value.is_string()) return value == "" || value == "none" || value == "default";
  return value.is_null() || value == false || (value.is_structured() && value.empty());
}

bool is_one(const nlohmann::json& value) { return value.is_number() && value.get<double>() == 1.0; }

bool is_rms_norm(const nlohmann::json& value) {
  if (!value.is_string()) return false;
  const std::string kind = lower(value.get_ref<const std::string&>());
  return kind == "rmsnorm" || kind == "rms_norm" || kind == "rms";
}

/// Why a field cannot be left unread; nothing when it can.
std::string reason(std::string_view name, const nlohmann::json& value) {
  const std::vector<std::string> words = words_of(name);
  if (has(words, training_words)) return {};
  if (has(words, bias_words)) return is_off(value) ? "" : "biases are not supported";
  const std::string unread = "would change the model's arithmetic, and is not supported";
  if (has(words, factor_words)) {
    const bool zero = value.is_number() && is_off(value);
    return is_one(value) || (is_off(value) && !zero) ? "" : unread;
  }
  if (has(words, switch_words)) return is_off(value) ? "" : unread;
  if (has(words, norm_words)) return value.is_number() || is_off(value) || is_rms_norm(value) ? "" : unread;
  // "parallel" alone would hit fields about distributed training.
  if (name == "parallel_attn" || name == "parallel_attention" || name == "parallel_block") {
    return is_off(value) ? "" : unread;
  }
  return {};
}

bool is_activation(std::string_view name) {
  return name == "hidden_act" || name == "hidden_activation" || name == "activation_function" || name == "act_fn" ||
         name == "activation";
}

}  // namespace

void refuse_unread_fields(const json_field& root) {
  for (const auto& [name, value] : root.object().get_ref<const nlohmann::json::object_t&>()) {
    if (value.is_null()) continue;
    const json_field field = root.at(name);
    if (is_activation(name)) {
      if (field.text() != "silu" && field.text() != "swish") {
        field.refuse("\"silu\" expected, got " + in_quotes(field.text()));
      }
      continue;
    }
    if (std::find(std::begin(harmless_fields), std::end(harmless_fields), name) != std::end(harmless_fields))
      continue;
    const std::string problem = reason(name, value);
    if (problem.empty()) continue;
    field.refuse((value.is_structured() ? "" : value.dump().substr(0, 40) + ": ") + problem);
  }
}

std::string quote_python_numbers(std::string_view text) {
  std::string result;
  result.reserve(text.size());
  bool in_text = false;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t length = 1;
    if (in_text) {
      if (text[at] == '\\') length = std::min<std::size_t>(2, text.size() - at);
      if (text[at] == '"') in_text = false;
    } else {
      if (text[at] == '"') in_text = true;
      for (const std::string_view word : {"NaN", "Infinity", "-Infinity"}) {
        if (text.substr(at).starts_with(word)) length = word.size();
      }
    }
    const std::string_view part = text.substr(at, length);
    const bool quote = !in_text && length > 2;
    result += quote ? '"' + std::string(part) + '"' : std::string(part);
    at += length;
  }
  return result;
}

}  // namespace mini_llm
