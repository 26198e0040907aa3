#include "gguf_value.hpp"

#include <array>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "input_error.hpp"
#include "json_document.hpp"

namespace mini_llm {
namespace {

struct type_facts {
  std::string_view name;
  std::size_t size_bytes;
};

constexpr std::array<type_facts, gguf_type_count> known_types{{{"uint8", 1},
                                                               {"int8", 1},
                                                               {"uint16", 2},
                                                               {"int16", 2},
                                                               {"uint32", 4},
                                                               {"int32", 4},
                                                               {"float32", 4},
                                                               {"bool", 1},
                                                               {"string", 0},
                                                               {"array", 0},
                                                               {"uint64", 8},
                                                               {"int64", 8},
                                                               {"float64", 8}}};

const type_facts& facts(gguf_type type) { return known_types[static_cast<std::size_t>(type)]; }

template <class T>
T read_as(std::span<const std::byte> bytes) {
  T value;
  std::memcpy(&value, bytes.data(), sizeof value);
  return value;
}

template <class T>
std::vector<T> copy_as(std::size_t count, std::span<const std::byte> bytes) {
  std::vector<T> values(count);
  if (count > 0) std::memcpy(values.data(), bytes.data(), count * sizeof(T));
  return values;
}

/// 1e-5 and not 9.99999974738e-06: what the float was before it was rounded, as far as that can be told.
double decimal(float value) {
  std::array<char, 64> text{};  // one byte stays zero for strtod
  const auto end = std::to_chars(text.data(), text.data() + text.size() - 1, value);
  return end.ec == std::errc() ? std::strtod(text.data(), nullptr) : static_cast<double>(value);
}

std::string shortest(double value) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "%.9g", value);
  return text.data();
}

}  // namespace

std::string_view name(gguf_type type) noexcept { return facts(type).name; }

std::size_t size_bytes(gguf_type type) noexcept { return facts(type).size_bytes; }

std::optional<std::int64_t> gguf_value::any_integer() const {
  switch (type_) {
    case gguf_type::u8:
      return read_as<std::uint8_t>(bytes_);
    case gguf_type::i8:
      return read_as<std::int8_t>(bytes_);
    case gguf_type::u16:
      return read_as<std::uint16_t>(bytes_);
    case gguf_type::i16:
      return read_as<std::int16_t>(bytes_);
    case gguf_type::u32:
      return read_as<std::uint32_t>(bytes_);
    case gguf_type::i32:
      return read_as<std::int32_t>(bytes_);
    case gguf_type::i64:
      return read_as<std::int64_t>(bytes_);
    case gguf_type::u64:
      if (read_as<std::uint64_t>(bytes_) >> 63 != 0) return std::nullopt;
      return read_as<std::int64_t>(bytes_);
    default:
      return std::nullopt;
  }
}

std::optional<double> gguf_value::any_number() const {
  if (type_ == gguf_type::f32) return decimal(read_as<float>(bytes_));
  if (type_ == gguf_type::f64) return read_as<double>(bytes_);
  if (const auto value = any_integer()) return static_cast<double>(*value);
  return std::nullopt;
}

std::int64_t gguf_value::integer(std::int64_t low, std::int64_t high) const {
  const auto value = any_integer();
  if (!value || *value < low || *value > high) {
    expected("an integer from " + std::to_string(low) + " to " + std::to_string(high));
  }
  return *value;
}

double gguf_value::number(double low, double high) const {
  const auto value = any_number();
  if (!value || !(*value >= low && *value <= high)) {
    expected("a number from " + shortest(low) + " to " + shortest(high));
  }
  return *value;
}

bool gguf_value::boolean() const {
  if (type_ != gguf_type::boolean || read_as<std::uint8_t>(bytes_) > 1) expected("true or false");
  return read_as<std::uint8_t>(bytes_) == 1;
}

std::string_view gguf_value::text() const {
  if (!is_text()) expected("a string");
  return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()};
}

std::vector<std::string_view> gguf_value::texts() const {
  if (!is_array() || element_type_ != gguf_type::text) expected("an array of strings");
  std::vector<std::string_view> texts;
  texts.reserve(count_);
  std::size_t at = 0;
  for (std::size_t i = 0; i < count_; ++i) {
    const auto size = static_cast<std::size_t>(read_as<std::uint64_t>(bytes_.subspan(at)));
    at += sizeof(std::uint64_t);
    texts.emplace_back(reinterpret_cast<const char*>(bytes_.data()) + at, size);
    at += size;
  }
  return texts;
}

std::vector<float> gguf_value::floats() const {
  if (!is_array() || element_type_ != gguf_type::f32) expected("an array of float32");
  return copy_as<float>(count_, bytes_);
}

std::vector<std::int32_t> gguf_value::integers() const {
  const bool fits = element_type_ == gguf_type::i32 || element_type_ == gguf_type::u32;
  if (!is_array() || !fits) expected("an array of int32");
  return copy_as<std::int32_t>(count_, bytes_);
}

std::string gguf_value::shown() const {
  if (is_text()) return in_quotes(text());
  if (is_array()) {
    return "an array of " + std::to_string(count_) + " of type " + std::string(mini_llm::name(element_type_));
  }
  const std::string type = " (" + std::string(mini_llm::name(type_)) + ")";
  if (type_ == gguf_type::boolean) {
    const auto bits = read_as<std::uint8_t>(bytes_);
    return (bits > 1 ? std::to_string(bits) : bits == 1 ? "true" : "false") + type;
  }
  if (const auto value = any_integer()) return std::to_string(*value) + type;
  if (type_ == gguf_type::u64) return std::to_string(read_as<std::uint64_t>(bytes_)) + type;
  return shortest(any_number().value_or(0.0)) + type;
}

void gguf_value::refuse(const std::string& problem) const {
  const std::string key = in_quotes(key_);
  throw input_error(source_, key.substr(1, key.size() - 2) + ": " + problem);
}

void gguf_value::expected(const std::string& what) const { refuse(what + " expected, got " + shown()); }

}  // namespace mini_llm
