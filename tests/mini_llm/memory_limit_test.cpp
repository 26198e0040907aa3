// What is taken for the memory that can be had: files of /proc and /sys as systems write them.
#include "model/memory_limit.hpp"

#include <doctest/doctest.h>

#include <filesystem>
#include <string>

#include "damaged_input.hpp"

using namespace mini_llm;

namespace {

constexpr std::uint64_t mebibyte = 1 << 20;

/// A root with these files.
class system_files {
 public:
  void write(const std::string& file, const std::string& content) const {
    std::filesystem::create_directories((directory_.path() / file).parent_path());
    directory_.write(file, content);
  }
  memory_room room() const { return available_memory(directory_.path()); }
  std::uint64_t mebibytes() const { return room().bytes / mebibyte; }

 private:
  scratch_directory directory_;
};

}  // namespace

TEST_CASE("memory_limit: what the machine has available, swap included, counts where nothing else limits") {
  const system_files files;
  CHECK(files.room().bytes == UINT64_MAX);
  files.write("proc/meminfo", "MemTotal: 8192000 kB\nMemAvailable:    2048000 kB\nSwapFree: 1024 kB\n");
  CHECK(files.mebibytes() == 2001);
  CHECK(files.room().limit.find("the machine") == 0);
}

TEST_CASE("memory_limit: the tightest cgroup of version 2 above the process counts, its droppable pages as free") {
  const system_files files;
  files.write("proc/meminfo", "MemAvailable: 2048000 kB\n");
  files.write("proc/self/cgroup", "0::/user/run\n");
  const std::string mounted = "sys/fs/cgroup/";
  files.write(mounted + "user/run/memory.max", "max\n");
  files.write(mounted + "user/run/memory.current", "1048576\n");
  CHECK(files.mebibytes() == 2000);
  files.write(mounted + "user/memory.max", std::to_string(512 * mebibyte));
  files.write(mounted + "user/memory.current", std::to_string(300 * mebibyte));
  CHECK(files.mebibytes() == 212);
  CHECK(files.room().limit.find("user/memory.max") != std::string::npos);
  files.write(mounted + "user/memory.stat", "anon 7\ninactive_file " + std::to_string(100 * mebibyte) + "\n");
  CHECK(files.mebibytes() == 312);
  files.write(mounted + "user/run/memory.max", std::to_string(64 * mebibyte));
  CHECK(files.mebibytes() == 63);
}

TEST_CASE("memory_limit: version 1 counts too, also where a container sees its own group as the top") {
  const system_files files;
  files.write("proc/self/cgroup", "5:devices:/x\n4:memory:/docker/abc\n0::/\n");
  const std::string top = "sys/fs/cgroup/memory/";
  files.write(top + "memory.limit_in_bytes", std::to_string(100 * mebibyte));
  files.write(top + "memory.usage_in_bytes", std::to_string(120 * mebibyte));
  files.write(top + "memory.stat", "total_inactive_file " + std::to_string(30 * mebibyte) + "\n");
  CHECK(files.mebibytes() == 10);
  files.write(top + "memory.limit_in_bytes", "9223372036854771712\n");
  CHECK(files.mebibytes() > 1'000'000);
}

TEST_CASE("memory_limit: what does not fit is refused with both numbers and what needs less; what fits is not") {
  const memory_room room{10 * mebibyte, "the machine has that available"};
  CHECK_NOTHROW(require_memory(10 * mebibyte, "it", "less", room));
  CHECK(refusal([&] { require_memory(30 * mebibyte, "a text of 9 positions", "-c needs less", room); }) ==
        "a text of 9 positions may take 30 MiB of memory, but no more than 10 MiB can be had: the machine has that "
        "available; -c needs less");
}
