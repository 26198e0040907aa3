// How many CPUs this process may use: its affinity mask and its control group's quota, not what the machine has.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

#include "../config.hpp"

namespace specattn::inline SPECATTN_CODE {
namespace detail {

inline constexpr double no_quota = 1e9;  ///< CPUs of a group without a limit

inline std::string read_small_file(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

/// Takes the next word of `text`.
inline std::string_view next_word(std::string_view& text) {
  const std::size_t from = (std::min)(text.find_first_not_of(" \t\n"), text.size());
  const std::size_t to = (std::min)(text.find_first_of(" \t\n", from), text.size());
  const std::string_view word = text.substr(from, to - from);
  text.remove_prefix(to);
  return word;
}

/// quota / period, both in microseconds; no_quota for "max", -1 and what is no number.
inline double quota_of(std::string_view quota, std::string_view period) {
  long long microseconds = 0, of = 0;
  const auto read = [](std::string_view text, long long& number) {
    return std::from_chars(text.data(), text.data() + text.size(), number).ec == std::errc();
  };
  if (!read(quota, microseconds) || !read(period, of) || microseconds <= 0 || of <= 0) return no_quota;
  return static_cast<double>(microseconds) / static_cast<double>(of);
}

/// Visits the process's control group and each above it, up to the mount: version 2, and a controller's version 1.
/// \param groups     /proc/self/cgroup's text: lines of hierarchy:controllers:group
/// \param root       where the groups are mounted: /sys/fs/cgroup
/// \param controller whose hierarchy of version 1 is meant: "cpu", "memory"
/// \param visit      takes a group's directory and its version, 1 or 2
template <class Visit>
void for_each_group(std::string_view groups, const std::string& root, const std::string& controller, Visit&& visit) {
  while (!groups.empty()) {
    const std::string_view line = groups.substr(0, groups.find('\n'));
    groups.remove_prefix((std::min)(line.size() + 1, groups.size()));
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string_view::npos || second == std::string_view::npos) continue;
    const std::string controllers = ',' + std::string(line.substr(first + 1, second - first - 1)) + ',';
    const int version = controllers == ",," ? 2 : 1;
    if (version == 1 && controllers.find(',' + controller + ',') == std::string::npos) continue;
    std::string mount = root;
    if (version == 1) mount.append("/").append(controller);
    std::string path(line.substr(second + 1));
    if (path == "/") path.clear();
    for (;;) {
      visit(mount + path, version);
      const std::size_t slash = path.find_last_of('/');
      if (slash == std::string::npos) break;
      path.resize(slash);
    }
  }
}

/// CPUs that the process's control groups allow: version 2 (cpu.max) and 1 (cpu.cfs_quota_us).
/// \param groups /proc/self/cgroup's text
/// \param root   where the groups are mounted: /sys/fs/cgroup
inline double cgroup_cpus(std::string_view groups, const std::string& root) {
  double least = no_quota;
  for_each_group(groups, root, "cpu", [&](const std::string& group, int version) {
    std::string text = read_small_file(group + (version == 2 ? "/cpu.max" : "/cpu.cfs_quota_us"));
    if (version == 1) text += ' ' + read_small_file(group + "/cpu.cfs_period_us");
    std::string_view rest = text;
    const std::string_view quota = next_word(rest);
    least = (std::min)(least, quota_of(quota, next_word(rest)));
  });
  return least;
}

/// CPUs in the calling thread's affinity mask; elsewhere than on Linux, the machine's.
inline int affinity_cpus() {
#if defined(__linux__)
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace detail

/// CPUs that threads started here may use at once, at least 1: the affinity mask, and a control group's quota rounded up.
inline int usable_cpus() {
  int cpus = detail::affinity_cpus();
#if defined(__linux__)
  const double quota = detail::cgroup_cpus(detail::read_small_file("/proc/self/cgroup"), "/sys/fs/cgroup");
  if (quota < cpus) cpus = static_cast<int>(std::ceil(quota));
#endif
  return (std::max)(cpus, 1);
}

}  // namespace specattn::inline SPECATTN_CODE
