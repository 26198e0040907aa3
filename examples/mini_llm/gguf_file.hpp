#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gguf_value.hpp"
#include "mapped_file.hpp"

namespace mini_llm {

/// Element type of a tensor in a GGUF file: `block_elements` adjacent elements of a row share `block_bytes` bytes.
struct gguf_tensor_type {
  std::uint32_t id;
  std::string_view name;
  std::size_t block_elements;
  std::size_t block_bytes;
};

/// The types of weights that are read, from F32 to Q6_K; others are refused by name.
std::span<const gguf_tensor_type> gguf_tensor_types() noexcept;

/// A tensor of a file: a view of its blocks, row by row.
struct gguf_tensor {
  const gguf_tensor_type* type = nullptr;
  std::vector<std::int64_t> shape;  ///< outermost first, which is not the file's order; all above zero
  std::span<const std::byte> bytes;
};

/// A GGUF file of version 2 or 3, little-endian: counts, metadata, descriptions of tensors, the tensors' data. The format is
/// described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
///
/// Checked before anything is believed: every count, length and offset against the file's size, that keys and names are
/// given once, that the tensors' data lie inside the file, aligned, and do not overlap. Memory is taken for the keys, the
/// names and the shapes only; the rest is viewed where it is.
class gguf_file {
 public:
  /// Reads a file held in memory, which must outlive the result.
  /// \param source file name for messages
  /// \throws input_error
  static gguf_file parse(std::span<const std::byte> file, std::string_view source);

  /// Maps the file and reads it; the mapping lives as long as any copy of the result, or of mapping().
  /// \throws input_error
  static gguf_file open(const std::filesystem::path& path);

  /// The value of that key, or nothing.
  std::optional<gguf_value> find(std::string_view key) const;
  /// The value of that key. \throws input_error when it is absent
  gguf_value at(std::string_view key) const;

  using value_map = std::map<std::string_view, gguf_value>;
  using tensor_map = std::map<std::string_view, gguf_tensor>;
  const value_map& values() const& noexcept { return values_; }
  const tensor_map& tensors() const& noexcept { return tensors_; }
  const value_map& values() && = delete;  // a loop over a temporary's values would dangle
  const tensor_map& tensors() && = delete;
  /// File name as given.
  const std::string& source() const noexcept { return *source_; }
  /// Empty when the caller holds the bytes.
  std::shared_ptr<const mapped_file> mapping() const noexcept { return mapping_; }

 private:
  std::shared_ptr<const std::string> source_;  // values view it
  value_map values_;
  tensor_map tensors_;
  std::shared_ptr<const mapped_file> mapping_;
};

/// Whether a model's path is a GGUF file: not a directory, and named or beginning like one.
bool is_gguf_file(const std::filesystem::path& path);

}  // namespace mini_llm
