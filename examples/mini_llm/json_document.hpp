#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace mini_llm {

/// Deepest nesting of arrays and objects that any file read here may have.
inline constexpr int max_json_depth = 64;

/// Memory that a document may take, in bytes, by a count that is not below what it takes by much. A text of two
/// bytes per value takes thirty times its length; the largest tokenizers in use (35 MB) need about 150 MB.
inline constexpr std::size_t max_json_memory = std::size_t{384} << 20;

/// Parses a whole JSON text. Stricter than the JSON library: an object that gives a name twice is
/// refused (which of the two was meant?), and so is nesting deeper than max_json_depth and a document
/// of more than max_json_memory.
/// \param source file name for messages
/// \throws input_error naming the source and the byte where the fault is
nlohmann::json parse_json(std::string_view text, std::string_view source, std::size_t max_memory = max_json_memory);

/// A JSON value that knows which file and field it came from, so that every complaint names both.
/// Does not own the document: keep the nlohmann::json alive. A JSON null counts as absent.
class json_field {
 public:
  /// \param path name of the value inside the file; empty for the document itself
  json_field(const nlohmann::json& value, std::string_view source, std::string path = {})
      : value_(&value), source_(source), path_(std::move(path)) {}

  /// The member `name`. \throws input_error when absent, or when this is not an object
  json_field at(std::string_view name) const;
  /// The member `name`, or nothing. \throws input_error when this is not an object
  std::optional<json_field> find(std::string_view name) const;
  /// The element `index` of an array. \throws input_error when out of range or not an array
  json_field at(std::size_t index) const;
  /// Number of elements. \throws input_error when this is not an array
  std::size_t size() const;

  /// \throws input_error when not an integer in [low, high]
  std::int64_t integer(std::int64_t low, std::int64_t high) const;
  /// \throws input_error when not a number in [low, high]
  double number(double low, double high) const;
  /// \throws input_error when not true or false
  bool boolean() const;
  /// \throws input_error when not a string
  const std::string& text() const;
  /// \throws input_error when not an object / not an array
  const nlohmann::json& object() const;
  const nlohmann::json& array() const;

  bool is_array() const { return value_->is_array(); }
  bool is_object() const { return value_->is_object(); }
  bool is_string() const { return value_->is_string(); }
  const std::string& path() const { return path_; }

  /// Refuses this value. \throws input_error always: "<source>: <path>: <problem>"
  [[noreturn]] void refuse(const std::string& problem) const;
  /// "<expected> expected, got <this value, shortened>". \throws input_error always
  [[noreturn]] void expected(const std::string& what) const;

 private:
  const nlohmann::json* value_;
  std::string_view source_;
  std::string path_;
};

/// Text from a file, cut to a length fit for a message and free of control characters.
std::string in_quotes(std::string_view text);

}  // namespace mini_llm
