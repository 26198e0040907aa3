// What every benchmark shares: repeats and their median, the copy bandwidth of the same run, one line a point.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifndef SPECATTN_BUILD_TYPE
#define SPECATTN_BUILD_TYPE "unknown"
#endif
#ifndef SPECATTN_SOURCE_DIR
#define SPECATTN_SOURCE_DIR "."
#endif

namespace bench {

/// Wall-clock times of one point, in microseconds.
struct timing {
  double median_us = 0;
  double min_us = 0;
  double p95_us = 0;
};

/// Keeps a result alive without writing it.
template <class T>
inline void keep(const T& value) {
#if defined(__GNUC__)
  asm volatile("" : : "r"(&value) : "memory");
#else
  static volatile const void* sink;
  sink = &value;
#endif
}

inline std::string first_line_of(const std::string& command) {
  std::string line;
#if !defined(_WIN32)
  if (FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r")) {
    char text[256] = {};
    if (std::fgets(text, sizeof text, pipe) != nullptr) line = text;
    pclose(pipe);
  }
#endif
  while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) line.pop_back();
  return line.empty() ? "unknown" : line;
}

inline std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

inline std::string compiler_name() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#else
  return "unknown";
#endif
}

/// Text as a JSON string.
inline std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) result += c;
  }
  return result + '"';
}

/// One benchmark program: reads the command line, prints the header, times points and prints a line for each.
///   --smoke   the smallest shapes, one repeat: correctness only      --json   one JSON object a line
///   --repeats n   timed repeats of a point (default 31)
class session {
 public:
  session(std::string name, int argc, char** argv) : name_(std::move(name)) {
    for (int i = 0; i < argc; ++i) command_.append(i > 0 ? " " : "").append(argv[i]);
    for (int i = 1; i < argc; ++i) {
      if (std::strcmp(argv[i], "--smoke") == 0)
        smoke_ = true;
      else if (std::strcmp(argv[i], "--json") == 0)
        json_ = true;
      else if (std::strcmp(argv[i], "--repeats") == 0 && i + 1 < argc)
        repeats_ = (std::max)(1, std::atoi(argv[++i]));
      else
        fail("unknown option " + std::string(argv[i]) + "; known: --smoke --json --repeats n");
    }
    if (smoke_) repeats_ = 1;
#if !defined(__OPTIMIZE__)
    const bool optimised = false;
#else
    const bool optimised = true;
#endif
    const std::string build = SPECATTN_BUILD_TYPE;
    if (!smoke_ && (!optimised || (build != "Release" && build != "unknown")))
      fail("this is a " + build + " build: figures come from Release builds only (--smoke runs in any)");
    commit_ = first_line_of("git -C '" SPECATTN_SOURCE_DIR "' describe --always --dirty");
    copy_gb_s_ = measure_copy();
    if (!json_) {
      std::printf("%s | %s, %u hardware threads | %s | commit %s | copy %.1f GB/s\n%s\n", name_.c_str(),
                  processor_name().c_str(), std::thread::hardware_concurrency(), compiler_name().c_str(),
                  commit_.c_str(), copy_gb_s_, command_.c_str());
      std::printf("%-52s %12s %12s %12s %10s %9s %7s\n", "point", "median us", "min us", "p95 us", "MB", "GB/s",
                  "copy %");
    }
  }

  bool smoke() const { return smoke_; }
  double copy_gb_s() const { return copy_gb_s_; }

  /// Times `body` after warm-up and prints its line. `bytes` is what it must move at least once; `extra` is appended
  /// to the line as it is (in JSON as the member "note").
  template <class Body>
  timing point(const std::string& label, double bytes, Body&& body, const std::string& extra = "") {
    std::vector<double> us;
    for (int i = smoke_ ? 1 : -3; i < repeats_ || us.empty(); ++i) {
      const auto start = std::chrono::steady_clock::now();
      body();
      const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
      if (i >= 0) us.push_back(took.count());
    }
    std::sort(us.begin(), us.end());
    const timing t{us[us.size() / 2], us.front(), us[(us.size() * 95) / 100]};
    const double gb_s = bytes / t.median_us * 1e-3;
    if (json_) {
      std::printf(
          "{\"bench\":%s,\"point\":%s,\"median_us\":%.3f,\"min_us\":%.3f,\"p95_us\":%.3f,\"repeats\":%zu,"
          "\"bytes\":%.0f,\"gb_s\":%.3f,\"copy_gb_s\":%.3f,\"share_of_copy\":%.4f,\"device\":%s,"
          "\"compiler\":%s,\"commit\":%s,\"command\":%s,\"note\":%s}\n",
          bench::quoted(name_).c_str(), bench::quoted(label).c_str(), t.median_us, t.min_us, t.p95_us, us.size(),
          bytes, gb_s, copy_gb_s_, gb_s / copy_gb_s_, bench::quoted(processor_name()).c_str(),
          bench::quoted(compiler_name()).c_str(), bench::quoted(commit_).c_str(), bench::quoted(command_).c_str(),
          bench::quoted(extra).c_str());
    } else {
      std::printf("%-52s %12.2f %12.2f %12.2f %10.3f %9.2f %6.1f%%  %s\n", label.c_str(), t.median_us, t.min_us,
                  t.p95_us, bytes * 1e-6, gb_s, 100 * gb_s / copy_gb_s_, extra.c_str());
    }
    std::fflush(stdout);
    return t;
  }

  /// Ends the program with a message: a result was wrong, so its time means nothing.
  [[noreturn]] static void fail(const std::string& message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::exit(1);
  }

 private:
  /// Bytes read plus bytes written a second by memcpy on every hardware thread, 64 MB each: the median of seven.
  double measure_copy() const {
    const std::size_t size = smoke_ ? std::size_t{1} << 20 : std::size_t{64} << 20;
    const unsigned threads = (std::max)(1u, std::thread::hardware_concurrency());
    std::vector<std::vector<char>> from(threads, std::vector<char>(size, 1));
    std::vector<std::vector<char>> to(threads, std::vector<char>(size, 2));
    std::vector<double> gb_s;
    for (int turn = 0; turn < 7; ++turn) {
      const auto start = std::chrono::steady_clock::now();
      std::vector<std::thread> team;
      for (unsigned t = 0; t < threads; ++t)
        team.emplace_back([&, t] { std::memcpy(to[t].data(), from[t].data(), size); });
      for (std::thread& member : team) member.join();
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      gb_s.push_back(2e-9 * static_cast<double>(size) * threads / took.count());
      keep(to);
    }
    std::sort(gb_s.begin(), gb_s.end());
    return gb_s[gb_s.size() / 2];
  }

  std::string name_;
  std::string command_;
  std::string commit_;
  double copy_gb_s_ = 0;
  int repeats_ = 31;
  bool smoke_ = false;
  bool json_ = false;
};

}  // namespace bench
