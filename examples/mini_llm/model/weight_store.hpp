// Every weight of a model in one allocation, packed tensor by tensor from the mapped files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "linear.hpp"
#include "model_files.hpp"
#include "specattn/buffer.hpp"

namespace mini_llm {

/// Where the rows of a file's tensor go in a packed matrix: row r becomes output
/// first_output + (r / run) * run_stride + r % run. The defaults keep rows adjacent.
struct row_placement {
  std::int64_t first_output = 0;
  std::int64_t run = INT64_MAX;
  std::int64_t run_stride = 0;
};

/// A tensor of the files and its place.
struct tensor_source {
  std::string name;
  std::int64_t rows = 0;
  row_placement place;
};

/// What the hash of a model's weights begins with.
inline constexpr std::uint64_t first_weight_hash = 0xcbf29ce484222325U;

/// Plans first, so that the bytes are known, then allocates once and loads. What is loaded keeps the files' element
/// type; tensors of one matrix whose types differ become float. A tensor is checked, hashed and packed in one go, and
/// its pages of the mapping are given back.
class weight_store {
 public:
  explicit weight_store(const model_files& files) : files_(&files) {}

  /// Plans a matrix of the stacked `sources`, each [rows, inputs]. Its data are there after load().
  /// \throws input_error for a tensor that is missing, of another shape or not a float type
  void plan(packed_matrix& matrix, std::int64_t outputs, std::int64_t inputs, std::vector<tensor_source> sources);
  /// Plans a vector of `size` floats.
  void plan(const float*& values, std::int64_t size, const std::string& name);

  /// Names of the tensors planned so far, until load().
  std::vector<std::string> names() const;
  /// Of everything planned.
  std::size_t bytes() const { return bytes_; }

  /// Allocates and fills. The planned matrices must be where they were.
  /// \throws input_error for NaN or infinite weights
  void load();

  /// A hash of names, types, shapes and bytes of what was loaded.
  std::uint64_t fingerprint() const { return fingerprint_; }

 private:
  struct planned {
    packed_matrix* matrix = nullptr;  ///< either a matrix
    const float** values = nullptr;   ///< or a vector
    std::int64_t inputs = 0;
    std::vector<tensor_source> sources;
    std::size_t offset_bytes = 0;
  };

  std::size_t take(std::size_t bytes);
  void load_matrix(const planned& plan);
  void load_vector(const planned& plan);

  const model_files* files_;
  std::vector<planned> plans_;
  std::size_t bytes_ = 0;
  specattn::buffer<std::byte> memory_;
  std::uint64_t fingerprint_ = first_weight_hash;
};

/// Shows a tensor to `use` in chunks of whole rows, use(first row, rows, their bytes), refuses NaN and infinity, and
/// continues `hash` over its identity and content. The pages of the mapping are given back behind each chunk.
/// \throws input_error
void read_in_chunks(const std::string& name, const stored_tensor& tensor, std::uint64_t& hash,
                    const std::function<void(std::int64_t, std::int64_t, std::span<const std::byte>)>& use);

/// Continues a 64-bit hash over more bytes: FNV-1a on 64-bit words in four interleaved streams.
std::uint64_t hash_bytes(std::uint64_t hash, std::span<const std::byte> bytes);

}  // namespace mini_llm
