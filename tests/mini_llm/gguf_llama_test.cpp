// Whole models from GGUF files: logits against independent arithmetic, and the Hugging Face path to the same weights.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "damaged_input.hpp"
#include "gguf_file.hpp"
#include "input_error.hpp"
#include "model/gguf_model.hpp"
#include "model/llama.hpp"
#include "model/loaded_model.hpp"
#include "model/model_files.hpp"
#include "plain_attention.hpp"

using namespace mini_llm;

namespace {

std::filesystem::path types_file() { return source_path("tests/mini_llm/data/gguf_types.gguf"); }

llama load_from(const std::filesystem::path& path) {
  const gguf_file file = gguf_file::open(path);
  const model_config config = read_gguf_config(file);
  return llama(config, model_files::of(file, config), 16, "gguf");
}

std::vector<float> logits_of(llama& model, const std::vector<std::int32_t>& tokens) {
  specattn::context<specattn::cpu> ctx(1);
  plain_attention attention(ctx, model.shape(), 16);
  const auto count = static_cast<std::int32_t>(tokens.size());
  std::vector<std::int32_t> order;
  for (std::int32_t i = 0; i < count; ++i) order.push_back(i);
  std::vector<float> logits(tokens.size() * static_cast<std::size_t>(model.shape().vocab));
  model.forward(ctx, {tokens, order, order}, attention,
                specattn::view<float, 2>(logits.data(), {count, model.shape().vocab}));
  return logits;
}

/// A directory with the same weights, as bf16.
void write_directory(const scratch_directory& directory, const model_files& files, const model_config& config) {
  nlohmann::json header;
  std::string data;
  for (const std::string& name : files.names()) {
    const stored_tensor& tensor = *files.find(name);
    std::vector<std::byte> decoded;
    const auto elements = tensor.elements(0, tensor.rows(), decoded);
    header[name] = {
        {"dtype", "BF16"}, {"shape", tensor.shape}, {"data_offsets", {data.size(), data.size() + elements.size()}}};
    data.append(reinterpret_cast<const char*>(elements.data()), elements.size());
  }
  const std::string text = header.dump();
  const std::uint64_t length = text.size();
  directory.write("model.safetensors",
                  std::string(reinterpret_cast<const char*>(&length), sizeof length) + text + data);
  directory.write("config.json", nlohmann::json{{"model_type", "llama"},
                                                {"num_hidden_layers", config.layers},
                                                {"hidden_size", config.hidden},
                                                {"num_attention_heads", config.q_heads},
                                                {"num_key_value_heads", config.kv_heads},
                                                {"head_dim", config.head_dim},
                                                {"intermediate_size", config.ffn},
                                                {"vocab_size", config.vocab},
                                                {"max_position_embeddings", config.max_context},
                                                {"rms_norm_eps", config.rms_norm_eps},
                                                {"rope_theta", config.rope.theta},
                                                {"tie_word_embeddings", config.tie_word_embeddings}}
                                     .dump());
}

}  // namespace

TEST_CASE("gguf: a model of every type has the logits that independent arithmetic gives its weights") {
  const auto golden = safetensors_file::open(source_path("tests/mini_llm/data/gguf_types.safetensors"));
  const stored_tensor& stored_ids = *golden.find("ids");
  std::vector<std::int32_t> ids(stored_ids.size());
  std::memcpy(ids.data(), stored_ids.bytes.data(), stored_ids.bytes.size());
  std::vector<float> expected(golden.find("logits")->size());
  read_floats(*golden.find("logits"), expected);
  llama model = load_from(types_file());
  const std::vector<float> logits = logits_of(model, ids);
  REQUIRE(logits.size() == expected.size());
  float largest = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) largest = std::max(largest, std::abs(logits[i] - expected[i]));
  MESSAGE("largest difference of a logit: " << largest);
  CHECK(largest < 2e-5F);
}

TEST_CASE("gguf: the same weights in a Hugging Face directory give the same bits and the same fingerprint") {
  const scratch_directory directory;
  const gguf_file file = gguf_file::open(types_file());
  const model_config config = read_gguf_config(file);
  const model_files files = model_files::of(file, config);
  write_directory(directory, files, config);
  model_config from_directory = load_model_config(directory.path());
  CHECK(config.rope.divisors == std::vector<double>{1, 1, 2.5, 8});  // which a config.json cannot say
  from_directory.rope.divisors = config.rope.divisors;
  llama expected(from_directory, model_files::open(directory.path()), 16, "directory");
  llama model(config, files, 16, "gguf");
  CHECK(model.fingerprint().weights == expected.fingerprint().weights);
  CHECK(model.weight_bytes() == expected.weight_bytes());
  CHECK(llama::weight_bytes(config, files) == model.weight_bytes());
  const std::vector<std::int32_t> tokens{1, 5, 9, 33, 63, 2};
  CHECK(logits_of(model, tokens) == logits_of(expected, tokens));
  CHECK_NOTHROW(files.check_finite());
}

TEST_CASE("gguf: a model opens as one with its tokenizer, by name or by content") {
  const loaded_model made = load_model(types_file());
  CHECK(made.encode("ABCAB") == std::vector<std::int32_t>{63, 62});
  CHECK(made.words.decode(std::vector<std::int32_t>{63, 0, 62}) == "ABCAB");
  CHECK(made.words.bos_id() == 1);
  CHECK(made.words.chat_template().starts_with("{% for m in messages %}"));
  CHECK(made.config.eos_ids == std::vector<std::int32_t>{0});
  const scratch_directory directory;
  directory.write("blob", read_all(types_file()));
  CHECK(load_model(directory.path() / "blob").model->fingerprint().weights == made.model->fingerprint().weights);
  directory.write("m.gguf", "GGUF");
  CHECK(refusal([&] { load_model(directory.path()); }).find("m.gguf") != std::string::npos);
  CHECK(refusal([&] { load_model(directory.path() / "m.gguf"); }).find("version") != std::string::npos);
  directory.write("m.txt", "text");
  CHECK(refusal([&] { load_model(directory.path() / "m.txt"); }).find("no GGUF file") != std::string::npos);
}

TEST_CASE("gguf: a scale that is NaN or infinite is refused with file, tensor and element") {
  std::string bytes = read_all(types_file());
  const gguf_file file = gguf_file::parse(as_bytes(bytes), "model.gguf");
  const gguf_tensor& tensor = file.tensors().at("blk.1.attn_q.weight");  // Q6_K, the scale at the end of a block
  const std::size_t block = 5;
  const auto at = static_cast<std::size_t>(tensor.bytes.data() - as_bytes(bytes).data()) + 210 * block + 208;
  const scratch_directory directory;
  for (const std::uint16_t bits : {std::uint16_t{0x7e00}, std::uint16_t{0xfc00}}) {
    std::memcpy(bytes.data() + at, &bits, sizeof bits);
    directory.write("m.gguf", bytes);
    const std::string message = refusal([&] { load_from(directory.path() / "m.gguf"); });
    CAPTURE(message);
    CHECK(message.find("m.gguf: blk.1.attn_q.weight: ") != std::string::npos);
    CHECK(message.find("is NaN or infinite") != std::string::npos);
    // Row 5 of the file is the second half's third in the first head of eight: row 6.
    CHECK(message.find("element 1536 of 8192") != std::string::npos);
    const gguf_file spoilt = gguf_file::open(directory.path() / "m.gguf");
    CHECK(refusal([&] { model_files::of(spoilt, read_gguf_config(spoilt)).check_finite(); }).find("NaN") !=
          std::string::npos);
  }
}
