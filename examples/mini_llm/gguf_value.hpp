#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mini_llm {

/// Types of metadata in a GGUF file, by the format's numbers.
enum class gguf_type : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, text, array, u64, i64, f64 };
inline constexpr std::uint32_t gguf_type_count = 13;

/// "uint32", "string", …
std::string_view name(gguf_type type) noexcept;
/// Bytes of one value; 0 for a text or an array, which have a size of their own.
std::size_t size_bytes(gguf_type type) noexcept;

/// One value of a GGUF file's metadata, which knows its file and key, so that every complaint names both. A view: the file
/// must outlive it.
class gguf_value {
 public:
  /// \param bytes what the file has, without the length of a text and without type and length of an array
  gguf_value(std::string_view source, std::string_view key, gguf_type type, std::span<const std::byte> bytes)
      : source_(source), key_(key), type_(type), bytes_(bytes) {}
  /// An array, checked: `count` elements lie in `bytes`, each text with its length in front.
  gguf_value(std::string_view source, std::string_view key, gguf_type element_type, std::size_t count,
             std::span<const std::byte> bytes)
      : source_(source), key_(key), element_type_(element_type), count_(count), bytes_(bytes) {}

  /// \throws input_error when not an integer of any width in [low, high]
  std::int64_t integer(std::int64_t low, std::int64_t high) const;
  /// A float32 is taken for the shortest decimal number that rounds to it, as a JSON file would hold it.
  /// \throws input_error when not a number in [low, high]
  double number(double low, double high) const;
  /// \throws input_error when not true or false
  bool boolean() const;
  /// \throws input_error when not a string
  std::string_view text() const;

  gguf_type type() const noexcept { return type_; }
  bool is_array() const noexcept { return type_ == gguf_type::array; }
  bool is_text() const noexcept { return type_ == gguf_type::text; }
  /// Elements of an array; 0 for other values.
  std::size_t size() const noexcept { return count_; }
  /// \throws input_error when not an array of strings
  std::vector<std::string_view> texts() const;
  /// \throws input_error when not an array of float32
  std::vector<float> floats() const;
  /// \throws input_error when not an array of int32 or uint32
  std::vector<std::int32_t> integers() const;

  std::string_view key() const noexcept { return key_; }
  /// The value, short and fit for a message; of an array its type and size.
  std::string shown() const;
  /// Refuses this value. \throws input_error always: "<file>: <key>: <problem>"
  [[noreturn]] void refuse(const std::string& problem) const;
  /// "<what> expected, got <this value>". \throws input_error always
  [[noreturn]] void expected(const std::string& what) const;

 private:
  /// Nothing for other types than integers, and for one past 63 bits.
  std::optional<std::int64_t> any_integer() const;
  /// Nothing for other types than floats and integers.
  std::optional<double> any_number() const;

  std::string_view source_;
  std::string_view key_;
  gguf_type type_ = gguf_type::array;
  gguf_type element_type_ = gguf_type::u8;  // of an array
  std::size_t count_ = 0;                   // of an array
  std::span<const std::byte> bytes_;
};

}  // namespace mini_llm
