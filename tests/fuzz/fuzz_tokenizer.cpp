// Whatever the file and the text: ids of the vocabulary and their text back, or input_error. NUL bytes part
// tokenizer.json, tokenizer_config.json and the text to encode.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "input_error.hpp"
#include "text/stream_decoder.hpp"
#include "text/tokenizer.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  const auto next = [&] {
    const std::string_view part = rest.substr(0, rest.find('\0'));
    rest.remove_prefix(part.size() == rest.size() ? rest.size() : part.size() + 1);
    return part;
  };
  const std::string_view file = next();
  const std::string_view config = next();
  try {
    const auto tokenizer = mini_llm::tokenizer::parse(file, config);
    const auto ids = tokenizer.encode(rest, true);
    for (const std::int32_t id : ids) {
      if (id < 0 || static_cast<std::size_t>(id) >= tokenizer.vocab_size()) std::abort();
    }
    mini_llm::stream_decoder stream(tokenizer);
    std::string text;
    for (const std::int32_t id : ids) text += stream.push(id);
    text += stream.flush();
    if (text != mini_llm::replace_invalid_utf8(tokenizer.decode(ids))) std::abort();
  } catch (const mini_llm::input_error&) {
  }
  return 0;
}
