#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gguf_file.hpp"
#include "model_config.hpp"
#include "safetensors.hpp"

namespace mini_llm {

/// Which shard of a model holds which tensor.
using shard_index = std::map<std::string, std::string, std::less<>>;

/// Reads the text of a model.safetensors.index.json.
/// \param source file name for messages
/// \return tensor name -> shard file name; every shard name is a plain file name ending in
///         ".safetensors", so that joined to the model's directory it stays inside
/// \throws input_error
shard_index parse_shard_index(std::string_view text, std::string_view source);

/// The weights of a Hugging Face model directory: model.safetensors or, when that is absent,
/// model.safetensors.index.json and the shards it names, or without an index all shards
/// model-00001-of-0000N.safetensors. Or those of a GGUF file, under Hugging Face's names and in bf16 (see gguf_weights()).
/// Files stay mapped while this lives.
class model_files {
 public:
  /// \param directory a model directory
  /// \throws input_error when there are no weights, when a file is malformed, when two hold one tensor, and for an
  ///         adapter beside the weights
  static model_files open(const std::filesystem::path& directory);

  /// Those of a GGUF file that is open, whose configuration is `config`. \throws input_error as gguf_weights() does
  static model_files of(const gguf_file& file, const model_config& config);

  /// Whether a tensor of that name is there.
  bool contains(std::string_view tensor_name) const { return find(tensor_name) != nullptr; }
  /// The tensor of that name, or nullptr.
  const stored_tensor* find(std::string_view tensor_name) const;

  /// The tensor of that name as weights. Its bytes may be unaligned (see stored_tensor); they
  /// are valid while this object lives.
  /// \param shape the shape the model's configuration calls for
  /// \throws input_error when absent, of another shape, or not of type f32, f16 or bf16
  const stored_tensor& weight(std::string_view tensor_name, std::span<const std::int64_t> shape) const;

  /// All tensor names of all files, in order.
  std::vector<std::string> names() const;
  /// Bytes of all tensors together.
  std::uint64_t total_bytes() const noexcept { return total_bytes_; }

  /// Looks at every f32, f16 and bf16 element and refuses the first NaN or infinity.
  /// \throws input_error naming file, tensor and element
  /// \cost   reads every byte of the weights once
  void check_finite() const;

 private:
  void open_indexed();
  void gather_tensors();

  std::filesystem::path directory_;
  std::vector<safetensors_file> shards_;
  std::map<std::string, std::size_t, std::less<>> shard_of_;  // tensor name -> index in shards_
  std::uint64_t total_bytes_ = 0;
};

/// Index of the first NaN or infinity of an f32, f16 or bf16 tensor, or nothing; nothing for
/// other element types.
std::optional<std::size_t> first_non_finite(const stored_tensor& tensor);

}  // namespace mini_llm
