#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string_view>

namespace mini_llm {

/// A whole file mapped read-only into memory. Movable, not copyable.
///
/// Pages are read when they are first touched. Another process that shortens the file meanwhile
/// makes such a touch end the program (SIGBUS), as with every mapping; replace model files by
/// renaming, not by overwriting.
class mapped_file {
 public:
  /// An empty mapping of no file.
  mapped_file() = default;

  /// Maps `path`, following symbolic links.
  /// \throws input_error when the file is missing, unreadable or not a regular file, or is a pointer of Git LFS
  explicit mapped_file(const std::filesystem::path& path);

  /// As above, and refuses a file of more than `max_bytes` before mapping it.
  mapped_file(const std::filesystem::path& path, std::size_t max_bytes);

  mapped_file(mapped_file&& other) noexcept;
  mapped_file& operator=(mapped_file&& other) noexcept;
  mapped_file(const mapped_file&) = delete;
  mapped_file& operator=(const mapped_file&) = delete;
  ~mapped_file();

  /// The file's bytes; valid as long as this object (or the one it was moved to) lives.
  std::span<const std::byte> bytes() const noexcept { return {data_, size_bytes_}; }

  /// The same bytes as characters.
  std::string_view text() const noexcept { return {reinterpret_cast<const char*>(data_), size_bytes_}; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_bytes_ = 0;
};

}  // namespace mini_llm
