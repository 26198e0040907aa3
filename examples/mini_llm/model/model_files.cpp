#include "model_files.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <system_error>
#include <utility>

#include "gguf_model.hpp"
#include "input_error.hpp"
#include "json_document.hpp"

namespace mini_llm {
namespace {

constexpr std::size_t max_index_bytes = 64U << 20;
constexpr std::string_view whole_name = "model.safetensors";
constexpr std::string_view index_name = "model.safetensors.index.json";
constexpr std::string_view adapter_name = "adapter_model.safetensors";
constexpr std::string_view weights_suffix = ".safetensors";

bool is_plain_shard_name(std::string_view shard) {
  const bool has_separator = shard.find_first_of(std::string_view("/\\\0", 3)) != shard.npos;
  return !has_separator && shard.size() > weights_suffix.size() && shard.ends_with(weights_suffix);
}

/// First element whose exponent bits are all ones.
template <class Bits>
std::optional<std::size_t> first_with_full_exponent(std::span<const std::byte> bytes, Bits exponent_mask) {
  const std::size_t count = bytes.size() / sizeof(Bits);
  constexpr std::size_t block = 4096;
  for (std::size_t start = 0; start < count; start += block) {
    const std::size_t end = std::min(count, start + block);
    // Without an early exit inside the block the compiler can vectorise it.
    unsigned found = 0;
    for (std::size_t i = start; i < end; ++i) {
      Bits bits;
      std::memcpy(&bits, bytes.data() + i * sizeof bits, sizeof bits);
      found |= static_cast<unsigned>((bits & exponent_mask) == exponent_mask);
    }
    for (std::size_t i = start; found != 0 && i < end; ++i) {
      Bits bits;
      std::memcpy(&bits, bytes.data() + i * sizeof bits, sizeof bits);
      if ((bits & exponent_mask) == exponent_mask) return i;
    }
  }
  return std::nullopt;
}

bool is_there(const std::filesystem::path& path) {
  std::error_code ignored;  // an unreadable directory is reported by the open that follows
  return std::filesystem::exists(path, ignored);
}

/// What a name like model-00002-of-00004.safetensors says; zeros: it is no such name.
struct shard_number {
  unsigned number = 0, of = 0;
};
shard_number number_of(const std::string& file) {
  shard_number read;
  int length = 0;
  const bool fits = std::sscanf(file.c_str(), "model-%5u-of-%5u.safetensors%n", &read.number, &read.of, &length) == 2;
  return fits && static_cast<std::size_t>(length) == file.size() ? read : shard_number{};
}

[[noreturn]] void refuse_without_weights(const std::filesystem::path& directory,
                                         const std::vector<std::string>& there) {
  std::string problem =
      "no weights: neither " + std::string(whole_name) + " nor " + std::string(index_name) + " is there";
  for (const std::string& file : there) {
    const std::string kind = std::filesystem::path(file).extension().string();
    if (kind == ".gguf" || kind == ".bin" || kind == ".pth" || kind == ".pt" || kind == weights_suffix) {
      problem += "; " + file +
                 (kind == weights_suffix ? " is no name that is looked for"
                  : kind == ".gguf"      ? " is a model by itself: give that file's path"
                                         : " is of a format that is not read (safetensors and GGUF are)");
      break;
    }
  }
  throw input_error(directory.string(), problem);
}

/// The shards of a directory that lacks their index, as some tools leave it: model-00001-of-00002.safetensors, …
/// \throws input_error when one of them is missing, or all
std::vector<std::string> shards_without_index(const std::filesystem::path& directory) {
  std::vector<std::string> files;
  std::error_code ignored;  // an unreadable directory holds no weights
  for (const auto& entry : std::filesystem::directory_iterator(directory, ignored)) {
    files.push_back(entry.path().filename().string());
  }
  std::sort(files.begin(), files.end());
  std::vector<std::string> shards;
  unsigned of = 0;
  for (const std::string& file : files) {
    const shard_number read = number_of(file);
    if (read.number == 0) continue;
    if (of == 0) of = read.of;
    if (read.of != of || read.number != shards.size() + 1) {
      throw input_error((directory / file).string(),
                        "does not follow shard " + std::to_string(shards.size()) + " of " + std::to_string(of) +
                            "; " + std::string(index_name) + " is not there to say which shards belong together");
    }
    shards.push_back(file);
  }
  if (shards.empty()) refuse_without_weights(directory, files);
  if (shards.size() != of) {
    throw input_error(directory.string(), std::to_string(shards.size()) + " of " + std::to_string(of) +
                                              " shards are there, the last is " + shards.back());
  }
  return shards;
}

}  // namespace

shard_index parse_shard_index(std::string_view text, std::string_view source) {
  const nlohmann::json document = parse_json(text, source);
  const json_field map = json_field(document, source).at("weight_map");
  shard_index index;
  for (const auto& [tensor_name, shard] : map.object().get_ref<const nlohmann::json::object_t&>()) {
    const json_field field(shard, source, "weight_map." + in_quotes(tensor_name));
    if (!is_plain_shard_name(field.text())) {
      field.refuse("the shard " + in_quotes(field.text()) +
                   " is not the plain name of a .safetensors file in the model's directory");
    }
    index.emplace(tensor_name, field.text());
  }
  if (index.empty()) map.refuse("no tensors are named");
  return index;
}

std::optional<std::size_t> first_non_finite(const stored_tensor& tensor) {
  switch (tensor.type) {
    case dtype::f32:
      return first_with_full_exponent<std::uint32_t>(tensor.bytes, 0x7f800000U);
    case dtype::f16:
      return first_with_full_exponent<std::uint16_t>(tensor.bytes, 0x7c00U);
    case dtype::bf16:
      return first_with_full_exponent<std::uint16_t>(tensor.bytes, 0x7f80U);
    default:
      return std::nullopt;
  }
}

model_files model_files::open(const std::filesystem::path& directory) {
  model_files files;
  files.directory_ = directory;
  if (is_there(directory / adapter_name)) {
    throw input_error((directory / adapter_name).string(),
                      "an adapter beside the weights is not read; merge it into them first");
  }
  if (is_there(directory / whole_name)) {
    files.shards_.push_back(safetensors_file::open(directory / whole_name));
  } else if (is_there(directory / index_name)) {
    files.open_indexed();
  } else {
    for (const std::string& shard : shards_without_index(directory)) {
      files.shards_.push_back(safetensors_file::open(directory / shard));
    }
  }
  files.gather_tensors();
  return files;
}

model_files model_files::of(const gguf_file& file, const model_config& config) {
  model_files files;
  files.directory_ = file.source();
  files.shards_.push_back(safetensors_file::of(gguf_weights(file, config), file.mapping(), file.source()));
  files.gather_tensors();
  return files;
}

void model_files::open_indexed() {
  const std::filesystem::path index_path = directory_ / index_name;
  const mapped_file index_file(index_path, max_index_bytes);
  std::map<std::string, std::size_t> opened;
  for (const auto& [tensor_name, shard] : parse_shard_index(index_file.text(), index_path.string())) {
    const auto [place, fresh] = opened.emplace(shard, shards_.size());
    if (fresh) shards_.push_back(safetensors_file::open(directory_ / shard));
    if (shards_[place->second].find(tensor_name) == nullptr) {
      throw input_error(index_path.string(), "tensor " + in_quotes(tensor_name) + " is said to be in " +
                                                 in_quotes(shard) + ", which does not hold it");
    }
  }
}

/// All that the files hold, named in the index or not: what nobody asks for must not go unseen.
void model_files::gather_tensors() {
  for (std::size_t shard = 0; shard < shards_.size(); ++shard) {
    for (const auto& [tensor_name, tensor] : shards_[shard].tensors()) {
      const auto [other, fresh] = shard_of_.emplace(tensor_name, shard);
      if (!fresh) {
        throw input_error(shards_[shard].source(), "tensor " + in_quotes(tensor_name) + " is in " +
                                                       shards_[other->second].source() + " too; which is meant?");
      }
      total_bytes_ += tensor.bytes.size();
    }
  }
}

const stored_tensor* model_files::find(std::string_view tensor_name) const {
  const auto found = shard_of_.find(tensor_name);
  return found == shard_of_.end() ? nullptr : shards_[found->second].find(tensor_name);
}

const stored_tensor& model_files::weight(std::string_view tensor_name, std::span<const std::int64_t> shape) const {
  const auto found = shard_of_.find(tensor_name);
  if (found == shard_of_.end()) {
    throw input_error(directory_.string(), "the weights lack the tensor " + in_quotes(tensor_name) + " of shape " +
                                               shape_text(shape) + " that config.json calls for");
  }
  const safetensors_file& shard = shards_[found->second];
  const stored_tensor& tensor = *shard.find(tensor_name);
  if (!std::ranges::equal(tensor.shape, shape)) {
    throw input_error(shard.source(), "tensor " + in_quotes(tensor_name) + " has shape " + shape_text(tensor.shape) +
                                          "; config.json calls for " + shape_text(shape));
  }
  if (tensor.type != dtype::f32 && tensor.type != dtype::f16 && tensor.type != dtype::bf16) {
    throw input_error(shard.source(), "tensor " + in_quotes(tensor_name) + " is of type " +
                                          in_quotes(tensor.type_text) +
                                          "; weights of type F32, F16 or BF16 are supported");
  }
  return tensor;
}

std::vector<std::string> model_files::names() const {
  std::vector<std::string> result;
  result.reserve(shard_of_.size());
  for (const auto& entry : shard_of_) result.push_back(entry.first);
  return result;
}

void model_files::check_finite() const {
  std::vector<std::byte> decoded;
  for (const auto& [tensor_name, shard] : shard_of_) {
    const stored_tensor& tensor = *shards_[shard].find(tensor_name);
    if (const auto element = first_non_finite({tensor.type, {}, tensor.elements(0, tensor.rows(), decoded)})) {
      throw input_error(shards_[shard].source(), "tensor " + in_quotes(tensor_name) + ": element " +
                                                     std::to_string(*element) + " of " +
                                                     std::to_string(tensor.size()) + " is NaN or infinite");
    }
  }
}

}  // namespace mini_llm
