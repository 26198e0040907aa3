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

/// The least quota of a group and those above it.
/// \param quota_in reads the quota of the group whose directory is given
template <class Quota>
double least_quota(const std::string& mount, std::string path, Quota&& quota_in) {
  double least = no_quota;
  for (;;) {
    least = (std::min)(least, quota_in(mount + path));
    const std::size_t slash = path.find_last_of('/');
    if (path.empty() || slash == std::string::npos) return least;
    path.resize(slash);
  }
}

/// CPUs that the process's control groups allow: version 2 (cpu.max) and 1 (cpu.cfs_quota_us).
/// \param groups /proc/self/cgroup's text
/// \param root   where the groups are mounted: /sys/fs/cgroup
inline double cgroup_cpus(std::string_view groups, const std::string& root) {
  double least = no_quota;
  while (!groups.empty()) {
    const std::string_view line = groups.substr(0, groups.find('\n'));
    groups.remove_prefix((std::min)(line.size() + 1, groups.size()));
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string_view::npos || second == std::string_view::npos) continue;
    const std::string controllers = ',' + std::string(line.substr(first + 1, second - first - 1)) + ',';
    std::string path(line.substr(second + 1));
    if (path == "/") path.clear();
    if (controllers == ",,") {
      least = (std::min)(least, least_quota(root, path, [](const std::string& group) {
                           const std::string text = read_small_file(group + "/cpu.max");
                           std::string_view rest = text;
                           const std::string_view quota = next_word(rest);
                           return quota_of(quota, next_word(rest));
                         }));
    } else if (controllers.find(",cpu,") != std::string::npos) {
      least = (std::min)(least, least_quota(root + "/cpu", path, [](const std::string& group) {
                           const std::string quota = read_small_file(group + "/cpu.cfs_quota_us");
                           return quota_of(quota, read_small_file(group + "/cpu.cfs_period_us"));
                         }));
    }
  }
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
