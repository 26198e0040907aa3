#include "model/model_files.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "damaged_input.hpp"
#include "input_error.hpp"

using namespace mini_llm;

namespace {

constexpr const char* index_file = "model.safetensors.index.json";

/// A safetensors file with one f32 tensor of one dimension.
std::string shard_of(const std::string& name, const std::vector<float>& values, const std::string& type = "F32") {
  const std::size_t bytes = values.size() * sizeof(float);
  const std::string header = "{\"" + name + "\": {\"dtype\": \"" + type + "\", \"shape\": [" +
                             std::to_string(values.size()) + "], \"data_offsets\": [0, " + std::to_string(bytes) +
                             "]}}";
  const std::uint64_t length = header.size();
  std::string file(sizeof length, '\0');
  std::memcpy(file.data(), &length, sizeof length);
  file += header;
  return file.append(reinterpret_cast<const char*>(values.data()), bytes);
}

std::string refused_shard(const std::string& shard) {
  return refusal([&] { parse_shard_index("{\"weight_map\": {\"x\": " + shard + "}}", index_file); });
}

const std::vector<std::int64_t> two{2};

}  // namespace

TEST_CASE("model_files: the embedded models open, have the shapes asked for, and are finite") {
  for (const std::string name : {"books-1m", "books-7m"}) {
    const model_files files = model_files::open(source_path("examples/models/" + name));
    const std::int64_t hidden = name == "books-1m" ? 128 : 256;
    CHECK(files.weight("model.norm.weight", std::vector{hidden}).bytes.size() ==
          static_cast<std::size_t>(hidden) * 2);
    CHECK(files.contains("model.layers.0.self_attn.q_proj.weight"));
    CHECK_FALSE(files.contains("lm_head.weight"));
    CHECK(files.total_bytes() > 2'000'000);
    CHECK(files.names().size() > 10);
    files.check_finite();
  }
}

TEST_CASE("model_files: shards are found through the index") {
  const scratch_directory directory;
  directory.write("model-00001-of-00002.safetensors", shard_of("x", {1, 2}));
  directory.write("model-00002-of-00002.safetensors", shard_of("y", {3, 4}));
  directory.write(index_file, R"({"metadata": {"total_size": 16}, "weight_map": {
      "x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}})");
  const model_files files = model_files::open(directory.path());
  CHECK(files.names() == std::vector<std::string>{"x", "y"});
  CHECK(files.total_bytes() == 16);
  std::vector<float> values(2);
  read_floats(files.weight("y", two), values);
  CHECK(values == std::vector<float>{3, 4});
}

TEST_CASE("model_files: missing files, tensors, shapes and types are refused by name") {
  const scratch_directory directory;
  const auto open = [&] { return model_files::open(directory.path()); };
  const auto refused = [&](std::initializer_list<const char*> words, auto action) {
    const std::string message = refusal(action);
    CAPTURE(message);
    for (const char* word : words) CHECK(message.find(word) != std::string::npos);
  };
  refused({"model.safetensors", index_file}, open);
  refused({"no weights"}, [&] { model_files::open(directory.path() / "nowhere"); });
  directory.write(index_file, R"({"weight_map": {"x": "a.safetensors"}})");
  refused({"a.safetensors", "cannot open"}, open);
  directory.write("a.safetensors", shard_of("y", {1}));
  refused({"\"x\"", "a.safetensors", "does not hold"}, open);
  directory.write("model.safetensors", shard_of("x", {1, 2, 3}));
  const model_files files = open();
  refused({"model.safetensors", "\"x\"", "[3]", "[2]"}, [&] { files.weight("x", two); });
  refused({"\"z\"", "[2]", "lack"}, [&] { files.weight("z", two); });
  directory.write("model.safetensors", shard_of("x", {1, 2}, "I32"));
  refused({"I32"}, [&] { open().weight("x", two); });
}

TEST_CASE("model_files: tensors that the index does not name are seen, and one that two shards hold is refused") {
  const scratch_directory directory;
  const auto open = [&] { return model_files::open(directory.path()); };
  const auto write_two = [&](const std::string& file, const std::string& first, const std::string& second) {
    const std::string header = "{\"" + first + R"(": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, ")" +
                               second + R"(": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})";
    const std::uint64_t length = header.size();
    std::string bytes(sizeof length, '\0');
    std::memcpy(bytes.data(), &length, sizeof length);
    directory.write(file, bytes + header + std::string(8, '\0'));
  };
  directory.write(index_file, R"({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})");
  directory.write("a.safetensors", shard_of("x", {1, 2}));
  write_two("b.safetensors", "y", "unnamed");
  CHECK(open().names() == std::vector<std::string>{"unnamed", "x", "y"});
  write_two("b.safetensors", "y", "x");
  const std::string message = refusal(open);
  CHECK(message.find("b.safetensors: tensor \"x\" is in ") != std::string::npos);
  CHECK(message.find("a.safetensors too") != std::string::npos);
}

TEST_CASE("model_files: shards without an index are read when all are there") {
  const scratch_directory directory;
  const auto open = [&] { return model_files::open(directory.path()); };
  directory.write("model-00002-of-00002.safetensors", shard_of("y", {3, 4}));
  CHECK(refusal(open).find("does not follow shard 0 of 2") != std::string::npos);
  directory.write("model-00001-of-00002.safetensors", shard_of("x", {1, 2}));
  CHECK(open().names() == std::vector<std::string>{"x", "y"});
  std::filesystem::remove(directory.path() / "model-00002-of-00002.safetensors");
  CHECK(refusal(open).find("1 of 2 shards") != std::string::npos);
}

TEST_CASE("model_files: weights of another format, and an adapter beside the weights, are named") {
  const scratch_directory directory;
  const auto open = [&] { return model_files::open(directory.path()); };
  directory.write("pytorch_model.bin", "x");
  CHECK(refusal(open).find("pytorch_model.bin is of a format that is not read") != std::string::npos);
  directory.write("model.safetensors", shard_of("x", {1, 2}));
  CHECK(open().contains("x"));
  directory.write("adapter_model.safetensors", shard_of("lora_A", {1, 2}));
  CHECK(refusal(open).find("adapter_model.safetensors: an adapter") != std::string::npos);
}

TEST_CASE("model_files: a shard name cannot leave the model's directory") {
  for (const char* shard : {"\"../../etc/passwd\"", "\"../a.safetensors\"", "\"/etc/a.safetensors\"", "\"..\"",
                            "\"\"", "\".safetensors\"", "\"a\\\\b.safetensors\"", "\"a\\u0000.safetensors\"",
                            "\"a.bin\"", "\"sub/a.safetensors\""}) {
    CAPTURE(shard);
    CHECK(refused_shard(shard).find("plain name") != std::string::npos);
  }
  CHECK(refused_shard("1").find("string") != std::string::npos);
  CHECK(refusal([] { parse_shard_index("{}", index_file); }).find("weight_map") != std::string::npos);
  CHECK(refusal([] { parse_shard_index("{\"weight_map\": {}}", index_file); }).find("no tensors") !=
        std::string::npos);
  CHECK(refusal([] { parse_shard_index("[]", index_file); }).find("object") != std::string::npos);
}

TEST_CASE("check_finite: NaN and infinite weights are refused with tensor and element") {
  const scratch_directory directory;
  std::vector<float> values(10'000, 1.0F);
  values[9'000] = std::numeric_limits<float>::max();
  directory.write("model.safetensors", shard_of("w", values));
  model_files::open(directory.path()).check_finite();
  for (const float bad : {std::nanf(""), -std::numeric_limits<float>::infinity()}) {
    values[8'191] = bad;
    directory.write("model.safetensors", shard_of("w", values));
    const std::string message = refusal([&] { model_files::open(directory.path()).check_finite(); });
    CHECK(message.find("\"w\": element 8191 of 10000") != std::string::npos);
  }
}

TEST_CASE("first_non_finite: each half type has its own exponent") {
  const auto at = [](dtype type, std::uint16_t bits) {
    const std::uint16_t values[] = {0, bits};
    return first_non_finite({type, {2}, std::as_bytes(std::span(values))});
  };
  CHECK(at(dtype::bf16, 0x7f80) == 1U);
  CHECK(at(dtype::bf16, 0xffc0) == 1U);
  CHECK_FALSE(at(dtype::bf16, 0x7f7f));
  CHECK_FALSE(at(dtype::bf16, 0x7c00));
  CHECK(at(dtype::f16, 0x7c00) == 1U);
  CHECK_FALSE(at(dtype::f16, 0x7bff));
  CHECK_FALSE(at(dtype::u16, 0xffff));
}

TEST_CASE("parse_shard_index: truncations are refused, 3000 mutations refused or kept inside the directory") {
  const std::string index =
      R"({"metadata": {"total_size": 16}, "weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}})";
  const auto read = [](std::string_view text) {
    for (const auto& [tensor, shard] : parse_shard_index(text, index_file)) {
      CHECK(shard.find_first_of("/\\") == std::string::npos);
      CHECK(shard.ends_with(".safetensors"));
    }
  };
  CHECK(read_truncations(index, read).accepted == 0);
  const damage_count count = read_mutations(index, 3000, read);
  CHECK(count.refused > 0);
  CHECK(count.accepted > 0);
}
