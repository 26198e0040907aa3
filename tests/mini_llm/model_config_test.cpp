#include "model/model_config.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "damaged_input.hpp"
#include "input_error.hpp"

using namespace mini_llm;
using nlohmann::json;

namespace {

/// Llama 3.2's shape.
json good() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false, "mlp_bias": false,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "tie_word_embeddings": true, "vocab_size": 128256})");
}

model_config with(const char* pointer, const json& value) {
  json file = good();
  file[json::json_pointer(pointer)] = value;
  return parse_model_config(file.dump());
}

model_config without(const char* name) {
  json file = good();
  file.erase(name);
  return parse_model_config(file.dump());
}

void refused(const char* pointer, const json& value, std::initializer_list<const char*> words) {
  const std::string message = refusal([&] { with(pointer, value); });
  CAPTURE(message);
  CHECK(message.starts_with("config.json: "));
  for (const char* word : words) {
    CAPTURE(word);
    CHECK(message.find(word) != std::string::npos);
  }
}

}  // namespace

TEST_CASE("model_config: the embedded models' files say what their card says") {
  const model_config target = load_model_config(source_path("examples/models/books-7m"));
  CHECK(target.layers == 8);
  CHECK(target.hidden == 256);
  CHECK(target.q_heads == 4);
  CHECK(target.kv_heads == 2);
  CHECK(target.head_dim == 64);
  CHECK(target.ffn == 704);
  CHECK(target.vocab == 4096);
  CHECK(target.max_context == 4096);
  CHECK(target.rms_norm_eps == 1e-5);
  CHECK(target.rope.theta == 100000.0);
  CHECK(target.rope.scaling == rope_scaling::none);
  CHECK(target.tie_word_embeddings);
  CHECK(target.bos_id == 0);
  CHECK(target.eos_ids == std::vector<std::int32_t>{0});
  CHECK(load_model_config(source_path("examples/models/books-1m")).layers == 4);
}

TEST_CASE("model_config: Llama 3's rope scaling and list of end tokens are read") {
  const model_config config = parse_model_config(good().dump());
  CHECK(config.rope.scaling == rope_scaling::llama3);
  CHECK(config.rope.theta == 500000.0);
  CHECK(config.rope.factor == 32.0);
  CHECK(config.rope.low_freq_factor == 1.0);
  CHECK(config.rope.high_freq_factor == 4.0);
  CHECK(config.rope.original_max_context == 8192);
  CHECK(config.eos_ids == std::vector<std::int32_t>{128001, 128008, 128009});
}

TEST_CASE("model_config: the newer rope_parameters form means the same") {
  json file = good();
  file["rope_parameters"] = file["rope_scaling"];
  file["rope_parameters"]["rope_theta"] = 250000.0;
  file.erase("rope_scaling");
  file.erase("rope_theta");
  const model_config config = parse_model_config(file.dump());
  CHECK(config.rope.scaling == rope_scaling::llama3);
  CHECK(config.rope.theta == 250000.0);
  file["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 10000}};
  CHECK(parse_model_config(file.dump()).rope.scaling == rope_scaling::none);
  CHECK(parse_model_config(file.dump()).rope.theta == 10000.0);
}

TEST_CASE("model_config: other kinds of rope scaling are read or refused by name") {
  const model_config linear = with("/rope_scaling", {{"type", "linear"}, {"factor", 4}});
  CHECK(linear.rope.scaling == rope_scaling::linear);
  CHECK(linear.rope.factor == 4.0);
  CHECK(with("/rope_scaling", nullptr).rope.scaling == rope_scaling::none);
  refused("/rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}, {"rope_scaling.type", "dynamic"});
  refused("/rope_scaling/rope_type", "longrope", {"rope_scaling.rope_type", "longrope"});
  refused("/rope_scaling/factor", 0.0, {"rope_scaling.factor", "0.0"});
  refused("/rope_scaling/factor", nullptr, {"factor", "missing"});
  refused("/rope_scaling/high_freq_factor", 1.0, {"high_freq_factor", "low_freq_factor"});
  refused("/rope_scaling", "linear", {"rope_scaling", "object"});
  refused("/rope_scaling", {{"factor", 4.0}}, {"rope_scaling", "rope_type"});
  refused("/rope_parameters", {{"full_attention", {{"rope_theta", 1e6}}}}, {"rope_parameters.full_attention"});
  refused("/partial_rotary_factor", 0.5, {"partial_rotary_factor", "0.5"});
}

TEST_CASE("model_config: absent fields take the family's defaults") {
  CHECK(without("num_key_value_heads").kv_heads == 32);
  CHECK(without("head_dim").head_dim == 64);
  CHECK(with("/head_dim", nullptr).head_dim == 64);
  CHECK(with("/head_dim", 128).head_dim == 128);
  CHECK(without("rope_theta").rope.theta == 10000.0);
  CHECK(without("rms_norm_eps").rms_norm_eps == 1e-6);
  CHECK_FALSE(without("tie_word_embeddings").tie_word_embeddings);
  CHECK(without("eos_token_id").eos_ids.empty());
  CHECK_FALSE(without("bos_token_id").bos_id);
  CHECK(without("architectures").layers == 16);
  for (const char* name : {"num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size",
                           "vocab_size", "max_position_embeddings"}) {
    CHECK(refusal([&] { without(name); }).find(name) != std::string::npos);
  }
}

TEST_CASE("model_config: generation_config.json overrides the begin and end tokens, and only those") {
  const std::string config = good().dump();
  const model_config both = parse_model_config(config, R"({"eos_token_id": 7, "bos_token_id": 6, "vocab_size": 1})");
  CHECK(both.eos_ids == std::vector<std::int32_t>{7});
  CHECK(both.bos_id == 6);
  CHECK(both.vocab == 128256);
  CHECK(parse_model_config(config, R"({"eos_token_id": null})").eos_ids.size() == 3);
  const std::string message = refusal([&] { parse_model_config(config, R"({"eos_token_id": [128256]})"); });
  CHECK(message.find("generation_config.json: eos_token_id[0]") != std::string::npos);
}

TEST_CASE("model_config: a sliding window limits the context, up to which it changes nothing") {
  json file = good();
  file["architectures"] = {"MistralForCausalLM"};
  file["model_type"] = "mistral";
  const auto context = [&] { return parse_model_config(file.dump()).max_context; };
  file["sliding_window"] = nullptr;
  CHECK(context() == 131072);
  file["sliding_window"] = 131072;
  CHECK(context() == 131072);
  CHECK_FALSE(parse_model_config(file.dump()).sliding_window);
  file["sliding_window"] = 1024;
  CHECK(context() == 1024);
  CHECK(parse_model_config(file.dump()).sliding_window == 1024);
  file["use_sliding_window"] = false;
  CHECK(context() == 131072);
  file.erase("use_sliding_window");
  file["layer_types"] = {"sliding_attention", "full_attention"};
  CHECK(context() == 1024);
  file["layer_types"] = {"linear_attention"};
  CHECK(refusal(context).find("layer_types[0]: \"linear_attention\"") != std::string::npos);
  file.erase("layer_types");
  file.erase("sliding_window");
  CHECK(context() == 4096);  // the family's default
  CHECK(with("/sliding_window", 512).max_context == 512);
}

TEST_CASE("model_config: what would change the arithmetic is refused by name and value") {
  refused("/architectures", {"Qwen2MoeForCausalLM"}, {"architectures", "Qwen2MoeForCausalLM"});
  refused("/architectures", json::array(), {"architectures", "none"});
  refused("/attention_bias", true, {"attention_bias"});
  refused("/mlp_bias", true, {"mlp_bias"});
  refused("/hidden_act", "gelu", {"hidden_act", "gelu"});
  CHECK(with("/hidden_act", "swish").layers == 16);  // silu by its other name
  refused("/model_type", "qwen2_moe", {"model_type", "qwen2_moe"});
  refused("/quantization_config", {{"bits", 4}}, {"quantization_config"});
  refused("/tie_word_embeddings", "yes", {"tie_word_embeddings", "yes"});
}

TEST_CASE("model_config: fields that nobody reads are refused where they would change the arithmetic") {
  for (const char* name :
       {"bias", "qkv_bias", "use_bias", "lm_head_bias", "attention_out_bias", "qk_norm", "use_qk_norm",
        "qk_layernorm", "use_post_norm", "parallel_attn", "alibi", "use_logn_attn", "use_dynamic_ntk", "use_mrope",
        "rope_interleaved", "use_parallel_residual", "add_cross_attention"}) {
    const std::string pointer = std::string("/") + name;
    refused(pointer.c_str(), true, {name, "true"});
    CHECK(with(pointer.c_str(), false).layers == 16);
    CHECK(with(pointer.c_str(), nullptr).layers == 16);
  }
  for (const char* name : {"attention_multiplier", "residual_multiplier", "embedding_multiplier", "logit_scale",
                           "logits_scaling", "scale_emb", "query_pre_attn_scalar", "rotary_pct"}) {
    const std::string pointer = std::string("/") + name;
    refused(pointer.c_str(), 0.25, {name, "0.25"});
    refused(pointer.c_str(), 0.0, {name, "0.0"});
    CHECK(with(pointer.c_str(), 1.0).layers == 16);
    CHECK(with(pointer.c_str(), 1).layers == 16);
  }
  for (const char* name : {"final_logit_softcapping", "attn_logit_softcapping", "clip_qkv", "num_local_experts"}) {
    const std::string pointer = std::string("/") + name;
    refused(pointer.c_str(), 30, {name, "30"});
    CHECK(with(pointer.c_str(), 0).layers == 16);
  }
  refused("/norm_type", "layernorm", {"norm_type", "layernorm"});
  refused("/quantization", {{"bits", 4}}, {"quantization"});
  refused("/no_rope_layers", {1, 0}, {"no_rope_layers"});
}

TEST_CASE("model_config: what trainers and tools leave in a file is no reason to refuse it") {
  json file = good();
  file.update(json::parse(R"({
    "_name_or_path": "x", "attention_dropout": 0.0, "torch_dtype": "bfloat16", "initializer_range": 0.02,
    "pretraining_tp": 1, "use_cache": true, "transformers_version": "4.46.0", "pad_token_id": 0, "is_decoder": true,
    "is_llama_config": true, "rope_interleaved": false, "max_sequence_length": 2048, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": null, "layer_norm_eps": 1e-5, "norm_type": "RMSNorm", "max_grad_norm": 1.0,
    "tensor_parallel_degree": 8, "gradient_clip": 0.5, "neftune_noise_alpha": 5, "unsloth_version": "2025.1",
    "repetition_penalty": 1.1, "temperature": 0.7, "id2label": {"0": "LABEL_0"}, "sliding_window": null,
    "rope_type": "default", "max_window_layers": 28, "no_bias": true, "output_attentions": false, "num_logits_to_keep": 1})"));
  CHECK(parse_model_config(file.dump()).layers == 16);
}

TEST_CASE("model_config: Python's Infinity and NaN are refused where a number matters, and nowhere else") {
  std::string text = good().dump();
  text.insert(1, "\"time_step_limit\": [0.0, Infinity, -Infinity, NaN], \"note\": \"NaN \\\" Infinity\",");
  CHECK(parse_model_config(text).layers == 16);
  std::string harmed = good().dump();
  const std::string theta = "500000.0";
  harmed.replace(harmed.find(theta), theta.size(), "Infinity");
  CHECK(refusal([&] { parse_model_config(harmed); }).find("rope_theta") != std::string::npos);
}

TEST_CASE("model_config: values out of range are refused with field and value") {
  for (const char* name : {"num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
                           "head_dim", "intermediate_size", "vocab_size", "max_position_embeddings"}) {
    const std::string pointer = std::string("/") + name;
    refused(pointer.c_str(), 0, {name, "0"});
    refused(pointer.c_str(), -8, {name, "-8"});
    refused(pointer.c_str(), 1e30, {name});
    refused(pointer.c_str(), 64.0, {name, "64.0"});
    refused(pointer.c_str(), "64", {name, "\"64\""});
    refused(pointer.c_str(), std::numeric_limits<std::int64_t>::max(), {name, "9223372036854775807"});
    refused(pointer.c_str(), std::numeric_limits<std::uint64_t>::max(), {name, "18446744073709551615"});
    refused(pointer.c_str(), json::array(), {name, "array"});
  }
  refused("/num_key_value_heads", 5, {"32", "5", "multiple"});
  refused("/head_dim", 63, {"head_dim", "63"});
  refused("/rms_norm_eps", -1e-5, {"rms_norm_eps"});
  refused("/rope_theta", 0, {"rope_theta"});
  refused("/eos_token_id", 128256, {"eos_token_id", "128256"});
  refused("/bos_token_id", -2, {"bos_token_id", "-2"});
  CHECK_FALSE(with("/bos_token_id", -1).bos_id);  // how some write "none"
}

TEST_CASE("model_config: no accepted shape lets a product overflow") {
  json file = good();
  for (const auto& [name, value] : {std::pair{"num_hidden_layers", 1024},
                                    {"hidden_size", 1 << 18},
                                    {"num_attention_heads", 1024},
                                    {"num_key_value_heads", 1024},
                                    {"head_dim", 1024},
                                    {"intermediate_size", 1 << 20},
                                    {"vocab_size", 1 << 22},
                                    {"max_position_embeddings", 1 << 26}}) {
    file[name] = value;
    CHECK_NOTHROW(parse_model_config(file.dump()));
    json larger = file;
    larger[name] = value * 2;
    CHECK_THROWS_AS(parse_model_config(larger.dump()), input_error);
  }
  const model_config c = parse_model_config(file.dump());
  const auto within = [](long double bytes) { return bytes < 0x1p63L; };
  CHECK(within(8.0L * c.layers * c.max_context * c.kv_heads * c.head_dim * 2));
  CHECK(within(8.0L * c.layers * c.hidden * c.ffn * 3));
  CHECK(within(8.0L * c.vocab * c.hidden));
}

TEST_CASE("model_config: every truncation is refused; 3000 mutations are refused or read") {
  const std::string text = good().dump();
  const auto read = [](std::string_view damaged) {
    const model_config c = parse_model_config(damaged);
    CHECK(c.q_heads % c.kv_heads == 0);
    CHECK(c.head_dim % 2 == 0);
    CHECK(c.layers > 0);
  };
  CHECK(read_truncations(text, read).accepted == 0);
  const damage_count count = read_mutations(text, 3000, read);
  CHECK(count.refused > 0);
  CHECK(count.accepted > 0);
  json yarn = good();
  yarn["rope_scaling"] = {{"rope_type", "yarn"},
                          {"factor", 4.0},
                          {"beta_fast", 32},
                          {"mscale", 0.7},
                          {"original_max_position_embeddings", 8192},
                          {"mscale_all_dim", 1.0}};
  CHECK(read_mutations(yarn.dump(), 3000, read).accepted > 0);
  read_mutations(R"({"bos_token_id": 1, "eos_token_id": [2, 3]})", 1000,
                 [&](std::string_view damaged) { parse_model_config(text, damaged); });
}
