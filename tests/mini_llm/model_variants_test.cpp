// Model directories as users have them: a copy of an embedded model with one thing changed runs as it did, or says why
// not.
#include <doctest/doctest.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "commands/perplexity.hpp"
#include "commands/session.hpp"
#include "damaged_input.hpp"
#include "input_error.hpp"
#include "model/engine.hpp"

namespace {

using mini_llm::guide_kind;
using nlohmann::json;

/// A copy of books-1m to change; gone at the end.
class model_copy {
 public:
  model_copy() : path_(directory_.path() / "copy") {
    std::filesystem::copy(source_path("examples/models/books-1m"), path_);
  }
  const std::filesystem::path& path() const { return path_; }

  void edit(const char* file, const std::function<void(json&)>& change) const {
    json document = json::parse(read_all(path_ / file));
    change(document);
    directory_.write(std::string("copy/") + file, document.dump());
  }
  void write(const char* file, std::string_view content) const {
    directory_.write(std::string("copy/") + file, content);
  }
  /// The tensors of model.safetensors: its header, and the data behind.
  void edit_weights(const std::function<void(json&, std::string&)>& change) const {
    const std::string file = read_all(path_ / "model.safetensors");
    std::uint64_t length = 0;
    std::memcpy(&length, file.data(), sizeof length);
    json header = json::parse(file.substr(sizeof length, length));
    std::string data = file.substr(sizeof length + length);
    change(header, data);
    const std::string text = header.dump();
    length = text.size();
    write("model.safetensors", std::string(reinterpret_cast<const char*>(&length), sizeof length) + text + data);
  }

 private:
  scratch_directory directory_;
  std::filesystem::path path_;
};

mini_llm::session_options alone(const std::filesystem::path& model) {
  mini_llm::session_options options;
  options.model = model;
  options.guide = "none";
  options.threads = 1;
  options.decode.max_positions = 64;
  options.decode.draft_length = 0;
  return options;
}

mini_llm::session_options pair_with(const std::filesystem::path& draft) {
  mini_llm::session_options options = alone(source_path("examples/models/books-7m"));
  options.draft = draft;
  options.decode.draft_length = 3;
  return options;
}

struct greedy_run {
  std::string text;
  std::int64_t proposed = 0;
};

greedy_run run(const mini_llm::session_options& options) {
  const mini_llm::session made = mini_llm::open_session(options);
  const std::vector<std::int32_t> prompt = made.target->encode("It was");
  made.require_room(made.guide, made.decode, made.decode.max_positions);
  const auto engine = made.make(made.guide, made.decode);
  const std::int32_t row = engine->add({.prompt = prompt, .max_new_tokens = 16}, [](std::int32_t, std::int32_t) {});
  while (engine->step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
  }
  return {made.target->words.decode(engine->text(row)), engine->counts(row).proposed};
}

std::string refused(const mini_llm::session_options& options) {
  return refusal([&] { run(options); });
}

/// The copy runs alone as the model it was, and drafts for books-7m.
void check_runs(const model_copy& copy) {
  CHECK(run(alone(copy.path())).text == run(alone(source_path("examples/models/books-1m"))).text);
  const greedy_run paired = run(pair_with(copy.path()));
  CHECK(paired.text == run(alone(source_path("examples/models/books-7m"))).text);
  CHECK(paired.proposed > 0);
}

/// Rows behind the last token, as trainers add them.
void pad_embedding(const model_copy& copy, std::int64_t rows) {
  copy.edit_weights([&](json& header, std::string& data) {
    json& entry = header["model.embed_tokens.weight"];
    const auto begin = entry["data_offsets"][0].get<std::size_t>();
    const auto end = entry["data_offsets"][1].get<std::size_t>();
    const std::string padded =
        data.substr(begin, end - begin) + std::string(static_cast<std::size_t>(rows) * 256, '\0');
    entry["shape"][0] = 4096 + rows;
    entry["data_offsets"] = {data.size(), data.size() + padded.size()};
    data += padded;
  });
  copy.edit("config.json", [&](json& config) { config["vocab_size"] = 4096 + rows; });
}

void scale(json& header, std::string& data, const char* name, float factor) {
  for (auto at = header[name]["data_offsets"][0].get<std::size_t>();
       at < header[name]["data_offsets"][1].get<std::size_t>(); at += 2) {
    specattn::bf16 bits;
    std::memcpy(&bits, data.data() + at, sizeof bits);
    bits = specattn::from_float<specattn::bf16>(specattn::to_float(bits) * factor);
    std::memcpy(data.data() + at, &bits, sizeof bits);
  }
}

}  // namespace

TEST_CASE("model variants: special tokens, padding, end tokens and what does not count: runs, and drafts") {
  const model_copy copy;
  SUBCASE("nothing changed") {}
  SUBCASE("a tokenizer with a token more than the model has") {
    copy.edit("tokenizer.json", [](json& file) {
      json pad = file["added_tokens"][0];
      pad["id"] = 4096;
      pad["content"] = "<pad>";
      file["added_tokens"].push_back(pad);
    });
  }
  SUBCASE("a special token of another name") {
    copy.edit("tokenizer.json", [](json& file) {
      const std::string old = file["added_tokens"][0]["content"];
      file["added_tokens"][0]["content"] = "<|end_of_text|>";
      if (file["model"]["vocab"].erase(old) > 0) file["model"]["vocab"]["<|end_of_text|>"] = 0;
    });
    copy.edit("tokenizer_config.json", [](json& file) { file["bos_token"] = file["eos_token"] = "<|end_of_text|>"; });
  }
  SUBCASE("another end token") {
    copy.edit("tokenizer_config.json", [](json& file) { file["eos_token"] = "a"; });
  }
  SUBCASE("an embedding with padding rows") { pad_embedding(copy, 64); }
  SUBCASE("no begin token, said by -1") {
    copy.edit("config.json", [](json& file) { file["bos_token_id"] = -1; });
  }
  SUBCASE("shards without an index") {
    std::filesystem::rename(copy.path() / "model.safetensors", copy.path() / "model-00001-of-00001.safetensors");
  }
  SUBCASE("a window that the run stays in") {
    copy.edit("config.json", [](json& file) {
      file["architectures"] = {"MistralForCausalLM"};
      file["model_type"] = "mistral";
      file["sliding_window"] = 64;
    });
  }
  SUBCASE("a context that the run stays in") {
    copy.edit("config.json", [](json& file) { file["max_position_embeddings"] = 64; });
  }
  check_runs(copy);
}

TEST_CASE("model variants: a target with padding rows takes a draft without them") {
  const model_copy copy;
  pad_embedding(copy, 64);
  mini_llm::session_options options = pair_with(source_path("examples/models/books-1m"));
  options.model = copy.path();
  const greedy_run paired = run(options);
  CHECK(paired.text == run(alone(copy.path())).text);
  CHECK(paired.proposed > 0);
}

TEST_CASE("model variants: a text with a token that the model lacks is refused by the token") {
  const model_copy copy;
  copy.edit("tokenizer.json", [](json& file) {
    json pad = file["added_tokens"][0];
    pad["id"] = 4096;
    pad["content"] = "<pad>";
    file["added_tokens"].push_back(pad);
  });
  const mini_llm::session made = mini_llm::open_session(alone(copy.path()));
  CHECK_NOTHROW(made.target->encode("It was"));
  CHECK(refusal([&] { made.target->encode("It <pad> was"); }).find("token 4096, \"<pad>\"") != std::string::npos);
}

TEST_CASE("model variants: a context or window that the run would leave is refused by its length and -c") {
  const model_copy copy;
  copy.edit("config.json", [](json& file) { file["sliding_window"] = 32; });
  const std::string message = refused(alone(copy.path()));
  CAPTURE(message);
  CHECK(message.find("last 32 positions (sliding_window), 64 are asked for") != std::string::npos);
  CHECK(message.find("-c,--ctx-size 32") != std::string::npos);
  const greedy_run paired = run(pair_with(copy.path()));  // a draft drafts as far as it reaches
  CHECK(paired.text == run(alone(source_path("examples/models/books-7m"))).text);
}

TEST_CASE("model variants: a cut GGUF file, another file for a model and Git LFS pointers are named") {
  const model_copy copy;
  const auto message = [&](const std::filesystem::path& model) { return refused(alone(model)); };
  copy.write("other.gguf", "GGUF");
  CHECK(message(copy.path() / "other.gguf").find("is the file cut short?") != std::string::npos);
  CHECK(message(copy.path() / "config.json").find("is a file, and no GGUF file") != std::string::npos);
  const std::string pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 2525440\n";
  for (const char* file : {"model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"}) {
    const model_copy cloned;
    cloned.write(file, pointer);
    CHECK(message(cloned.path()).find(std::string(file) + ": is a Git LFS pointer") != std::string::npos);
  }
  std::filesystem::remove(copy.path() / "config.json");
  CHECK(message(copy.path()).find("has no config.json; a GGUF file is a model by itself") != std::string::npos);
  mini_llm::session_options options = pair_with(source_path("examples/models/books-1m"));
  copy.write("alignment.json", pointer);
  options.alignment = copy.path() / "alignment.json";
  CHECK(refused(options).find("alignment.json: is a Git LFS pointer") != std::string::npos);
  options.alignment = copy.path();
  CHECK(refused(options).find("is a directory") != std::string::npos);
}

TEST_CASE("model variants: keys past f16's range end generation and perplexity by name, and run in bf16") {
  const model_copy copy;
  copy.edit_weights([](json& header, std::string& data) {
    scale(header, data, "model.layers.1.self_attn.k_proj.weight", 262144.0f);
    scale(header, data, "model.layers.1.self_attn.q_proj.weight", 1.0f / 262144.0f);
  });
  mini_llm::session_options options = alone(copy.path());
  CHECK(refused(options).find("--kv bf16") != std::string::npos);
  options.kv = "bf16";
  CHECK(run(options).text == run(alone(source_path("examples/models/books-1m"))).text);
  mini_llm::perplexity_options scoring;
  scoring.pair = pair_with(source_path("examples/models/books-1m"));
  scoring.pair.model = copy.path();
  scoring.files = {source_path("tests/golden/README.md")};
  scoring.contexts = "64";
  scoring.guides = "none";
  CHECK(refusal([&] { mini_llm::run_perplexity(scoring); }).find("--kv bf16") != std::string::npos);
}

TEST_CASE("model variants: perplexity of losses that are no numbers is an error, not a table") {
  const model_copy copy;
  const auto gain = [&](float factor) {
    copy.edit_weights([&](json& header, std::string& data) { scale(header, data, "model.norm.weight", factor); });
  };
  gain(1e30f);
  mini_llm::perplexity_options scoring;
  scoring.pair = pair_with(source_path("examples/models/books-1m"));
  scoring.pair.model = copy.path();
  scoring.pair.kv = "f32";
  scoring.files = {source_path("tests/golden/README.md")};
  scoring.contexts = "64";
  scoring.guides = "none";
  const std::string message = refusal([&] { mini_llm::run_perplexity(scoring); });
  CHECK(message.find("has no perplexity") != std::string::npos);
  gain(1e8f);  // the logits overflow float
  const std::string overflow = refusal([&] { mini_llm::run_perplexity(scoring); });
  CHECK(overflow.find("README: decode: the target's logits for position") != std::string::npos);
  CHECK(overflow.find("--kv bf16 or f32") != std::string::npos);
}
