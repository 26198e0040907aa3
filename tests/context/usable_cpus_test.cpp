// How many CPUs a process may use, from made-up control groups and a real affinity mask.
#include "specattn/cpu/usable_cpus.hpp"

#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "specattn/cpu/context.hpp"

using namespace specattn;  // NOLINT(google-build-using-namespace)

namespace {

/// A directory for made-up control groups, removed at the end.
struct groups {
  std::filesystem::path root = std::filesystem::temp_directory_path() / "specattn_usable_cpus_test";
  groups() { std::filesystem::remove_all(root); }
  ~groups() { std::filesystem::remove_all(root); }
  void write(const std::string& path, const std::string& text) const {
    std::filesystem::create_directories((root / path).parent_path());
    std::ofstream(root / path) << text;
  }
  double cpus(const std::string& of_process) const { return detail::cgroup_cpus(of_process, root.string()); }
};

}  // namespace

TEST_CASE("usable_cpus: the least quota of a process's groups of version 2 holds, its parents' too") {
  const groups g;
  g.write("a/b/cpu.max", "250000 100000\n");
  g.write("a/cpu.max", "max 100000\n");
  CHECK(g.cpus("0::/a/b\n") == 2.5);
  CHECK(g.cpus("0::/a\n") == detail::no_quota);
  g.write("a/cpu.max", "50000 100000\n");
  CHECK(g.cpus("0::/a/b\n") == 0.5);
  CHECK(g.cpus("0::/a/b/c\n") == 0.5);
  g.write("cpu.max", "300000 200000");
  CHECK(g.cpus("0::/\n") == 1.5);
}

TEST_CASE("usable_cpus: so does the quota of version 1, and files that say nothing limit nothing") {
  const groups g;
  g.write("cpu/job/cpu.cfs_quota_us", "400000\n");
  g.write("cpu/job/cpu.cfs_period_us", "100000\n");
  CHECK(g.cpus("5:memory:/other\n4:cpu,cpuacct:/job\n3:cpuset:/\n") == 4.0);
  CHECK(g.cpus("5:memory:/job\n") == detail::no_quota);
  g.write("cpu/job/cpu.cfs_quota_us", "-1\n");
  CHECK(g.cpus("4:cpu:/job\n") == detail::no_quota);
  for (const char* text : {"", "nonsense", "::", "0::", "1:cpu:", "\n\n", "0::/x"})
    CHECK(g.cpus(text) == detail::no_quota);
  g.write("x/cpu.max", "word 0");
  CHECK(g.cpus("0::/x") == detail::no_quota);
}

#if defined(__linux__)
TEST_CASE("usable_cpus: a thread that may use one CPU starts teams of one, whose larger teams lose nothing") {
  cpu_set_t before, one;
  CPU_ZERO(&before);
  REQUIRE(sched_getaffinity(0, sizeof(before), &before) == 0);
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &before)) continue;
    CPU_SET(cpu, &one);
    break;
  }
  REQUIRE(sched_setaffinity(0, sizeof(one), &one) == 0);
  CHECK(usable_cpus() == 1);
  CHECK(context<cpu>().threads() == 1);
  context<cpu> larger(8);
  CHECK(larger.threads() == 8);
  int calls = 0;  // not atomic: one thread alone runs
  larger.parallel_for(100, [&](std::ptrdiff_t, int) { ++calls; });
  CHECK(calls == 100);
  REQUIRE(sched_setaffinity(0, sizeof(before), &before) == 0);
  CHECK(usable_cpus() >= 1);
}
#endif
