// Whatever the text: a consistent alignment that survives being written and read again, or contract_error.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "specattn/alignment_json.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const specattn::alignment read = specattn::from_json_text(text);
    read.layer_map_only().check();
    const specattn::alignment again = specattn::from_json_text(to_json_text(read));
    if (again.coefficients != read.coefficients || !again.draft.matches(read.draft)) std::abort();
  } catch (const specattn::contract_error&) {
  }
  return 0;
}
