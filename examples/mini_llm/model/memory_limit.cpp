#include "memory_limit.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <sstream>

#include "input_error.hpp"
#include "specattn/cpu/usable_cpus.hpp"

namespace mini_llm {
namespace {

using path = std::filesystem::path;

/// The number a file consists of; nothing where it is absent or says "max".
std::optional<std::uint64_t> number_in(const path& file) {
  std::uint64_t number = 0;
  std::ifstream in(file);
  if (!(in >> number)) return std::nullopt;
  return number;
}

/// The number behind a name ("MemAvailable:", "inactive_file") in a file of one name and number a line.
std::optional<std::uint64_t> number_behind(const path& file, std::string_view name) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string first;
    std::uint64_t number = 0;
    if (words >> first >> number && first == name) return number;
  }
  return std::nullopt;
}

void tighten(memory_room& room, std::uint64_t bytes, std::string limit) {
  if (bytes < room.bytes) room = {bytes, std::move(limit)};
}

/// A container sees its own group as the top, and not those above it.
void tighten_by_cgroups(memory_room& room, const path& root) {
  const auto visit = [&](const path& group, int version) {
    const path limit = group / (version == 2 ? "memory.max" : "memory.limit_in_bytes");
    const auto most = number_in(limit);
    const auto used = number_in(group / (version == 2 ? "memory.current" : "memory.usage_in_bytes"));
    if (!most || !used) return;
    const char* droppable = version == 2 ? "inactive_file" : "total_inactive_file";
    const std::uint64_t spare = number_behind(group / "memory.stat", droppable).value_or(0);
    const std::uint64_t held = *used - (std::min)(*used, spare);
    tighten(room, *most - (std::min)(*most, held), "its cgroup leaves that (" + limit.string() + ")");
  };
  specattn::detail::for_each_group(specattn::detail::read_small_file((root / "proc/self/cgroup").string()),
                                   (root / "sys/fs/cgroup").string(), "memory", visit);
}

std::string megabytes(std::uint64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

}  // namespace

memory_room available_memory(const path& root) {
  memory_room room;
  const path memory = root / "proc/meminfo";
  if (const auto available = number_behind(memory, "MemAvailable:")) {
    const std::uint64_t swap = number_behind(memory, "SwapFree:").value_or(0);
    tighten(room, (*available + swap) * 1024, "the machine has that available");
  }
  tighten_by_cgroups(room, root);
  rlimit limit{};
  if (::getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
    const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    const std::uint64_t taken = number_in(root / "proc/self/statm").value_or(0) * page;
    tighten(room, limit.rlim_cur - (std::min<std::uint64_t>)(limit.rlim_cur, taken), "`ulimit -v` leaves that");
  }
  return room;
}

void require_memory(std::size_t needed, std::string_view what, std::string_view remedy, const memory_room& room) {
  if (needed <= room.bytes) return;
  throw input_error(std::string(what) + " may take " + megabytes(needed) + " of memory, but no more than " +
                    megabytes(room.bytes) + " can be had: " + room.limit + "; " + std::string(remedy));
}

}  // namespace mini_llm
