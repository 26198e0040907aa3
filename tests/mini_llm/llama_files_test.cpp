// What the model makes of weight files: refusals that name the tensor, and variants that must agree.
#include <doctest/doctest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "golden.hpp"
#include "input_error.hpp"
#include "model/engine.hpp"
#include "plain_attention.hpp"
#include "specattn/scalar.hpp"

namespace {

using specattn::context;
using specattn::cpu;

/// A tensor of a file to be written.
struct tensor {
  std::string type = "BF16";
  std::vector<std::int64_t> shape;
  std::string bytes;
};
using tensor_map = std::map<std::string, tensor>;

/// A model directory in the system's temporary folder, removed at the end.
class temporary_model {
 public:
  temporary_model(const tensor_map& tensors, const nlohmann::json& config)
      : path_(std::filesystem::temp_directory_path() / ("specattn_llama_" + std::to_string(::getpid()))) {
    std::filesystem::create_directories(path_);
    std::ofstream(path_ / "config.json") << config;
    nlohmann::json header;
    std::string data;
    for (const auto& [name, t] : tensors) {
      header[name] = {
          {"dtype", t.type}, {"shape", t.shape}, {"data_offsets", {data.size(), data.size() + t.bytes.size()}}};
      data += t.bytes;
    }
    const std::string text = header.dump();
    const std::uint64_t length = text.size();
    std::ofstream file(path_ / "model.safetensors", std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), sizeof length);
    file << text << data;
  }
  ~temporary_model() { std::filesystem::remove_all(path_); }
  temporary_model(const temporary_model&) = delete;
  temporary_model& operator=(const temporary_model&) = delete;

  mini_llm::llama load() const {
    return mini_llm::llama(mini_llm::load_model_config(path_), mini_llm::model_files::open(path_), 8, "temporary");
  }
  /// The message of the refusal; empty when it loads.
  std::string refusal() const {
    try {
      load();
    } catch (const mini_llm::input_error& e) {
      return e.what();
    }
    return {};
  }

 private:
  std::filesystem::path path_;
};

tensor_map books_tensors() {
  const auto file = mini_llm::safetensors_file::open(source_path("examples/models/books-1m/model.safetensors"));
  tensor_map tensors;
  for (const auto& [name, t] : file.tensors()) {
    tensors[name] = {std::string(mini_llm::name(t.type)), t.shape,
                     std::string(reinterpret_cast<const char*>(t.bytes.data()), t.bytes.size())};
  }
  return tensors;
}

nlohmann::json books_config() {
  std::ifstream file(source_path("examples/models/books-1m/config.json"));
  return nlohmann::json::parse(file);
}

/// The same tensor in another element type, each number rounded to it.
template <class T>
tensor converted(const tensor& from, const std::string& type) {
  tensor to{type, from.shape, std::string(from.bytes.size() / 2 * sizeof(T), '\0')};
  for (std::size_t i = 0; i < from.bytes.size() / 2; ++i) {
    specattn::bf16 bits;
    std::memcpy(&bits, from.bytes.data() + 2 * i, sizeof bits);
    const T value = specattn::from_float<T>(specattn::to_float(bits));
    std::memcpy(to.bytes.data() + i * sizeof value, &value, sizeof value);
  }
  return to;
}

std::vector<float> some_logits(mini_llm::llama& model) {
  context<cpu> ctx(1);
  plain_attention attention(ctx, model.shape(), 16);
  return all_logits(ctx, model, attention, {0, 17, 4000, 9, 33}, 5);
}

}  // namespace

TEST_CASE("llama files: a missing, mis-shaped, integer, NaN or infinite tensor is refused by name") {
  const tensor_map good = books_tensors();
  const nlohmann::json config = books_config();
  const std::string victim = "model.layers.2.mlp.up_proj.weight";
  const auto refusal = [&](const std::function<void(tensor&)>& harm) {
    tensor_map tensors = good;
    harm(tensors.at(victim));
    return temporary_model(tensors, config).refusal();
  };
  CHECK(refusal([](tensor&) {}).empty());
  CHECK(refusal([](tensor& t) {
          t.shape = {176, 256};
        }).find("[176, 256]; config.json calls for [352, 128]") != std::string::npos);
  CHECK(refusal([](tensor& t) { t.type = "I16"; }).find("I16") != std::string::npos);
  for (const int bits : {0x7fc0, 0x7f80, 0xff80}) {
    const std::string message = refusal([&](tensor& t) {
      const auto value = static_cast<std::uint16_t>(bits);
      std::memcpy(t.bytes.data() + 2 * 12345, &value, sizeof value);
    });
    CHECK(message.find(victim) != std::string::npos);
    CHECK(message.find("element 12345") != std::string::npos);
    CHECK(message.find("model.safetensors: ") != std::string::npos);
  }
  tensor_map lacking = good;
  lacking.erase(victim);
  CHECK(temporary_model(lacking, config).refusal().find(victim) != std::string::npos);
  nlohmann::json untied = config;
  untied["tie_word_embeddings"] = false;
  CHECK(temporary_model(good, untied).refusal().find("lm_head.weight") != std::string::npos);
}

TEST_CASE("llama files: a tensor that the model would not read is refused by name") {
  const tensor_map good = books_tensors();
  nlohmann::json config = books_config();
  const auto refusal = [&](const std::string& name, std::vector<std::int64_t> shape = {2}) {
    tensor_map tensors = good;
    tensors[name] = {"BF16", std::move(shape), std::string(4, '\0')};
    const std::string message = temporary_model(tensors, config).refusal();
    CAPTURE(message);
    CHECK(message.find("model.safetensors: tensor \"" + name + "\"") != std::string::npos);
    return message;
  };
  const std::string layer = "model.layers.1.";
  CHECK(refusal(layer + "self_attn.q_proj.bias").find("biases") != std::string::npos);
  CHECK(refusal(layer + "mlp.down_proj.bias").find("biases") != std::string::npos);
  CHECK(refusal("lm_head.bias").find("biases") != std::string::npos);
  CHECK(refusal(layer + "self_attn.q_norm.weight").find("norms") != std::string::npos);
  CHECK(refusal(layer + "self_attn.q_proj.lora_A.weight").find("adapters") != std::string::npos);
  CHECK(refusal(layer + "mlp.up_proj.weight_scale_inv").find("quantised") != std::string::npos);
  CHECK(refusal("model.embed_positions.weight").find("no such weight") != std::string::npos);
  CHECK(refusal("lm_head.weight").find("ties it to") != std::string::npos);
  CHECK(refusal("model.layers.4.mlp.up_proj.weight").find("num_hidden_layers 4") != std::string::npos);
  config["num_hidden_layers"] = 3;
  const std::string fewer = temporary_model(good, config).refusal();
  CHECK(fewer.find("\"model.layers.3.input_layernorm.weight\" (and 8 more)") != std::string::npos);
  CHECK(fewer.find("num_hidden_layers 3") != std::string::npos);
}

TEST_CASE("llama files: rotary tables and a copy of the tied embedding are harmless") {
  tensor_map tensors = books_tensors();
  mini_llm::llama plain = temporary_model(tensors, books_config()).load();
  const auto expected = some_logits(plain);
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = {"F32", {1}, std::string(4, '\1')};
  tensors["rope.freqs"] = {"F32", {1}, std::string(4, '\1')};
  tensors["freqs_cis"] = {"C64", {1}, std::string(8, '\1')};
  tensors["lm_head.weight"] = tensors.at("model.embed_tokens.weight");
  mini_llm::llama model = temporary_model(tensors, books_config()).load();
  CHECK(some_logits(model) == expected);
}

TEST_CASE("llama: keys that a cache of f16 would make infinite are refused with a type that holds them") {
  tensor_map tensors = books_tensors();
  tensor& keys = tensors.at("model.layers.1.self_attn.k_proj.weight");
  for (std::size_t i = 0; i < keys.bytes.size(); i += 2) {
    specattn::bf16 bits;
    std::memcpy(&bits, keys.bytes.data() + i, sizeof bits);
    bits = specattn::from_float<specattn::bf16>(specattn::to_float(bits) * 262144.0f);
    std::memcpy(keys.bytes.data() + i, &bits, sizeof bits);
  }
  mini_llm::llama model = temporary_model(tensors, books_config()).load();
  CHECK_NOTHROW(some_logits(model));
  mini_llm::set_key_value_range(model, mini_llm::kv_type::bf16);
  CHECK_NOTHROW(some_logits(model));
  mini_llm::set_key_value_range(model, mini_llm::kv_type::f16);
  std::string message;
  try {
    some_logits(model);
  } catch (const mini_llm::input_error& error) {
    message = error.what();
  }
  CHECK(message.find("layer 1 makes a key or value") != std::string::npos);
  CHECK(message.find("--kv bf16") != std::string::npos);
}

TEST_CASE("llama: a model shown with another vocab gives the same logits, and -infinity for rows it lacks") {
  mini_llm::llama model = temporary_model(books_tensors(), books_config()).load();
  const auto expected = some_logits(model);
  for (const std::int32_t vocab : {4010, 4096, 4160}) {
    CAPTURE(vocab);
    model.show_vocab(vocab);
    const auto logits = some_logits(model);
    REQUIRE(logits.size() == std::size_t{5} * static_cast<std::size_t>(vocab));
    int different = 0;
    for (std::int32_t r = 0; r < 5; ++r) {
      for (std::int32_t i = 0; i < vocab; ++i) {
        const float logit = logits[static_cast<std::size_t>(r * vocab + i)];
        const float wanted =
            i < 4096 ? expected[static_cast<std::size_t>(r * 4096 + i)] : -std::numeric_limits<float>::infinity();
        different += logit != wanted ? 1 : 0;
      }
    }
    CHECK(different == 0);
  }
}

TEST_CASE("llama files: float32 weights, mixed types and an untied copy of the embedding give the same bits") {
  const tensor_map good = books_tensors();
  nlohmann::json config = books_config();
  mini_llm::llama plain = temporary_model(good, config).load();
  const auto expected = some_logits(plain);
  const auto check = [&](const tensor_map& tensors) {
    mini_llm::llama model = temporary_model(tensors, config).load();
    CHECK(some_logits(model) == expected);
    CHECK(model.fingerprint().weights != plain.fingerprint().weights);
    return model.weight_bytes();
  };
  tensor_map wide = good;
  for (auto& [name, t] : wide) t = converted<float>(t, "F32");
  CHECK(check(wide) > plain.weight_bytes() * 19 / 10);

  tensor_map mixed = good;  // one of the three in the fused product
  mixed["model.layers.1.self_attn.k_proj.weight"] =
      converted<float>(good.at("model.layers.1.self_attn.k_proj.weight"), "F32");
  CHECK(check(mixed) < plain.weight_bytes() * 11 / 10);

  tensor_map untied = good;
  untied["lm_head.weight"] = good.at("model.embed_tokens.weight");
  config["tie_word_embeddings"] = false;
  check(untied);
}

TEST_CASE("llama files: float16 weights are used as they are") {
  tensor_map half = books_tensors();
  tensor_map wide;
  for (auto& [name, t] : half) {
    t = converted<specattn::fp16>(t, "F16");
    tensor& w = wide[name];
    w = {"F32", t.shape, std::string(t.bytes.size() * 2, '\0')};
    for (std::size_t i = 0; i < t.bytes.size() / 2; ++i) {
      specattn::fp16 bits;
      std::memcpy(&bits, t.bytes.data() + 2 * i, sizeof bits);
      const float value = specattn::to_float(bits);
      std::memcpy(w.bytes.data() + 4 * i, &value, sizeof value);
    }
  }
  mini_llm::llama from_half = temporary_model(half, books_config()).load();
  const auto logits = some_logits(from_half);
  mini_llm::llama from_wide = temporary_model(wide, books_config()).load();
  CHECK(some_logits(from_wide) == logits);
}

TEST_CASE("llama files: the fingerprint is that of the weights, and the bytes are known beforehand") {
  const tensor_map good = books_tensors();
  const nlohmann::json config = books_config();
  mini_llm::llama first = temporary_model(good, config).load();
  CHECK(temporary_model(good, config).load().fingerprint().weights == first.fingerprint().weights);
  CHECK(first.fingerprint().weights == load_model("books-1m").fingerprint().weights);
  tensor_map changed = good;
  changed.at("model.norm.weight").bytes[7] ^= 1;
  CHECK(temporary_model(changed, config).load().fingerprint().weights != first.fingerprint().weights);
  const std::filesystem::path directory = source_path("examples/models/books-1m");
  const auto read = mini_llm::load_model_config(directory);
  const auto files = mini_llm::model_files::open(directory);
  CHECK(mini_llm::llama::weight_bytes(read, files) == first.weight_bytes());
  CHECK(mini_llm::llama::scratch_bytes(read, 8) == first.scratch_bytes());
  CHECK(first.weight_bytes() < files.total_bytes() * 102 / 100);
}
