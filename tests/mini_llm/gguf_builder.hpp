// GGUF files made in memory, for tests of their readers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "gguf_value.hpp"

/// Collects metadata and tensors; bytes() is the file of version 3.
class gguf_builder {
 public:
  template <class T>
  static std::string raw(T value) {
    std::string bytes(sizeof value, '\0');
    std::memcpy(bytes.data(), &value, sizeof value);
    return bytes;
  }
  static std::string raw_text(std::string_view text) {
    return raw(static_cast<std::uint64_t>(text.size())) + std::string(text);
  }

  /// A value of any type, as its bytes.
  gguf_builder& add_raw(std::string_view key, mini_llm::gguf_type type, const std::string& bytes) {
    values_ += raw_text(key) + raw(static_cast<std::uint32_t>(type)) + bytes;
    ++value_count_;
    return *this;
  }
  gguf_builder& add(std::string_view key, std::uint32_t value) {
    return add_raw(key, mini_llm::gguf_type::u32, raw(value));
  }
  gguf_builder& add(std::string_view key, float value) { return add_raw(key, mini_llm::gguf_type::f32, raw(value)); }
  gguf_builder& add(std::string_view key, bool value) {
    return add_raw(key, mini_llm::gguf_type::boolean, raw(static_cast<std::uint8_t>(value)));
  }
  gguf_builder& add(std::string_view key, const char* value) {
    return add_raw(key, mini_llm::gguf_type::text, raw_text(value));
  }
  gguf_builder& add(std::string_view key, const std::vector<std::string>& texts) {
    std::string bytes =
        raw(static_cast<std::uint32_t>(mini_llm::gguf_type::text)) + raw(static_cast<std::uint64_t>(texts.size()));
    for (const std::string& text : texts) bytes += raw_text(text);
    return add_raw(key, mini_llm::gguf_type::array, bytes);
  }
  gguf_builder& add(std::string_view key, const std::vector<float>& numbers) {
    return add_numbers(key, mini_llm::gguf_type::f32, numbers);
  }
  gguf_builder& add(std::string_view key, const std::vector<std::int32_t>& numbers) {
    return add_numbers(key, mini_llm::gguf_type::i32, numbers);
  }

  /// \param extents innermost first, as the file has them
  gguf_builder& add_tensor(std::string_view name, const std::vector<std::uint64_t>& extents, std::uint32_t type,
                           const std::string& bytes) {
    return describe_tensor(name, extents, type, data_.size()).append(bytes);
  }
  /// The description alone, with any offset.
  gguf_builder& describe_tensor(std::string_view name, const std::vector<std::uint64_t>& extents, std::uint32_t type,
                                std::uint64_t offset) {
    tensors_ += raw_text(name) + raw(static_cast<std::uint32_t>(extents.size()));
    for (const std::uint64_t extent : extents) tensors_ += raw(extent);
    tensors_ += raw(type) + raw(offset);
    ++tensor_count_;
    return *this;
  }
  /// Data of a tensor, and what pads it to 32 bytes.
  gguf_builder& append(const std::string& bytes) {
    data_ += bytes;
    data_.resize((data_.size() + 31) / 32 * 32, '\0');
    return *this;
  }

  std::string bytes() const {
    std::string file = "GGUF" + raw(std::uint32_t{3}) + raw(tensor_count_) + raw(value_count_) + values_ + tensors_;
    if (!data_.empty()) file.resize((file.size() + 31) / 32 * 32, '\0');
    return file + data_;
  }

 private:
  template <class T>
  gguf_builder& add_numbers(std::string_view key, mini_llm::gguf_type type, const std::vector<T>& numbers) {
    std::string bytes = raw(static_cast<std::uint32_t>(type)) + raw(static_cast<std::uint64_t>(numbers.size()));
    for (const T number : numbers) bytes += raw(number);
    return add_raw(key, mini_llm::gguf_type::array, bytes);
  }

  std::string values_;
  std::string tensors_;
  std::string data_;
  std::uint64_t value_count_ = 0;
  std::uint64_t tensor_count_ = 0;
};
