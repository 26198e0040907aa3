// Whatever the text: a configuration whose shape is usable, or input_error. The first NUL byte, if any, parts
// config.json from generation_config.json.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "input_error.hpp"
#include "model/model_config.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const std::size_t cut = text.find('\0');
  try {
    const auto config = mini_llm::parse_model_config(text.substr(0, cut),
                                                     cut == text.npos ? std::string_view() : text.substr(cut + 1));
    const bool usable = config.layers > 0 && config.kv_heads > 0 && config.q_heads % config.kv_heads == 0 &&
                        config.head_dim % 2 == 0 && config.vocab > 0 && config.rope.theta > 0;
    if (!usable) std::abort();
  } catch (const mini_llm::input_error&) {
  }
  return 0;
}
