#include "gguf_file.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <fstream>
#include <limits>
#include <system_error>
#include <utility>

#include "input_error.hpp"
#include "json_document.hpp"

namespace mini_llm {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF data are little-endian and are used in place");

constexpr std::string_view magic = "GGUF";
constexpr std::size_t max_entries = std::size_t{1}
                                    << 16;    // keys, and tensors; the largest models have some thousands
constexpr std::size_t max_key_bytes = 65535;  // the format's own bounds
constexpr std::size_t max_name_bytes = 64;
constexpr std::size_t any_size = std::numeric_limits<std::size_t>::max();
constexpr std::uint32_t max_rank = 4;
constexpr std::size_t default_alignment = 32;
constexpr std::size_t max_alignment = std::size_t{1} << 16;

constexpr std::array<gguf_tensor_type, 11> read_types{{{0, "F32", 1, 4},
                                                       {1, "F16", 1, 2},
                                                       {2, "Q4_0", 32, 18},
                                                       {3, "Q4_1", 32, 20},
                                                       {6, "Q5_0", 32, 22},
                                                       {7, "Q5_1", 32, 24},
                                                       {8, "Q8_0", 32, 34},
                                                       {12, "Q4_K", 256, 144},
                                                       {13, "Q5_K", 256, 176},
                                                       {14, "Q6_K", 256, 210},
                                                       {30, "BF16", 1, 2}}};

/// Names of the other types, so that a message can say what a file holds.
constexpr std::pair<std::uint32_t, std::string_view> unread_types[] = {
    {4, "Q4_2"},      {5, "Q4_3"},      {9, "Q8_1"},   {10, "Q2_K"},   {11, "Q3_K"},  {15, "Q8_K"},  {16, "IQ2_XXS"},
    {17, "IQ2_XS"},   {18, "IQ3_XXS"},  {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"}, {22, "IQ2_S"}, {23, "IQ4_XS"},
    {24, "I8"},       {25, "I16"},      {26, "I32"},   {27, "I64"},    {28, "F64"},   {29, "IQ1_M"}, {31, "Q4_0_4_4"},
    {32, "Q4_0_4_8"}, {33, "Q4_0_8_8"}, {34, "TQ1_0"}, {35, "TQ2_0"},  {39, "MXFP4"}, {40, "NVFP4"}};

template <class T>
T read_as(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::string type_text(std::uint32_t id) {
  for (const auto& [unread, name] : unread_types) {
    if (unread == id) return std::string(name);
  }
  return "number " + std::to_string(id);
}

}  // namespace

/// Goes through the bytes of a file, from its beginning to the tensors' data.
class gguf_reader {
 public:
  gguf_reader(std::span<const std::byte> file, std::string_view source) : file_(file), source_(source) {}

  void read_head();
  gguf_file::value_map read_values();
  gguf_file::tensor_map read_tensors(const gguf_file::value_map& values);

 private:
  struct placed_tensor {
    std::string_view name;
    std::uint64_t offset;
    std::size_t size_bytes;
  };

  [[noreturn]] void refuse(const std::string& problem) const { throw input_error(source_, problem); }
  /// The next `size` bytes; `what` says in a message what they are.
  std::span<const std::byte> take(std::uint64_t size, const std::string& what) {
    if (size > file_.size() - at_) {
      refuse(what + ": " + std::to_string(size) + " bytes are needed at byte " + std::to_string(at_) + ", " +
             std::to_string(file_.size() - at_) + " are left; is the file cut short?");
    }
    const auto part = file_.subspan(at_, static_cast<std::size_t>(size));
    at_ += part.size();
    return part;
  }
  template <class T>
  T number(const std::string& what) {
    return read_as<T>(take(sizeof(T), what).data());
  }
  std::string_view text(std::size_t max_bytes, const std::string& what);
  std::size_t count(std::uint64_t given, std::size_t least_bytes, const std::string& what);
  gguf_type read_type(const std::string& what);
  gguf_value read_value(std::string_view key);
  gguf_value read_array(std::string_view key);
  gguf_tensor read_tensor(std::string_view name, std::uint64_t& offset);
  std::size_t bytes_of(const gguf_tensor& tensor, const std::string& what) const;
  void place_data(gguf_file::tensor_map& tensors, std::vector<placed_tensor> order, std::size_t alignment);

  std::span<const std::byte> file_;
  std::string_view source_;
  std::size_t at_ = 0;
  std::uint64_t tensor_count_ = 0;
  std::uint64_t value_count_ = 0;
};

void gguf_reader::read_head() {
  const std::string_view start = as_text(file_.first(std::min(file_.size(), magic.size())));
  if (start != magic) refuse("is not a GGUF file: it begins with " + in_quotes(start) + ", not \"GGUF\"");
  at_ = magic.size();
  const auto version = number<std::uint32_t>("version");
  if (version != 0 && (version & 0xffffU) == 0) refuse("a big-endian GGUF file; little-endian ones are read");
  if (version != 2 && version != 3) {
    refuse("version " + std::to_string(version) + " of GGUF is not supported (2 and 3 are)");
  }
  tensor_count_ = number<std::uint64_t>("tensor_count");
  value_count_ = number<std::uint64_t>("metadata_kv_count");
  count(tensor_count_, 24,
        "tensor_count");  // the least that a description takes: lengths, one dimension, type, offset
  count(value_count_, 13, "metadata_kv_count");
}

/// A count from the file, once that many things can lie in what is left of it.
std::size_t gguf_reader::count(std::uint64_t given, std::size_t least_bytes, const std::string& what) {
  const std::size_t left = file_.size() - at_;
  if (given > left / least_bytes) {
    refuse(what + ": " + std::to_string(given) + " of at least " + std::to_string(least_bytes) +
           " bytes each cannot lie in the " + std::to_string(left) + " bytes that are left; is the file cut short?");
  }
  return static_cast<std::size_t>(given);
}

std::string_view gguf_reader::text(std::size_t max_bytes, const std::string& what) {
  const auto size = number<std::uint64_t>("the length of " + what);
  if (size > max_bytes) {
    refuse(what + " has " + std::to_string(size) + " bytes (at most " + std::to_string(max_bytes) + " are accepted)");
  }
  return as_text(take(size, what));
}

gguf_file::value_map gguf_reader::read_values() {
  if (value_count_ > max_entries) {
    refuse("metadata_kv_count: " + std::to_string(value_count_) + " (at most " + std::to_string(max_entries) +
           " are accepted)");
  }
  gguf_file::value_map values;
  for (std::uint64_t i = 0; i < value_count_; ++i) {
    const std::string_view key = text(max_key_bytes, "the key of metadata " + std::to_string(i));
    if (!values.emplace(key, read_value(key)).second)
      refuse("the metadata key " + in_quotes(key) + " is there twice");
  }
  return values;
}

gguf_type gguf_reader::read_type(const std::string& what) {
  const auto type = number<std::uint32_t>(what);
  if (type >= gguf_type_count) {
    refuse(what + " is number " + std::to_string(type) + ", which is none of the format's");
  }
  return static_cast<gguf_type>(type);
}

gguf_value gguf_reader::read_value(std::string_view key) {
  const gguf_type type = read_type("the type of " + in_quotes(key));
  if (type == gguf_type::array) return read_array(key);
  const std::string what = "the value of " + in_quotes(key);
  if (type != gguf_type::text) return {source_, key, type, take(size_bytes(type), what)};
  return {source_, key, type, std::as_bytes(std::span(text(any_size, what)))};
}

gguf_value gguf_reader::read_array(std::string_view key) {
  const std::string what = "the array " + in_quotes(key);
  const gguf_type type = read_type("the element type of " + what);
  if (type == gguf_type::array) refuse(what + " is one of arrays, which is not read");
  const auto given = number<std::uint64_t>("the length of " + what);
  if (type != gguf_type::text) {
    const std::size_t elements = count(given, size_bytes(type), what);
    return {source_, key, type, elements, take(elements * size_bytes(type), what)};
  }
  const std::size_t elements = count(given, sizeof(std::uint64_t), what);
  const std::size_t begin = at_;
  for (std::size_t i = 0; i < elements; ++i) {
    // No text for a message is made before there is need: there may be a million elements.
    const std::size_t left = file_.size() - at_;
    std::uint64_t size = left;
    if (left >= sizeof size) size = read_as<std::uint64_t>(file_.data() + at_);
    if (left < sizeof size || size > left - sizeof size) {
      text(any_size, "element " + std::to_string(i) + " of " + what);  // says what is missing
    }
    at_ += sizeof size + static_cast<std::size_t>(size);
  }
  return {source_, key, type, elements, file_.subspan(begin, at_ - begin)};
}

gguf_file::tensor_map gguf_reader::read_tensors(const gguf_file::value_map& values) {
  if (tensor_count_ > max_entries) {
    refuse("tensor_count: " + std::to_string(tensor_count_) + " (at most " + std::to_string(max_entries) +
           " are accepted)");
  }
  std::size_t alignment = default_alignment;
  if (const auto found = values.find("general.alignment"); found != values.end()) {
    alignment = static_cast<std::size_t>(found->second.integer(1, max_alignment));
    if (!std::has_single_bit(alignment)) found->second.expected("a power of two");
  }
  gguf_file::tensor_map tensors;
  std::vector<placed_tensor> order;
  for (std::uint64_t i = 0; i < tensor_count_; ++i) {
    const std::string_view name = text(max_name_bytes, "the name of tensor " + std::to_string(i));
    std::uint64_t offset = 0;
    gguf_tensor tensor = read_tensor(name, offset);
    order.push_back({name, offset, bytes_of(tensor, "tensor " + in_quotes(name))});
    if (offset % alignment != 0) {
      refuse("tensor " + in_quotes(name) + ": offset " + std::to_string(offset) +
             " is not a multiple of the alignment " + std::to_string(alignment));
    }
    if (!tensors.emplace(name, std::move(tensor)).second) refuse("the tensor " + in_quotes(name) + " is there twice");
  }
  place_data(tensors, std::move(order), alignment);
  return tensors;
}

gguf_tensor gguf_reader::read_tensor(std::string_view name, std::uint64_t& offset) {
  const std::string what = "tensor " + in_quotes(name);
  gguf_tensor tensor;
  const auto rank = number<std::uint32_t>("the rank of " + what);
  if (rank == 0 || rank > max_rank) {
    refuse(what + " has " + std::to_string(rank) + " dimensions (1 to " + std::to_string(max_rank) +
           " are accepted)");
  }
  for (std::uint32_t i = 0; i < rank; ++i) {
    const auto extent = number<std::uint64_t>("dimension " + std::to_string(i) + " of " + what);
    if (extent == 0 || extent > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      refuse(what + ": dimension " + std::to_string(i) + " is " + std::to_string(extent));
    }
    tensor.shape.insert(tensor.shape.begin(), static_cast<std::int64_t>(extent));
  }
  const auto id = number<std::uint32_t>("the type of " + what);
  const auto type = std::find_if(read_types.begin(), read_types.end(), [&](const auto& t) { return t.id == id; });
  if (type == read_types.end()) {
    std::string names;
    for (const gguf_tensor_type& known : read_types) names += (names.empty() ? "" : ", ") + std::string(known.name);
    refuse(what + " is of type " + type_text(id) + ", which is not supported (" + names + " are)");
  }
  tensor.type = &*type;
  offset = number<std::uint64_t>("the offset of " + what);
  return tensor;
}

/// Bytes of a tensor's data; more than the file has are not counted exactly.
std::size_t gguf_reader::bytes_of(const gguf_tensor& tensor, const std::string& what) const {
  const auto row = static_cast<std::uint64_t>(tensor.shape.back());
  if (row % tensor.type->block_elements != 0) {
    refuse(what + ": a row of " + std::to_string(row) + " elements is no multiple of the " +
           std::to_string(tensor.type->block_elements) + " that a block of type " + std::string(tensor.type->name) +
           " holds");
  }
  std::uint64_t blocks = row / tensor.type->block_elements;
  const std::uint64_t most = file_.size() / tensor.type->block_bytes;
  for (std::size_t i = 0; i + 1 < tensor.shape.size() && blocks <= most; ++i) {
    const auto extent = static_cast<std::uint64_t>(tensor.shape[i]);
    blocks = extent > most / blocks ? most + 1 : blocks * extent;
  }
  if (blocks > most) {
    std::string shape;
    for (const std::int64_t extent : tensor.shape) shape += (shape.empty() ? "" : ", ") + std::to_string(extent);
    refuse(what + " of type " + std::string(tensor.type->name) + " and shape [" + shape + "] takes more than the " +
           std::to_string(file_.size()) + " bytes of the file; is it cut short?");
  }
  return static_cast<std::size_t>(blocks) * tensor.type->block_bytes;
}

void gguf_reader::place_data(gguf_file::tensor_map& tensors, std::vector<placed_tensor> order,
                             std::size_t alignment) {
  // Without tensors there need be no padding in front of their data.
  const std::size_t padding = (alignment - at_ % alignment) % alignment;
  const auto data = file_.subspan(std::min(at_ + padding, file_.size()));
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
  std::uint64_t end = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    const placed_tensor& t = order[i];
    if (t.offset > data.size() || t.size_bytes > data.size() - t.offset) {
      refuse("tensor " + in_quotes(t.name) + ": " + std::to_string(t.size_bytes) + " bytes at offset " +
             std::to_string(t.offset) + " lie past the end of the data (" + std::to_string(data.size()) +
             " bytes); is the file cut short?");
    }
    if (t.offset < end) {
      refuse("the tensors " + in_quotes(order[i - 1].name) + " and " + in_quotes(t.name) + " overlap");
    }
    end = t.offset + t.size_bytes;
    tensors.find(t.name)->second.bytes = data.subspan(static_cast<std::size_t>(t.offset), t.size_bytes);
  }
}

std::span<const gguf_tensor_type> gguf_tensor_types() noexcept { return read_types; }

gguf_file gguf_file::parse(std::span<const std::byte> file, std::string_view source) {
  gguf_file result;
  result.source_ = std::make_shared<const std::string>(source);
  gguf_reader reader(file, *result.source_);
  reader.read_head();
  result.values_ = reader.read_values();
  result.tensors_ = reader.read_tensors(result.values_);
  return result;
}

gguf_file gguf_file::open(const std::filesystem::path& path) {
  auto mapping = std::make_shared<const mapped_file>(path);
  gguf_file result = parse(mapping->bytes(), path.string());
  result.mapping_ = std::move(mapping);
  return result;
}

std::optional<gguf_value> gguf_file::find(std::string_view key) const {
  const auto found = values_.find(key);
  if (found == values_.end()) return std::nullopt;
  return found->second;
}

gguf_value gguf_file::at(std::string_view key) const {
  const auto found = values_.find(key);
  if (found == values_.end()) throw input_error(source(), "the metadata key " + in_quotes(key) + " is missing");
  return found->second;
}

bool is_gguf_file(const std::filesystem::path& path) {
  std::error_code ignored;  // what cannot be seen is reported by whoever opens it
  if (!std::filesystem::is_regular_file(path, ignored)) return false;
  if (path.extension() == ".gguf") return true;
  std::array<char, 4> start{};
  std::ifstream(path, std::ios::binary).read(start.data(), start.size());
  return std::string_view(start.data(), start.size()) == magic;
}

}  // namespace mini_llm
