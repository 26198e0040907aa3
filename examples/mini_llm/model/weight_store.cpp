#include "weight_store.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "input_error.hpp"

namespace mini_llm {
namespace {

constexpr std::size_t chunk_bytes = std::size_t{512} << 10;  // of a file resident at a time

/// Lets the kernel drop the pages of a part of a mapped file. They are read again if touched, so the pages at the
/// ends, shared with other tensors, may go too.
void release_pages(std::span<const std::byte> part) {
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<std::uintptr_t>(part.data()) / page * page;
  const auto last = reinterpret_cast<std::uintptr_t>(part.data() + part.size());
  ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);  // advice: a refusal costs memory only
}

std::uint64_t mix(std::uint64_t hash, std::uint64_t word) {
  hash = (hash ^ word) * 0x100000001b3U;
  return hash ^ (hash >> 32);
}

/// `count` stored elements as elements of `type`, which is theirs or f32.
void convert(const std::byte* from, dtype from_type, dtype type, std::size_t count, std::vector<std::byte>& out) {
  out.resize(count * size_bytes(type));
  if (from_type == type) {
    std::memcpy(out.data(), from, out.size());
    return;
  }
  std::vector<float> floats(count);
  read_floats({from_type, {}, {from, count * size_bytes(from_type)}}, floats);
  std::memcpy(out.data(), floats.data(), out.size());
}

std::array<std::int64_t, 2> matrix_shape(const tensor_source& source, std::int64_t inputs) {
  return {source.rows, inputs};
}

}  // namespace

std::uint64_t hash_bytes(std::uint64_t hash, std::span<const std::byte> bytes) {
  constexpr std::size_t streams = 4;
  constexpr std::size_t step = streams * sizeof(std::uint64_t);
  std::array<std::uint64_t, streams> state{hash, hash + 1, hash + 2, hash + 3};
  std::size_t at = 0;
  for (; at + step <= bytes.size(); at += step) {
    std::array<std::uint64_t, streams> words;
    std::memcpy(words.data(), bytes.data() + at, step);
    for (std::size_t s = 0; s < streams; ++s) state[s] = mix(state[s], words[s]);
  }
  hash = mix(hash, bytes.size());
  for (const std::uint64_t part : state) hash = mix(hash, part);
  for (; at < bytes.size(); ++at) hash = mix(hash, static_cast<std::uint64_t>(bytes[at]));
  return hash;
}

void read_in_chunks(const std::string& name, const stored_tensor& tensor, std::uint64_t& hash,
                    const std::function<void(std::int64_t, std::int64_t, std::span<const std::byte>)>& use) {
  hash = hash_bytes(hash, std::as_bytes(std::span(name)));
  hash = mix(hash, static_cast<std::uint64_t>(tensor.type));
  const std::size_t row_elements = tensor.size() / static_cast<std::size_t>(tensor.rows());
  const auto chunk_rows =
      static_cast<std::int64_t>(std::max<std::size_t>(1, chunk_bytes / (row_elements * size_bytes(tensor.type))));
  std::vector<std::byte> decoded;
  for (std::int64_t row = 0; row < tensor.rows(); row += chunk_rows) {
    const std::int64_t count = std::min(chunk_rows, tensor.rows() - row);
    const std::span<const std::byte> elements = tensor.elements(row, count, decoded);
    if (const auto element = first_non_finite({tensor.type, {}, elements})) {
      throw input_error(tensor.source, "tensor \"" + name + "\": element " +
                                           std::to_string(static_cast<std::size_t>(row) * row_elements + *element) +
                                           " of " + std::to_string(tensor.size()) + " is NaN or infinite");
    }
    hash = hash_bytes(hash, elements);
    use(row, count, elements);
    release_pages(tensor.stored_rows(row, count));
  }
  if (tensor.decode) release_pages(tensor.bytes);  // a row may have come from beside its chunk
}

std::size_t weight_store::take(std::size_t bytes) {
  constexpr std::size_t alignment = specattn::buffer<std::byte>::alignment;
  const std::size_t offset = bytes_;
  bytes_ += (bytes + alignment - 1) / alignment * alignment;
  return offset;
}

void weight_store::plan(packed_matrix& matrix, std::int64_t outputs, std::int64_t inputs,
                        std::vector<tensor_source> sources) {
  matrix.outputs = outputs;
  matrix.inputs = inputs;
  matrix.type = files_->weight(sources.front().name, matrix_shape(sources.front(), inputs)).type;
  for (const tensor_source& source : sources) {
    if (files_->weight(source.name, matrix_shape(source, inputs)).type != matrix.type) matrix.type = dtype::f32;
  }
  const std::size_t offset = take(matrix.bytes());
  plans_.push_back({&matrix, nullptr, inputs, std::move(sources), offset});
}

void weight_store::plan(const float*& values, std::int64_t size, const std::string& name) {
  files_->weight(name, std::array{size});
  const std::size_t offset = take(static_cast<std::size_t>(size) * sizeof(float));
  plans_.push_back({nullptr, &values, size, {{name, size, {}}}, offset});
}

std::vector<std::string> weight_store::names() const {
  std::vector<std::string> names;
  for (const planned& plan : plans_) {
    for (const tensor_source& source : plan.sources) names.push_back(source.name);
  }
  return names;
}

void weight_store::load() {
  memory_ = specattn::buffer<std::byte>(bytes_);
  for (const planned& plan : plans_) {
    if (plan.matrix != nullptr) {
      load_matrix(plan);
    } else {
      load_vector(plan);
    }
  }
  plans_.clear();
}

void weight_store::load_matrix(const planned& plan) {
  packed_matrix& matrix = *plan.matrix;
  matrix.data = memory_.data() + plan.offset_bytes;
  std::vector<std::byte> row_copy;
  for (const tensor_source& source : plan.sources) {
    const stored_tensor& tensor = files_->weight(source.name, matrix_shape(source, plan.inputs));
    read_in_chunks(source.name, tensor, fingerprint_,
                   [&](std::int64_t first_row, std::int64_t count, std::span<const std::byte> bytes) {
                     const auto inputs = static_cast<std::size_t>(plan.inputs);
                     const std::size_t row_bytes = inputs * size_bytes(tensor.type);
                     for (std::int64_t r = 0; r < count; ++r) {
                       convert(bytes.data() + static_cast<std::size_t>(r) * row_bytes, tensor.type, matrix.type,
                               inputs, row_copy);
                       const std::int64_t row = first_row + r;
                       const row_placement& place = source.place;
                       matrix.set_row(place.first_output + row / place.run * place.run_stride + row % place.run,
                                      row_copy.data());
                     }
                   });
  }
}

void weight_store::load_vector(const planned& plan) {
  auto* const values = reinterpret_cast<float*>(memory_.data() + plan.offset_bytes);
  const std::string& name = plan.sources.front().name;
  const stored_tensor& tensor = files_->weight(name, std::array{plan.inputs});
  read_in_chunks(name, tensor, fingerprint_,
                 [&](std::int64_t first, std::int64_t count, std::span<const std::byte> bytes) {
                   read_floats({tensor.type, {}, bytes}, std::span(values + first, static_cast<std::size_t>(count)));
                 });
  *plan.values = values;
}

}  // namespace mini_llm
