#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "mapped_file.hpp"

namespace mini_llm {

/// Element types a safetensors file may hold. Weights are f32, f16 or bf16; files with the others
/// are read, but asking for such a tensor as weights is refused (see model_files::weight). `unknown`
/// is a type that the format got later: its elements are taken for bytes.
enum class dtype { f32, f16, bf16, f64, f8_e4m3, f8_e5m2, i64, i32, i16, i8, u64, u32, u16, u8, boolean, unknown };

/// Bytes of one element.
std::size_t size_bytes(dtype type) noexcept;
/// The name the file format uses: "F32", "BF16", …
std::string_view name(dtype type) noexcept;

/// "[2, 3]", for messages.
std::string shape_text(std::span<const std::int64_t> shape);

/// One tensor of a file: a view of its bytes, row-major, little-endian.
///
/// The format does not align tensors: bytes.data() may be odd. Read elements with std::memcpy
/// (or read_floats below), never through a cast pointer.
struct stored_tensor {
  dtype type = dtype::f32;
  std::vector<std::int64_t> shape;   ///< outermost first; empty for a single number
  std::span<const std::byte> bytes;  ///< product(shape) * size_bytes(type) bytes; of an unknown type what is there
  std::string type_text{};           ///< the type as the file spells it; empty where no file is
  std::string source{};              ///< name of the file, for messages; empty where no file is

  /// Where it is set, `bytes` are no elements of `type` but another form of as many rows, each as long as the others:
  /// decode(first, rows, out) writes the elements of rows [first, first + rows) of `shape` to `out`.
  std::function<void(std::int64_t, std::int64_t, std::span<std::byte>)> decode{};

  /// Number of elements; a dimension of zero gives zero.
  std::size_t size() const noexcept;
  /// Extent of the outermost dimension; one for a single number.
  std::int64_t rows() const noexcept { return shape.empty() ? 1 : shape.front(); }

  /// What rows [first, first + count) are in the file, decoded or not.
  std::span<const std::byte> stored_rows(std::int64_t first, std::int64_t count) const noexcept;
  /// The elements of those rows: where they are in the file, or decoded to `decoded`, which must then outlive the result.
  std::span<const std::byte> elements(std::int64_t first, std::int64_t count, std::vector<std::byte>& decoded) const;
};

/// Converts every element of an f32, f16 or bf16 tensor to float, exactly.
/// \param out tensor.size() floats
/// \throws input_error for another element type, std::invalid_argument for a wrong length of out
void read_floats(const stored_tensor& tensor, std::span<float> out);

/// The tensors of one safetensors file: eight bytes of header length, a JSON header, the data.
///
/// Checked before anything is believed: the header's length and JSON, that names are given once,
/// that dimensions are non-negative and their product times the element size neither overflows
/// nor differs from the byte range, that ranges lie inside the file and do not overlap. Unused
/// bytes between or after tensors are tolerated. `__metadata__` is ignored.
class safetensors_file {
 public:
  using tensor_map = std::map<std::string, stored_tensor, std::less<>>;

  /// Reads a file held in memory. The tensors view `file`, which must outlive them.
  /// \param source file name for messages
  /// \throws input_error
  static safetensors_file parse(std::span<const std::byte> file, std::string_view source);

  /// Maps the file and reads it; the mapping lives as long as any copy of the result.
  /// \throws input_error
  static safetensors_file open(const std::filesystem::path& path);

  /// Tensors that another format's reader found, to be asked for as those of a safetensors file are.
  static safetensors_file of(tensor_map tensors, std::shared_ptr<const mapped_file> mapping, std::string_view source);

  /// All tensors, ordered by name.
  const tensor_map& tensors() const& noexcept { return tensors_; }
  const tensor_map& tensors() && = delete;  // a loop over a temporary's tensors would dangle
  /// The tensor of that name, or nullptr.
  const stored_tensor* find(std::string_view tensor_name) const;
  /// File name as given.
  const std::string& source() const noexcept { return source_; }

 private:
  std::string source_;
  tensor_map tensors_;
  std::shared_ptr<const mapped_file> mapping_;  // empty when the caller holds the bytes
};

}  // namespace mini_llm
