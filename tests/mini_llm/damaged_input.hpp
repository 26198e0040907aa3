#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <span>
#include <string>
#include <string_view>

#include "input_error.hpp"

// Damaged copies of a good file, for tests that a reader refuses or accepts but never fails otherwise.

inline std::string read_all(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE_MESSAGE(file.good(), path.string());
  return {std::istreambuf_iterator<char>(file), {}};
}

inline std::filesystem::path source_path(const std::string& relative) {
  return std::filesystem::path(SPECATTN_SOURCE_DIR) / relative;
}

inline std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span<const char>(text.data(), text.size()));
}

/// The message of the input_error that `action` throws; a test failure when it throws none.
template <class Action>
std::string refusal(Action action) {
  try {
    action();
  } catch (const mini_llm::input_error& error) {
    return error.what();
  }
  FAIL("accepted");
  return {};
}

/// A directory that is empty at first and gone at the end.
class scratch_directory {
 public:
  scratch_directory() {
    std::random_device seed;
    path_ =
        std::filesystem::temp_directory_path() / ("specattn-test-" + std::to_string(seed()) + std::to_string(seed()));
    std::filesystem::create_directory(path_);
  }
  scratch_directory(const scratch_directory&) = delete;
  scratch_directory& operator=(const scratch_directory&) = delete;
  ~scratch_directory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::filesystem::path& path() const { return path_; }
  void write(const std::string& name, std::string_view content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
  }

 private:
  std::filesystem::path path_;
};

struct damage_count {
  int accepted = 0;
  int refused = 0;
};

/// Runs `read`; input_error is the only exception it may leave with, and must say something.
template <class Read>
void read_damaged(std::string_view text, Read read, damage_count& count) {
  try {
    read(text);
    ++count.accepted;
  } catch (const mini_llm::input_error& error) {
    CHECK(std::string_view(error.what()).size() > 10);
    ++count.refused;
  }
}

/// Every proper prefix of `text` (or every `step`-th, for a large file).
template <class Read>
damage_count read_truncations(std::string_view text, Read read, std::size_t step = 1) {
  damage_count count;
  for (std::size_t size = 0; size < text.size(); size += step) {
    const std::string cut(text.substr(0, size));  // its own allocation, so that ASan sees overruns
    read_damaged(cut, read, count);
  }
  return count;
}

/// One copy of `text` with one to four places changed.
inline std::string mutated(std::string_view text, std::mt19937_64& random) {
  static constexpr std::array<std::string_view, 22> splices{"0",
                                                            "-1",
                                                            "1e999",
                                                            "18446744073709551615",
                                                            "9223372036854775807",
                                                            "4294967296",
                                                            "null",
                                                            "true",
                                                            "[]",
                                                            "{}",
                                                            "\"\"",
                                                            "[[[[[[",
                                                            "\"a\":1,",
                                                            "\xff\xfe",
                                                            "\\u0000",
                                                            "\\ud800",
                                                            "NaN",
                                                            "\"",
                                                            "}",
                                                            "]",
                                                            ",",
                                                            ":"};
  std::string copy(text);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % std::max<std::size_t>(n, 1)); };
  for (std::size_t edits = 1 + below(4); edits > 0; --edits) {
    const std::size_t at = below(copy.size());
    const std::size_t length = std::min(1 + below(12), copy.size() - at);
    switch (below(6)) {
      case 0:
        if (!copy.empty()) copy[at] = static_cast<char>(random());
        break;
      case 1:
        if (!copy.empty()) copy[at] = static_cast<char>(copy[at] ^ (1 << below(8)));
        break;
      case 2:
        copy.erase(at, length);
        break;
      case 3:
        copy.insert(at, copy.substr(below(copy.size()), length));
        break;
      case 4:
        copy.replace(at, length, splices[below(splices.size())]);
        break;
      default:
        copy.insert(at, splices[below(splices.size())]);
    }
  }
  return copy;
}

template <class Read>
damage_count read_mutations(std::string_view text, int copies, Read read) {
  std::mt19937_64 random(20240607);
  damage_count count;
  for (int i = 0; i < copies; ++i) read_damaged(mutated(text, random), read, count);
  return count;
}
