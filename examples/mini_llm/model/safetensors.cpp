#include "safetensors.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <utility>

#include "input_error.hpp"
#include "json_document.hpp"
#include "specattn/scalar.hpp"

namespace mini_llm {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data are little-endian and are used in place");

// The reference implementation's own bound.
constexpr std::uint64_t max_header_bytes = 100'000'000;
constexpr std::size_t max_rank = 16;

struct dtype_facts {
  dtype type;
  std::string_view name;
  std::size_t size_bytes;
};

constexpr std::array<dtype_facts, 16> known_dtypes{{
    {dtype::f32, "F32", 4},
    {dtype::f16, "F16", 2},
    {dtype::bf16, "BF16", 2},
    {dtype::f64, "F64", 8},
    {dtype::f8_e4m3, "F8_E4M3", 1},
    {dtype::f8_e5m2, "F8_E5M2", 1},
    {dtype::i64, "I64", 8},
    {dtype::i32, "I32", 4},
    {dtype::i16, "I16", 2},
    {dtype::i8, "I8", 1},
    {dtype::u64, "U64", 8},
    {dtype::u32, "U32", 4},
    {dtype::u16, "U16", 2},
    {dtype::u8, "U8", 1},
    {dtype::boolean, "BOOL", 1},
    {dtype::unknown, "unknown", 1},
}};

const dtype_facts& facts(dtype type) { return known_dtypes[static_cast<std::size_t>(type)]; }

dtype read_dtype(const json_field& field) {
  for (const dtype_facts& known : known_dtypes) {
    if (field.text() == known.name) return known.type;
  }
  return dtype::unknown;
}

std::optional<std::uint64_t> product(std::uint64_t a, std::uint64_t b) {
  if (a != 0 && b > std::numeric_limits<std::uint64_t>::max() / a) return std::nullopt;
  return a * b;
}

std::vector<std::int64_t> read_shape(const json_field& field) {
  const std::size_t rank = field.size();
  if (rank > max_rank) {
    field.refuse(std::to_string(rank) + " dimensions; at most " + std::to_string(max_rank));
  }
  std::vector<std::int64_t> shape(rank);
  for (std::size_t i = 0; i < rank; ++i) {
    shape[i] = field.at(i).integer(0, std::numeric_limits<std::int64_t>::max());
  }
  return shape;
}

/// Bytes a tensor of this type and shape takes. \throws input_error when they overflow 64 bits
std::uint64_t required_bytes(dtype type, std::span<const std::int64_t> shape, const json_field& field) {
  std::optional<std::uint64_t> total = facts(type).size_bytes;
  for (const std::int64_t extent : shape) {
    if (total) total = product(*total, static_cast<std::uint64_t>(extent));
  }
  if (!total) field.refuse("the shape " + shape_text(shape) + " has too many elements to count");
  return *total;
}

stored_tensor read_tensor(const json_field& entry, std::span<const std::byte> data, std::string_view source) {
  stored_tensor tensor;
  tensor.source = source;
  tensor.type = read_dtype(entry.at("dtype"));
  tensor.type_text = entry.at("dtype").text();
  tensor.shape = read_shape(entry.at("shape"));
  const std::uint64_t needed = required_bytes(tensor.type, tensor.shape, entry);

  const json_field offsets = entry.at("data_offsets");
  if (offsets.size() != 2) offsets.expected("two offsets");
  constexpr std::int64_t any = std::numeric_limits<std::int64_t>::max();
  const auto begin = static_cast<std::uint64_t>(offsets.at(std::size_t{0}).integer(0, any));
  const auto end = static_cast<std::uint64_t>(offsets.at(std::size_t{1}).integer(0, any));
  const std::string range = std::to_string(begin) + " to " + std::to_string(end);
  if (begin > end) offsets.refuse("the range " + range + " ends before it begins");
  if (end > data.size()) {
    offsets.refuse("the range " + range + " lies past the end of the data (" + std::to_string(data.size()) +
                   " bytes); is the file cut short?");
  }
  if (end - begin != needed && tensor.type != dtype::unknown) {
    entry.refuse("element type " + std::string(name(tensor.type)) + " and shape " + shape_text(tensor.shape) +
                 " need " + std::to_string(needed) + " bytes, but the range " + range + " has " +
                 std::to_string(end - begin));
  }
  tensor.bytes = data.subspan(begin, end - begin);
  return tensor;
}

void refuse_overlaps(const safetensors_file::tensor_map& tensors, std::string_view source) {
  std::vector<const safetensors_file::tensor_map::value_type*> order;
  for (const auto& entry : tensors) {
    if (!entry.second.bytes.empty()) order.push_back(&entry);
  }
  std::sort(order.begin(), order.end(),
            [](const auto* a, const auto* b) { return a->second.bytes.data() < b->second.bytes.data(); });
  for (std::size_t i = 1; i < order.size(); ++i) {
    const auto& before = order[i - 1]->second.bytes;
    if (before.data() + before.size() > order[i]->second.bytes.data()) {
      throw input_error(source, "the tensors " + in_quotes(order[i - 1]->first) + " and " +
                                    in_quotes(order[i]->first) + " overlap");
    }
  }
}

template <class T>
void convert_each(std::span<const std::byte> bytes, std::span<float> out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    T number;
    std::memcpy(&number, bytes.data() + i * sizeof number, sizeof number);
    out[i] = specattn::to_float(number);
  }
}

}  // namespace

std::size_t size_bytes(dtype type) noexcept { return facts(type).size_bytes; }

std::string_view name(dtype type) noexcept { return facts(type).name; }

std::size_t stored_tensor::size() const noexcept {
  if (!decode) return bytes.size() / size_bytes(type);
  std::int64_t count = 1;  // of a shape whose elements a file had room for
  for (const std::int64_t extent : shape) count *= extent;
  return static_cast<std::size_t>(count);
}

std::span<const std::byte> stored_tensor::stored_rows(std::int64_t first, std::int64_t count) const noexcept {
  if (count == 0) return {};
  const std::size_t row_bytes = bytes.size() / static_cast<std::size_t>(rows());
  return bytes.subspan(static_cast<std::size_t>(first) * row_bytes, static_cast<std::size_t>(count) * row_bytes);
}

std::span<const std::byte> stored_tensor::elements(std::int64_t first, std::int64_t count,
                                                   std::vector<std::byte>& decoded) const {
  if (!decode) return stored_rows(first, count);
  const std::size_t row_elements = size() / static_cast<std::size_t>(rows());
  decoded.resize(static_cast<std::size_t>(count) * row_elements * size_bytes(type));
  decode(first, count, decoded);
  return decoded;
}

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

void read_floats(const stored_tensor& tensor, std::span<float> out) {
  if (out.size() != tensor.size()) {
    throw std::invalid_argument("read_floats: " + std::to_string(tensor.size()) + " elements into " +
                                std::to_string(out.size()) + " floats");
  }
  switch (tensor.type) {
    case dtype::f32:
      if (!out.empty()) std::memcpy(out.data(), tensor.bytes.data(), tensor.bytes.size());
      return;
    case dtype::f16:
      return convert_each<specattn::fp16>(tensor.bytes, out);
    case dtype::bf16:
      return convert_each<specattn::bf16>(tensor.bytes, out);
    default:
      throw input_error("a tensor of element type " + std::string(name(tensor.type)) +
                        " cannot be used as weights (F32, F16 and BF16 can)");
  }
}

safetensors_file safetensors_file::parse(std::span<const std::byte> file, std::string_view source) {
  std::uint64_t header_bytes = 0;
  if (file.size() < sizeof header_bytes) {
    throw input_error(source, "too short for a safetensors file (" + std::to_string(file.size()) + " bytes)");
  }
  std::memcpy(&header_bytes, file.data(), sizeof header_bytes);
  const std::span<const std::byte> rest = file.subspan(sizeof header_bytes);
  if (header_bytes > max_header_bytes || header_bytes > rest.size()) {
    throw input_error(source, "header length " + std::to_string(header_bytes) + " is more than the file holds (" +
                                  std::to_string(rest.size()) + " bytes) or than is accepted (" +
                                  std::to_string(max_header_bytes) + ")");
  }
  const std::string_view header_text(reinterpret_cast<const char*>(rest.data()), header_bytes);
  const nlohmann::json header = parse_json(header_text, source);
  const std::span<const std::byte> data = rest.subspan(header_bytes);

  safetensors_file result;
  result.source_ = source;
  const json_field root(header, source);
  for (const auto& [tensor_name, entry] : root.object().get_ref<const nlohmann::json::object_t&>()) {
    if (tensor_name == "__metadata__") continue;
    const json_field field(entry, source, "tensor " + in_quotes(tensor_name));
    result.tensors_.emplace(tensor_name, read_tensor(field, data, source));
  }
  refuse_overlaps(result.tensors_, source);
  return result;
}

safetensors_file safetensors_file::open(const std::filesystem::path& path) {
  auto mapping = std::make_shared<const mapped_file>(path);
  safetensors_file result = parse(mapping->bytes(), path.string());
  result.mapping_ = std::move(mapping);
  return result;
}

safetensors_file safetensors_file::of(tensor_map tensors, std::shared_ptr<const mapped_file> mapping,
                                      std::string_view source) {
  safetensors_file result;
  result.source_ = source;
  result.tensors_ = std::move(tensors);
  result.mapping_ = std::move(mapping);
  return result;
}

const stored_tensor* safetensors_file::find(std::string_view tensor_name) const {
  const auto found = tensors_.find(tensor_name);
  return found == tensors_.end() ? nullptr : &found->second;
}

}  // namespace mini_llm
