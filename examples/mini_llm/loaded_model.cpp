#include "loaded_model.hpp"

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <system_error>

#include "input_error.hpp"
#include "model_files.hpp"

namespace mini_llm {

loaded_model open_model(const std::filesystem::path& directory) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(directory, ignored)) {
    throw input_error(directory.string() + ": no such model directory");
  }
  model_config config = load_model_config(directory);
  tokenizer words = tokenizer::load(directory);
  if (words.vocab_size() > static_cast<std::size_t>(config.vocab)) {
    throw input_error(directory.string() + ": the tokenizer has " + std::to_string(words.vocab_size()) +
                      " tokens, the model's vocab is " + std::to_string(config.vocab));
  }
  return {directory, std::move(config), std::move(words), nullptr};
}

loaded_model load_model(const std::filesystem::path& directory) {
  loaded_model made = open_model(directory);
  const model_files files = model_files::open(directory);
  made.model = std::make_unique<llama>(made.config, files, max_slots, directory.filename().string());
  return made;
}

void check_same_vocabulary(const loaded_model& target, const loaded_model& draft) {
  if (const auto difference = same_vocabulary(target.words, draft.words)) {
    throw input_error("the draft " + draft.directory.string() + " and the target " + target.directory.string() +
                      " have different vocabularies: " + *difference);
  }
  if (target.config.vocab != draft.config.vocab) {
    throw input_error("the draft " + draft.directory.string() + " has a vocab of " +
                      std::to_string(draft.config.vocab) + ", the target " + target.directory.string() + " of " +
                      std::to_string(target.config.vocab));
  }
}

std::filesystem::path embedded_models() {
  if (const char* set = std::getenv("MINI_LLM_MODELS")) return set;
  return std::filesystem::path(SPECATTN_SOURCE_DIR) / "examples" / "models";
}

std::string read_text(const std::filesystem::path& file) {
  if (file == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
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
