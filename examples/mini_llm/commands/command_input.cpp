#include "command_input.hpp"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <string_view>

#include "input_error.hpp"
#include "option_values.hpp"

namespace mini_llm {
namespace {

/// Calls `take(part)` for each part between commas; none may be empty, which `take` sees to.
template <class Take>
void split_list(const std::string& list, Take take) {
  for (std::size_t from = 0; from <= list.size();) {
    const std::size_t end = (std::min)(list.find(',', from), list.size());
    take(std::string_view(list).substr(from, end - from));
    from = end + 1;
  }
}

}  // namespace

std::string print(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  va_list again;
  va_copy(again, arguments);
  const int length = std::vsnprintf(nullptr, 0, format, arguments);
  va_end(arguments);
  std::string text(static_cast<std::size_t>((std::max)(length, 0)), '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(again);
  return text;
}

void add_pair_flags(CLI::App& command, session_options& options) {
  command.add_option("-m,--model", options.model,
                     "target: a Hugging Face directory or a GGUF file; default: the embedded one");
  command.add_option("--md,--model-draft,--draft-model", options.draft,
                     "draft (or -md); default with the embedded target: its own");
  add_integer(command, "-t,--threads", options.threads, 0, 1024,
              "0: as many as the CPU affinity and the control group's quota allow");
  command.add_option("--kv,--cache-type", options.kv, "f16, bf16 or f32")->capture_default_str();
}

std::vector<token_text> read_texts(const std::vector<std::filesystem::path>& files, const loaded_model& reader,
                                   std::int32_t limit, std::int32_t least) {
  std::vector<token_text> texts;
  for (const std::filesystem::path& file : files) {
    std::string text = read_text(file);
    // Tokens of real text are a few bytes long; a limit of 16 bytes each loses nothing and spares long books.
    const auto enough = static_cast<std::size_t>(limit) * 16 + 256;
    if (text.size() > enough) {
      std::size_t end = enough;
      while (end > enough - 4 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
      text.resize(end);
    }
    token_text read{file == "-" ? "stdin" : file.stem().string(), reader.encode(text)};
    if (static_cast<std::int32_t>(read.tokens.size()) < least) {
      throw input_error(file.string() + ": " + std::to_string(read.tokens.size()) + " tokens; at least " +
                        std::to_string(least) + " are needed");
    }
    if (static_cast<std::int32_t>(read.tokens.size()) > limit) read.tokens.resize(static_cast<std::size_t>(limit));
    texts.push_back(std::move(read));
  }
  return texts;
}

std::vector<double> parse_numbers(const std::string& list, const char* flag, double low, double high) {
  std::vector<double> numbers;
  split_list(list, [&](std::string_view part) { numbers.push_back(read_number(flag, part, low, high)); });
  return numbers;
}

std::vector<std::int32_t> parse_integers(const std::string& list, const char* flag, std::int32_t low,
                                         std::int32_t high) {
  std::vector<std::int32_t> numbers;
  split_list(list, [&](std::string_view part) { numbers.push_back(read_integer(flag, part, low, high)); });
  return numbers;
}

}  // namespace mini_llm
