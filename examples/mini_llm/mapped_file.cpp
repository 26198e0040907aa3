#include "mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <limits>
#include <string>
#include <system_error>
#include <utility>

#include "input_error.hpp"

namespace mini_llm {
namespace {

/// What a clone without Git LFS has in place of a large file.
constexpr std::string_view lfs_pointer_start = "version https://git-lfs.github.com/spec/";

/// Closes the descriptor on every way out; the mapping outlives it.
class descriptor {
 public:
  explicit descriptor(int number) : number_(number) {}
  descriptor(const descriptor&) = delete;
  descriptor& operator=(const descriptor&) = delete;
  ~descriptor() {
    if (number_ >= 0) ::close(number_);
  }
  int number() const { return number_; }

 private:
  int number_;
};

[[noreturn]] void fail(const std::filesystem::path& path, const char* what, int error) {
  throw input_error(path.string(), std::string(what) + ": " + std::generic_category().message(error));
}

}  // namespace

mapped_file::mapped_file(const std::filesystem::path& path)
    : mapped_file(path, std::numeric_limits<std::size_t>::max()) {}

mapped_file::mapped_file(const std::filesystem::path& path, std::size_t max_bytes) {
  // O_NONBLOCK: opening a pipe that nobody writes to would otherwise wait for ever.
  const descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.number() < 0) fail(path, "cannot open", errno);
  struct stat status {};
  if (::fstat(file.number(), &status) != 0) fail(path, "cannot examine", errno);
  if (!S_ISREG(status.st_mode)) throw input_error(path.string(), "is not a regular file");
  const auto size_bytes = static_cast<std::size_t>(status.st_size);
  if (size_bytes > max_bytes) {
    throw input_error(path.string(), "has " + std::to_string(size_bytes) + " bytes; at most " +
                                         std::to_string(max_bytes) + " are accepted for this file");
  }
  if (size_bytes == 0) return;  // mmap refuses a length of zero
  void* const address = ::mmap(nullptr, size_bytes, PROT_READ, MAP_PRIVATE, file.number(), 0);
  if (address == MAP_FAILED) fail(path, "cannot map", errno);
  data_ = static_cast<const std::byte*>(address);
  size_bytes_ = size_bytes;
  if (text().starts_with(lfs_pointer_start)) {
    ::munmap(address, size_bytes);  // no destructor runs behind a constructor that throws
    throw input_error(path.string(),
                      "is a Git LFS pointer, not the file it stands for; `git lfs install && git lfs pull` "
                      "in its repository fetches that");
  }
}

mapped_file::mapped_file(mapped_file&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_bytes_(std::exchange(other.size_bytes_, 0)) {}

mapped_file& mapped_file::operator=(mapped_file&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

mapped_file::~mapped_file() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_bytes_);
}

}  // namespace mini_llm
