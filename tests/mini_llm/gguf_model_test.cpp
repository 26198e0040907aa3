// GGUF weights and configuration: values of every block type, a whole model, refusals, and damage of any kind.
#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "damaged_input.hpp"
#include "gguf_builder.hpp"
#include "gguf_file.hpp"
#include "input_error.hpp"
#include "model/gguf_blocks.hpp"
#include "model/gguf_model.hpp"
#include "model/model_files.hpp"
#include "text/gguf_tokenizer.hpp"
#include "text/tokenizer.hpp"

using namespace mini_llm;

namespace {

std::string data_path(const std::string& name) { return source_path("tests/mini_llm/data/" + name).string(); }

/// A tiny model of one layer: hidden 4, two heads of two, one of them for keys; a vocabulary of two.
gguf_builder tiny_values() {
  gguf_builder b;
  b.add("general.architecture", "llama").add("llama.block_count", 1U).add("llama.context_length", 64U);
  b.add("llama.embedding_length", 4U).add("llama.feed_forward_length", 6U).add("llama.attention.head_count", 2U);
  b.add("llama.attention.head_count_kv", 1U).add("llama.attention.layer_norm_rms_epsilon", 1e-5F);
  b.add("tokenizer.ggml.model", "gpt2").add("tokenizer.ggml.pre", "smollm");
  b.add("tokenizer.ggml.tokens", std::vector<std::string>{"a", "b"});
  b.add("tokenizer.ggml.merges", std::vector<std::string>{}).add("tokenizer.ggml.eos_token_id", 1U);
  return b;
}

gguf_builder tiny_model(gguf_builder b = tiny_values()) {
  const auto add = [&](const std::string& name, std::uint64_t columns, std::uint64_t rows) {
    b.add_tensor(name + ".weight", {columns, rows}, 1, std::string(2 * columns * rows, '\x2a'));
  };
  const auto add_vector = [&](const std::string& name) {
    b.add_tensor(name + ".weight", {4}, 0, std::string(16, '\x3f'));
  };
  add("token_embd", 4, 2);
  add_vector("output_norm");
  add_vector("blk.0.attn_norm");
  add_vector("blk.0.ffn_norm");
  add("blk.0.attn_q", 4, 4);
  add("blk.0.attn_k", 4, 2);
  add("blk.0.attn_v", 4, 2);
  add("blk.0.attn_output", 4, 4);
  add("blk.0.ffn_gate", 4, 6);
  add("blk.0.ffn_up", 4, 6);
  add("blk.0.ffn_down", 6, 4);
  return b;
}

model_config config_of(const gguf_builder& builder) {
  const std::string bytes = builder.bytes();
  return read_gguf_config(gguf_file::parse(as_bytes(bytes), "model.gguf"));
}

/// Everything that loading does, every weight included.
void read_model(std::string_view text) {
  const gguf_file file = gguf_file::parse(as_bytes(text), "model.gguf");
  const model_config config = read_gguf_config(file);
  for (const auto& [name, tensor] : gguf_weights(file, config)) {
    std::vector<std::byte> decoded;
    for (std::int64_t r = 0; r < tensor.rows(); ++r) tensor.elements(r, 1, decoded);
  }
  const tokenizer words = tokenizer::make(read_gguf_tokenizer(file), "model.gguf");
  words.decode(words.encode("ab", true));
}

void says(const std::string& message, std::initializer_list<const char*> words) {
  CAPTURE(message);
  CHECK(message.starts_with("model.gguf: "));
  for (const char* word : words) {
    CAPTURE(word);
    CHECK(message.find(word) != std::string::npos);
  }
}

void refused(const gguf_builder& builder, std::initializer_list<const char*> words) {
  says(refusal([&] { read_model(builder.bytes()); }), words);
}

}  // namespace

TEST_CASE("gguf blocks: every type gives the reference's values, bit for bit") {
  const auto golden = safetensors_file::open(data_path("gguf_blocks.safetensors"));
  int checked = 0;
  for (const gguf_tensor_type& type : gguf_tensor_types()) {
    CAPTURE(type.name);
    const stored_tensor& blocks = *golden.find(std::string(type.name) + ".blocks");
    const stored_tensor& values = *golden.find(std::string(type.name) + ".values");
    REQUIRE(blocks.shape.back() == static_cast<std::int64_t>(type.block_bytes));
    const std::size_t count = blocks.bytes.size() / type.block_bytes;
    REQUIRE(values.size() == count * type.block_elements);
    std::vector<float> out(values.size());
    gguf_blocks::reader_of(type.id)(blocks.bytes.data(), type.block_bytes, type.block_elements, count, out.data());
    std::vector<float> expected(values.size());
    read_floats(values, expected);
    std::size_t different = 0;
    for (std::size_t i = 0; i < out.size(); ++i) different += out[i] == expected[i] ? 0 : 1;  // -0 is 0
    CHECK(different == 0);
    ++checked;
  }
  CHECK(checked == 11);
}

TEST_CASE("gguf weights: numbers are rounded to bf16 to nearest, ties to even; what is not finite stays so") {
  std::string bytes = tiny_model().bytes();
  const gguf_file file = gguf_file::parse(as_bytes(bytes), "model.gguf");
  const auto tensors = gguf_weights(file, read_gguf_config(file));
  const auto at = file.tensors().at("output_norm.weight").bytes.data() - as_bytes(bytes).data();
  using four = std::array<std::uint32_t, 4>;
  const auto rounded = [&](const four& floats) {
    std::memcpy(bytes.data() + at, floats.data(), sizeof floats);
    std::vector<std::byte> decoded;
    std::array<std::uint16_t, 4> halves;
    std::memcpy(halves.data(), tensors.at("model.norm.weight").elements(0, 4, decoded).data(), sizeof halves);
    return four{halves[0], halves[1], halves[2], halves[3]};
  };
  CHECK(rounded({0x3f800000, 0x3f808000, 0x3f818000, 0x3f808001}) == four{0x3f80, 0x3f80, 0x3f82, 0x3f81});
  const four odd = rounded({0x7f7fffff, 0xff800000, 0xffffffff, 0x7f800001});
  CHECK(odd[0] == 0x7f80);
  CHECK(odd[1] == 0xff80);
  CHECK((odd[2] & 0x7fff) > 0x7f80);
  CHECK((odd[3] & 0x7fff) > 0x7f80);
}

TEST_CASE("gguf config: the metadata are the model's configuration") {
  const model_config plain = config_of(tiny_model());
  CHECK(plain.layers == 1);
  CHECK(plain.head_dim == 2);
  CHECK(plain.kv_heads == 1);
  CHECK(plain.ffn == 6);
  CHECK(plain.vocab == 2);
  CHECK(plain.max_context == 64);
  CHECK(plain.rms_norm_eps == 1e-5);
  CHECK(plain.rope.theta == 10000.0);
  CHECK(plain.rope.divisors.empty());
  CHECK(plain.tie_word_embeddings);
  CHECK_FALSE(plain.bos_id);
  CHECK(plain.eos_ids == std::vector<std::int32_t>{1});
  gguf_builder b = tiny_model();
  b.add("llama.rope.freq_base", 500000.0F).add("llama.rope.scaling.type", "linear").add("llama.vocab_size", 2U);
  b.add("llama.rope.scaling.factor", 4.0F).add("llama.attention.sliding_window", 16U);
  b.add("llama.rope.dimension_count", 2U).add("tokenizer.ggml.bos_token_id", 0U).add("llama.unheard_of", "x");
  b.add("tokenizer.ggml.eot_token_id", 0U).add("tokenizer.ggml.eom_token_id", 0xffffffffU);
  b.add_tensor("output.weight", {4, 2}, 1, std::string(16, '\0'));
  b.add_tensor("rope_freqs.weight", {1}, 0, gguf_builder::raw(2.5F));
  const model_config config = config_of(b);
  CHECK(config.rope.theta == 500000.0);
  CHECK(config.rope.scaling == rope_scaling::linear);
  CHECK(config.rope.factor == 4.0);
  CHECK(config.rope.divisors == std::vector<double>{2.5});
  CHECK(config.sliding_window == 16);
  CHECK(config.max_context == 16);
  CHECK_FALSE(config.tie_word_embeddings);
  CHECK(config.bos_id == 0);
  CHECK(config.eos_ids == std::vector<std::int32_t>{1, 0});
  CHECK_NOTHROW(read_model(b.bytes()));
}

TEST_CASE("gguf config: other architectures, and what would change the arithmetic, are refused by name") {
  gguf_builder qwen;
  refused(qwen.add("general.architecture", "qwen2"), {"general.architecture", "\"qwen2\"", "llama"});
  refused(gguf_builder(), {"general.architecture", "missing"});
  const auto with = [](const char* key, auto value) { return tiny_model().add(key, value); };
  refused(with("general.type", "adapter"), {"general.type", "\"adapter\""});
  refused(with("split.count", 3U), {"split.count", "3 parts"});
  refused(with("llama.expert_count", 8U), {"llama.expert_count", "8"});
  refused(with("llama.attention.scale", 0.5F), {"llama.attention.scale", "0.5"});
  refused(with("llama.logit_scale", 0.5F), {"llama.logit_scale"});
  refused(with("llama.attention.causal", false), {"llama.attention.causal"});
  refused(with("llama.rope.scaling.type", "yarn"), {"llama.rope.scaling.type", "\"yarn\""});
  refused(with("llama.rope.scaling.type", "linear"), {"without rope.scaling.factor"});
  refused(with("llama.rope.scaling.factor", 0.5F), {"llama.rope.scaling.factor", "0.5"});
  refused(with("llama.rope.dimension_count", 1U), {"llama.rope.dimension_count", "1", "2"});
  refused(with("llama.attention.value_length", 4U), {"llama.attention.value_length", "4"});
  refused(with("llama.attention.key_length", 3U), {"llama.attention.key_length", "3"});
  refused(with("llama.vocab_size", 3U), {"\"token_embd.weight\"", "[2, 4]", "[3, 4]"});
  refused(with("tokenizer.ggml.bos_token_id", 2U), {"tokenizer.ggml.bos_token_id", "2"});
  CHECK_NOTHROW(read_model(with("llama.expert_count", 0U).bytes()));
  CHECK_NOTHROW(read_model(with("llama.rope.scaling.type", "none").bytes()));
}

TEST_CASE("gguf config: counts that are missing, zero, absurd or at odds are refused by name") {
  gguf_builder few;
  refused(few.add("general.architecture", "llama"), {"\"llama.block_count\"", "missing"});
  for (const std::uint32_t layers : {0U, 1025U, ~0U}) {
    gguf_builder b;
    b.add("general.architecture", "llama").add("llama.block_count", layers);
    refused(b, {"llama.block_count", "1 to 1024", std::to_string(layers).c_str()});
  }
  gguf_builder heads;
  heads.add("general.architecture", "llama").add("llama.block_count", 1U).add("llama.context_length", 64U);
  heads.add("llama.embedding_length", 4U).add("llama.feed_forward_length", 6U);
  gguf_builder three = heads;
  refused(three.add("llama.attention.head_count", 3U), {"head_count 3", "usable size"});
  gguf_builder odd = heads;
  odd.add("llama.attention.head_count", 4U).add("llama.attention.head_count_kv", 3U);
  refused(odd, {"head_count 4", "head_count_kv 3"});
  refused(heads.add("llama.attention.head_count", std::vector<std::int32_t>{2}), {"an array of 1"});
}

TEST_CASE("gguf weights: what is missing, mis-shaped or would be left out is refused by name") {
  gguf_builder lacking = tiny_values();
  lacking.add_tensor("token_embd.weight", {4, 2}, 1, std::string(16, '\0'));
  refused(lacking, {"\"output_norm.weight\"", "[4]", "lack"});
  const auto with = [](const char* name, std::vector<std::uint64_t> extents = {1}) {
    std::uint64_t size = 4;
    for (const std::uint64_t extent : extents) size *= extent;
    return tiny_model().add_tensor(name, extents, 0, std::string(size, '\x3f'));
  };
  refused(with("output.weight", {2, 4}), {"\"output.weight\"", "[4, 2]", "[2, 4]"});
  refused(with("blk.0.attn_q.bias"), {"\"blk.0.attn_q.bias\"", "biases"});
  refused(with("blk.1.attn_q.weight"), {"block_count is 1"});
  refused(with("blk.0.attn_q_norm.weight"), {"norms"});
  refused(with("blk.0.ffn_gate_exps.weight"), {"experts"});
  refused(with("blk.0.attn_q.weight.lora_a"), {"adapters"});
  refused(with("other"), {"\"other\"", "no such weight"});
  refused(with("rope_freqs.weight", {2}), {"rope_freqs.weight", "[2]", "[1]"});
  gguf_builder zero = tiny_model();
  refused(zero.add_tensor("rope_freqs.weight", {1}, 0, std::string(4, '\0')), {"rope_freqs.weight", "element 0"});
}

TEST_CASE("gguf weights: rows of q and k come with the halves of a head apart, those of others as they are") {
  const auto numbered = [](std::size_t rows, std::size_t columns) {
    std::string bytes;
    for (std::size_t i = 0; i < rows * columns; ++i) bytes += gguf_builder::raw(static_cast<float>(i / columns));
    return bytes;
  };
  gguf_builder model;
  model.add("general.architecture", "llama").add("llama.block_count", 1U).add("llama.context_length", 64U);
  model.add("llama.embedding_length", 8U).add("llama.feed_forward_length", 8U).add("llama.attention.head_count", 2U);
  model.add("llama.attention.layer_norm_rms_epsilon", 1e-5F).add("llama.vocab_size", 8U);
  for (const char* name : {"token_embd", "blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.attn_output",
                           "blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down"}) {
    model.add_tensor(std::string(name) + ".weight", {8, 8}, 0, numbered(8, 8));
  }
  for (const char* name : {"output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"}) {
    model.add_tensor(std::string(name) + ".weight", {8}, 0, numbered(8, 1));
  }
  const std::string bytes = model.bytes();
  const gguf_file file = gguf_file::parse(as_bytes(bytes), "model.gguf");
  const auto tensors = gguf_weights(file, read_gguf_config(file));
  const auto rows_of = [&](const char* name) {
    const stored_tensor& tensor = tensors.at(name);
    const std::size_t columns = tensor.size() / 8;
    std::vector<std::byte> decoded;
    std::vector<float> values(tensor.size());
    read_floats({dtype::bf16, {}, tensor.elements(0, 3, decoded)}, std::span(values).first(3 * columns));
    read_floats({dtype::bf16, {}, tensor.elements(3, 5, decoded)}, std::span(values).subspan(3 * columns));
    std::vector<int> rows;
    for (std::size_t i = 0; i < values.size(); i += columns) rows.push_back(static_cast<int>(values[i]));
    return rows;
  };
  const std::vector<int> apart{0, 2, 1, 3, 4, 6, 5, 7};
  const std::vector<int> plain{0, 1, 2, 3, 4, 5, 6, 7};
  CHECK(rows_of("model.layers.0.self_attn.q_proj.weight") == apart);
  CHECK(rows_of("model.layers.0.self_attn.k_proj.weight") == apart);
  CHECK(rows_of("model.layers.0.self_attn.v_proj.weight") == plain);
  CHECK(rows_of("model.layers.0.mlp.down_proj.weight") == plain);
  CHECK(rows_of("model.norm.weight") == plain);
}

TEST_CASE("gguf: truncations at every byte and 10 000 mutations are refused or read") {
  const std::string file = tiny_model().bytes();
  CHECK_NOTHROW(read_model(file));
  CHECK(read_truncations(file, read_model).accepted <= 16);  // what pads the last tensor may be missing
  const damage_count count = read_mutations(file, 10'000, read_model);
  CHECK(count.refused > 0);
  CHECK(count.accepted > 0);
}

TEST_CASE("gguf: counts, lengths and offsets that became extreme, at every byte, are refused or read") {
  const std::string file = tiny_model().bytes();
  damage_count count;
  for (const std::uint64_t value : {std::uint64_t{0}, std::uint64_t{1} << 31, std::uint64_t{1} << 32,
                                    std::uint64_t{1} << 63, ~std::uint64_t{0}, ~std::uint64_t{0} - 31}) {
    for (std::size_t at = 4; at + sizeof value <= file.size(); ++at) {
      for (const std::size_t bytes : {sizeof(std::uint32_t), sizeof value}) {
        std::string damaged = file;
        std::memcpy(damaged.data() + at, &value, bytes);
        read_damaged(damaged, read_model, count);
      }
    }
  }
  CHECK(count.refused > 0);
  CHECK(count.accepted > 0);
}

TEST_CASE("gguf: damage to a file of every type is refused or read") {
  const std::string file = read_all(data_path("gguf_types.gguf"));
  CHECK_NOTHROW(read_model(file));
  read_truncations(file, read_model, 1499);
  const std::size_t head = file.size() - 127'000;
  std::mt19937_64 random(7);
  damage_count count;
  for (int i = 0; i < 300; ++i) {  // of what describes the weights
    const std::string damaged = mutated(file.substr(0, head), random) + file.substr(head);
    read_damaged(damaged, read_model, count);
  }
  CHECK(count.refused > 0);
}
