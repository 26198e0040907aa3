// Whatever the bytes: metadata and tensors that lie inside the file, a configuration whose weights can be read, a tokenizer
// that works; or input_error says why not.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "gguf_file.hpp"
#include "input_error.hpp"
#include "model/gguf_model.hpp"
#include "text/gguf_tokenizer.hpp"
#include "text/tokenizer.hpp"

namespace {

void read_weights(const mini_llm::gguf_file& file) {
  const mini_llm::model_config config = mini_llm::read_gguf_config(file);
  if (config.q_heads % config.kv_heads != 0 || config.head_dim % 2 != 0 || config.vocab < 1) std::abort();
  for (const auto& [name, tensor] : mini_llm::gguf_weights(file, config)) {
    std::vector<std::byte> decoded;
    for (std::int64_t r = 0; r < tensor.rows(); ++r) tensor.elements(r, 1, decoded);
  }
}

void read_words(const mini_llm::gguf_file& file) {
  const auto words = mini_llm::tokenizer::make(mini_llm::read_gguf_tokenizer(file), "fuzz");
  const auto ids = words.encode("ab <s>c|1234 \xe2\x96\x81'll\n\xff", true);
  for (const std::int32_t id : ids) {
    if (id < 0 || static_cast<std::size_t>(id) >= words.vocab_size()) std::abort();
  }
  words.decode(ids);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(data, size));
  try {
    const auto file = mini_llm::gguf_file::parse(bytes, "fuzz");
    for (const auto& [name, tensor] : file.tensors()) {
      const auto begin = static_cast<std::size_t>(tensor.bytes.data() - bytes.data());
      if (begin > size || tensor.bytes.size() > size - begin) std::abort();
    }
    for (const auto& [key, value] : file.values()) value.shown();
    for (const auto read : {read_weights, read_words}) {
      try {
        read(file);
      } catch (const mini_llm::input_error&) {
      }
    }
  } catch (const mini_llm::input_error&) {
  }
  return 0;
}
