// Whatever the bytes: the tensors lie inside the file, or input_error says why not.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "input_error.hpp"
#include "model/model_files.hpp"
#include "model/safetensors.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(data, size));
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const auto file = mini_llm::safetensors_file::parse(bytes, "fuzz");
    for (const auto& [name, tensor] : file.tensors()) {
      if (tensor.size() * size_bytes(tensor.type) != tensor.bytes.size()) std::abort();
      mini_llm::first_non_finite(tensor);
      std::vector<float> values(tensor.size());
      read_floats(tensor, values);
    }
  } catch (const mini_llm::input_error&) {
  }
  try {
    for (const auto& [name, shard] : mini_llm::parse_shard_index(text, "fuzz")) {
      if (shard.find_first_of("/\\") != shard.npos) std::abort();
    }
  } catch (const mini_llm::input_error&) {
  }
  return 0;
}
