// Families of models against what Hugging Face Transformers computes with them (data/make_models.py), and refusals.
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "golden.hpp"
#include "input_error.hpp"
#include "model/device_support.hpp"
#include "plain_attention.hpp"

namespace {

using mini_llm::model_config;
using nlohmann::json;
using specattn::context;
using specattn::cpu;

const std::string families = "tests/mini_llm/data/families/";

json cases() {
  std::ifstream file(source_path(families + "cases.json"));
  return json::parse(file);
}

json config_of(const std::string& name) {
  for (const json& one : cases()) {
    if (one["name"] == name) return one["config"];
  }
  FAIL("no case " << name);
  return {};
}

model_config read(const json& config) { return mini_llm::parse_model_config(config.dump()); }

mini_llm::llama load(const json& config, const std::filesystem::path& weights) {
  return mini_llm::llama(read(config), mini_llm::model_files::open(weights), 64, "tiny");
}

std::vector<float> logits_of(mini_llm::llama& model, const std::vector<std::int32_t>& ids, std::size_t chunk) {
  context<cpu> ctx(1);
  plain_attention attention(ctx, model.shape(), 64);
  return all_logits(ctx, model, attention, ids, chunk);
}

double greatest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  double off = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) off = std::max(off, std::abs(static_cast<double>(a[i] - b[i])));
  return off;
}

template <class Action>
std::string refusal(const Action& action) {
  try {
    action();
  } catch (const mini_llm::input_error& error) {
    return error.what();
  }
  return "accepted";
}

void check_refused(const std::string& message, std::initializer_list<const char*> words) {
  CAPTURE(message);
  for (const char* word : words) {
    CAPTURE(word);
    CHECK(message.find(word) != std::string::npos);
  }
}

/// The config of a case with one value changed is refused.
void refused(const std::string& name, const char* pointer, const json& value,
             std::initializer_list<const char*> words) {
  json config = config_of(name);
  config[json::json_pointer(pointer)] = value;
  check_refused(refusal([&] { read(config); }), words);
}

}  // namespace

TEST_CASE("families: logits of prefill and of token-by-token decoding are those of Transformers") {
  const auto golden = mini_llm::safetensors_file::open(source_path(families + "golden.safetensors"));
  const auto tensor = [&](const std::string& name) -> const mini_llm::stored_tensor& {
    const mini_llm::stored_tensor* const found = golden.find(name);
    REQUIRE_MESSAGE(found != nullptr, name);
    return *found;
  };
  std::vector<std::int32_t> ids(tensor("ids").size());
  std::memcpy(ids.data(), tensor("ids").bytes.data(), tensor("ids").bytes.size());
  std::map<std::string, std::vector<std::vector<float>>> of_weights;
  for (const json& one : cases()) {
    const std::string name = one["name"];
    CAPTURE(name);
    std::vector<float> expected(tensor(name).size());
    mini_llm::read_floats(tensor(name), expected);
    mini_llm::llama model = load(one["config"], source_path(families + one["weights"].get<std::string>()));
    const auto prefill = logits_of(model, ids, ids.size());
    const double off = greatest_difference(prefill, expected);
    MESSAGE(name, ": logits within ", off);
    CHECK(off <= 1e-4);
    CHECK(logits_of(model, ids, 1) == prefill);
    CHECK(logits_of(model, ids, 7) == prefill);
    // What a case is about shows: another rope scaling of the same weights is another model.
    auto& others = of_weights[one["weights"]];
    if (name.find("window") == std::string::npos) {
      for (const auto& other : others) CHECK(greatest_difference(other, expected) > 1e-2);
      others.push_back(expected);
    }
  }
}

TEST_CASE("families: what a config.json leaves out is the family's default") {
  json qwen3 = config_of("qwen3");
  CHECK(read(qwen3).head_dim == 16);
  CHECK(read(qwen3).query_key_norms);
  CHECK_FALSE(read(qwen3).query_key_value_biases);
  qwen3.erase("head_dim");
  CHECK(read(qwen3).head_dim == 128);
  json qwen2 = config_of("qwen2");
  CHECK(read(qwen2).query_key_value_biases);
  CHECK_FALSE(read(qwen2).query_key_norms);
  CHECK(read(qwen2).max_context == 64);
  qwen2.erase("use_sliding_window");
  CHECK(read(qwen2).max_context == 64);
  qwen2["use_sliding_window"] = true;
  CHECK(read(qwen2).max_context == 32);
  qwen2.erase("architectures");
  CHECK(read(qwen2).query_key_value_biases);  // by its model_type
}

TEST_CASE("families: yarn's numbers are read, and a context that it makes longer is") {
  const mini_llm::rope_config stated = read(config_of("llama, yarn with everything stated")).rope;
  CHECK(stated.scaling == mini_llm::rope_scaling::yarn);
  CHECK(stated.theta == 300.0);
  CHECK(stated.factor == 4.0);
  CHECK(stated.original_max_context == 16);
  CHECK(stated.ramp.fast == 3.0);
  CHECK(stated.ramp.slow == 0.2);
  CHECK_FALSE(stated.ramp.whole_pairs);
  CHECK(stated.attention_factor == 0.8);
  const mini_llm::rope_config plain = read(config_of("llama, yarn")).rope;
  CHECK(plain.ramp.fast == 32.0);
  CHECK(plain.ramp.slow == 1.0);
  CHECK(plain.attention_factor == doctest::Approx(0.1 * std::log(4.0) + 1.0));
  CHECK(read(config_of("qwen2, yarn beside a shorter context")).max_context == 64);
  json absent = config_of("llama, yarn");
  absent["rope_scaling"].erase("original_max_position_embeddings");
  CHECK(read(absent).rope.original_max_context == 64);
  CHECK(read(absent).max_context == 64);
}

TEST_CASE("families: what is not computed is refused with its name and value") {
  refused("qwen3", "/attention_bias", true, {"attention_bias", "true"});
  refused("qwen2", "/use_mrope", true, {"use_mrope", "true"});
  refused("qwen2", "/architectures", {"Qwen2VLForConditionalGeneration"}, {"Qwen2VLForConditionalGeneration"});
  refused("qwen3", "/model_type", "qwen3_moe", {"model_type", "qwen3_moe"});
  refused("mistral", "/layer_types", {"linear_attention"}, {"layer_types[0]", "linear_attention"});
  for (const char* kind : {"dynamic", "longrope", "su", "mrope"}) {
    refused("qwen2", "/rope_scaling", {{"rope_type", kind}, {"factor", 2.0}}, {"rope_scaling.rope_type", kind});
  }
  const std::string yarn = "llama, yarn";
  refused(yarn, "/rope_scaling/factor", nullptr, {"rope_scaling", "factor", "missing"});
  refused(yarn, "/rope_scaling/factor", 0.5, {"rope_scaling.factor", "0.5"});
  refused(yarn, "/rope_scaling/attention_factor", 0, {"rope_scaling.attention_factor", "0"});
  refused(yarn, "/rope_scaling/beta_fast", 0.5, {"beta_fast 0.5", "beta_slow 1.0"});
  refused(yarn, "/rope_scaling/truncate", 1, {"rope_scaling.truncate", "1"});
  refused(yarn, "/rope_scaling/original_max_position_embeddings", 0, {"original_max_position_embeddings", "0"});
  refused(yarn, "/rope_scaling/partial_rotary_factor", 0.5, {"rope_scaling.partial_rotary_factor", "0.5"});
  refused(yarn, "/rope_scaling/mrope_section", {16, 24}, {"rope_scaling.mrope_section", "not supported"});
  refused(yarn, "/rope_scaling/attn_temperature", 0.1, {"rope_scaling.attn_temperature", "0.1"});
  refused(yarn, "/rope_theta", 1.0, {"rope_theta", "1.0"});
}

TEST_CASE("families: weights of another family than config.json's are refused by the tensor") {
  const auto message = [](const char* config, const char* weights) {
    return refusal([&] { load(config_of(config), source_path(families + weights)); });
  };
  check_refused(message("qwen2", "llama"), {"lack the tensor", "layers.0.self_attn.q_proj.bias"});
  check_refused(message("qwen3", "mistral"), {"lack the tensor", "layers.0.self_attn.q_norm.weight"});
  check_refused(message("mistral", "qwen3"), {"self_attn.k_norm.weight", "(and 3 more) would be left out", "norms"});
  json llama = config_of("llama");
  llama["tie_word_embeddings"] = true;
  check_refused(refusal([&] { load(llama, source_path(families + "qwen2")); }),
                {"self_attn.k_proj.bias", "(and 5 more) would be left out", "biases"});
}

TEST_CASE("families: shards as Transformers writes them: a missing one, and one that lacks a tensor, are named") {
  const auto copy = std::filesystem::temp_directory_path() / ("specattn_shards_" + std::to_string(::getpid()));
  std::filesystem::copy(source_path(families + "qwen2"), copy);
  const auto message = [&] { return refusal([&] { mini_llm::model_files::open(copy); }); };
  CHECK(message() == "accepted");
  const auto second = copy / "model-00002-of-00002.safetensors";
  std::filesystem::copy_file(copy / "model-00001-of-00002.safetensors", second,
                             std::filesystem::copy_options::overwrite_existing);
  check_refused(message(), {"index.json", "is said to be in \"model-00002-of-00002.safetensors\""});
  std::filesystem::remove(second);
  check_refused(message(), {"model-00002-of-00002.safetensors", "cannot open"});
  std::filesystem::remove_all(copy);
}

TEST_CASE("families: the GPU refuses what it does not compute, and says that the CPU does") {
  const auto message = [](const std::string& name) {
    return refusal([&] { mini_llm::require_device_model(read(config_of(name)), "models/" + name); });
  };
  for (const char* name : {"llama", "llama, linear", "llama, llama3", "mistral"}) CHECK(message(name) == "accepted");
  check_refused(message("qwen2"), {"models/qwen2: ", "biases", "--device cuda", "the CPU runs it"});
  check_refused(message("qwen3"), {"norms of queries and keys", "the CPU runs it"});
  check_refused(message("llama, yarn"), {"attention factor of 1.138629 (yarn)", "the CPU runs it"});
}
