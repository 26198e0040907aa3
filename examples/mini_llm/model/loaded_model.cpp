#include "loaded_model.hpp"

#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <system_error>
#include <utility>

#include "gguf_model.hpp"
#include "input_error.hpp"
#include "json_document.hpp"
#include "memory_limit.hpp"
#include "text/gguf_tokenizer.hpp"

namespace mini_llm {

namespace {

std::string reason_of(int error) { return std::generic_category().message(error); }

/// Names what is wrong with a path that is no GGUF file and no directory either, or a directory that holds one.
void require_directory(const std::filesystem::path& path) {
  std::error_code ignored;
  const bool is_directory = std::filesystem::is_directory(path, ignored);
  if (!is_directory && std::filesystem::exists(path, ignored)) {
    throw input_error(path.string(),
                      "is a file, and no GGUF file; that or a directory with config.json, tokenizer.json and "
                      "model.safetensors is expected");
  }
  if (!is_directory) throw input_error(path.string() + ": no such model directory or GGUF file");
  if (std::filesystem::exists(path / "config.json", ignored)) return;
  for (const auto& entry : std::filesystem::directory_iterator(path, ignored)) {
    if (entry.path().extension() != ".gguf") continue;
    throw input_error(path.string(),
                      "has no config.json; a GGUF file is a model by itself: give " + entry.path().string());
  }
}

}  // namespace

std::vector<std::int32_t> loaded_model::encode(std::string_view text) const {
  std::vector<std::int32_t> tokens = words.encode(text, true);
  for (const std::int32_t token : tokens) {
    if (token < config.vocab) continue;
    throw input_error(directory.string(), "the text holds token " + std::to_string(token) + ", " +
                                              in_quotes(words.token(token)) + ", but the model's vocab_size is " +
                                              std::to_string(config.vocab));
  }
  return tokens;
}

model_files loaded_model::files() const {
  return gguf ? model_files::of(*gguf, config) : model_files::open(directory);
}

loaded_model open_model(const std::filesystem::path& directory) {
  if (is_gguf_file(directory)) {
    gguf_file file = gguf_file::open(directory);
    return {directory, read_gguf_config(file), tokenizer::make(read_gguf_tokenizer(file), directory.string()),
            nullptr, std::move(file)};
  }
  require_directory(directory);
  return {directory, load_model_config(directory), tokenizer::load(directory), nullptr, std::nullopt};
}

loaded_model load_model(const std::filesystem::path& directory) {
  loaded_model made = open_model(directory);
  const model_files files = made.files();
  require_memory(llama::weight_bytes(made.config, files) + llama::scratch_bytes(made.config, max_slots),
                 "the weights of " + directory.string(), "a smaller model needs less");
  made.model = std::make_unique<llama>(made.config, files, max_slots, directory.filename().string());
  made.gguf.reset();  // with its mapping
  return made;
}

void fit_vocabulary(const loaded_model& target, loaded_model& draft) {
  if (const auto difference = same_vocabulary(target.words, draft.words)) {
    throw input_error("the draft " + draft.directory.string() + " and the target " + target.directory.string() +
                      " have different vocabularies: " + *difference);
  }
  if (target.config.vocab == draft.config.vocab) return;
  if (draft.model == nullptr) {
    throw input_error("the draft " + draft.directory.string() + " has a vocab of " +
                      std::to_string(draft.config.vocab) + ", the target " + target.directory.string() + " of " +
                      std::to_string(target.config.vocab) + "; on the GPU they must be alike");
  }
  draft.model->show_vocab(static_cast<std::int32_t>(target.config.vocab));
}

std::filesystem::path embedded_models() {
  if (const char* set = std::getenv("MINI_LLM_MODELS")) return set;
  return std::filesystem::path(SPECATTN_SOURCE_DIR) / "examples" / "models";
}

void require_readable(const std::filesystem::path& file) {
  if (file == "-") return;
  std::error_code ignored;
  if (std::filesystem::is_directory(file, ignored))
    throw input_error(file.string(), "is a directory; a file expected");
  errno = 0;
  if (::access(file.c_str(), R_OK) != 0) {
    throw input_error(file.string(), "cannot be opened for reading: " + reason_of(errno));
  }
}

void require_writable(const std::filesystem::path& file) {
  std::error_code ignored;
  const auto status = std::filesystem::status(file, ignored);
  if (std::filesystem::is_directory(status) || !file.has_filename()) {
    throw input_error(file.string(), "is a directory; the name of a file to write expected");
  }
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
    throw input_error(file.string(), "is no regular file, which alone can be written whole or not at all");
  }
  std::filesystem::path partial = file;
  partial += ".partial";  // tried for real: permissions alone do not tell
  errno = 0;
  if (!std::ofstream(partial, std::ios::binary | std::ios::app)) {
    throw input_error(file.string(), "cannot be written: " + reason_of(errno));
  }
  std::filesystem::remove(partial, ignored);
}

std::string read_text(const std::filesystem::path& file) {
  if (file == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
  require_readable(file);
  std::ifstream in(file, std::ios::binary);
  if (!in) throw input_error(file.string() + ": cannot be opened for reading");
  std::string text{std::istreambuf_iterator<char>(in), {}};
  if (in.bad()) throw input_error(file.string() + ": reading failed");
  return text;
}

void write_text(const std::filesystem::path& file, std::string_view text) {
  std::filesystem::path partial = file;
  partial += ".partial";
  {
    std::ofstream out(partial, std::ios::binary);
    if (!out) throw input_error(file.string() + ": cannot be opened for writing");
    out.write(text.data(), static_cast<std::streamsize>(text.size()));
    out.flush();
    if (!out) {
      std::error_code ignored;
      std::filesystem::remove(partial, ignored);
      throw input_error(file.string() + ": writing failed");
    }
  }
  std::error_code failed;
  std::filesystem::rename(partial, file, failed);
  if (failed) throw input_error(file.string() + ": " + failed.message());
}

}  // namespace mini_llm
