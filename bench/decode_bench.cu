// The whole round at real model sizes: autoregressive decoding, dense speculation, a lossless sparse draft, SpecAttn.
//   decode_bench_cuda --cells cells.jsonl                 measures what the file lacks, the most telling cells first
//   decode_bench_cuda --cells cells.jsonl --report        prints the tables (needs no GPU)
#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda/device_llama.cuh"
#include "decode_report.hpp"
#include "decode_rounds.cuh"

namespace {

using bench::device;

struct bench_options {
  std::string cells;
  double time_limit = 600;  // seconds
  bool report = false;
  bool smoke = false;
};

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

constexpr bench::llama_size small_target{"small target", 2, 8, 4, 64, 512, 1024, 1000, false};
constexpr bench::llama_size small_draft{"small draft", 2, 4, 2, 64, 256, 512, 1000, true};

bench::loaded_pair load(const bench::llama_size& target, const bench::llama_size& draft) {
  constexpr std::int32_t most_slots = 256;
  return {mini_llm::device_llama(bench::config_of(target), 11, most_slots),
          mini_llm::device_llama(bench::config_of(draft), 12, most_slots)};
}

/// Rounds that keep everything write what dense rounds write: with a stranger as draft, whose tokens are rejected, and
/// with the target itself, whose tokens are accepted.
void check_small(specattn::context<device>& ctx) {
  bench::loaded_pair strangers = load(small_target, small_draft);
  bench::loaded_pair twins{mini_llm::device_llama(bench::config_of(small_target), 11, 256),
                           mini_llm::device_llama(bench::config_of(small_target), 11, 256)};
  const std::size_t rejected = bench::check_rounds(ctx, strangers, small_target, small_draft, 1024, 2);
  const std::size_t accepted = bench::check_rounds(ctx, twins, small_target, small_target, 1024, 1);
  std::fprintf(stderr, "checked: keeping everything, rounds write dense rounds' tokens (%zu and %zu of them)\n",
               rejected, accepted);
  if (accepted <= rejected)
    throw std::runtime_error("a draft that is the target had no more accepted than a stranger");
}

/// The rules of a kept share at a context, found once.
class rule_finder {
 public:
  const bench::share_rules& of(specattn::context<device>& ctx, bench::loaded_pair& models, const bench::setup& what) {
    for (const auto& [known, rules] : found_) {
      if (known.pair == what.pair && known.kv_len == what.kv_len && known.kept == what.kept) return rules;
    }
    const bool dense = what.kept >= 1;
    found_.emplace_back(what, dense ? bench::share_rules{} : bench::find_rules(ctx, models, what));
    return found_.back().second;
  }

 private:
  std::vector<std::pair<bench::setup, bench::share_rules>> found_;
};

void print(const bench::cell& c) {
  std::fprintf(
      stderr, "%-12s %6d x %-2d %-28s kept %4.1f %% drafts %d: %8.3f ms (draft %.3f, guide %.3f, verify %.3f)\n",
      c.models().target.name, c.kv_len, c.batch, bench::name_of(c.decoding),
      100 * c.target_rows / c.target_rows_dense, c.draft_length, c.round_ms, c.draft_ms, c.guide_ms, c.verify_ms);
}

void measure_all(specattn::context<device>& ctx, bench::cell_file& file, double copy_gb_s, double end) {
  const auto time_is_left = [&] { return seconds_now() < end; };
  std::vector<bench::series> plan = bench::planned_series();
  std::optional<bench::loaded_pair> models;
  std::int32_t loaded = -1;
  rule_finder rules;
  for (const bench::series& next : plan) {
    std::vector<std::int32_t> missing;
    for (const std::int32_t length : next.draft_lengths) {
      if (!file.has(next.what, length)) missing.push_back(length);
    }
    if (missing.empty()) continue;
    if (!time_is_left()) return;
    if (loaded != next.what.pair) {
      models.reset();
      models.emplace(load(next.what.models().target, next.what.models().draft));
      loaded = next.what.pair;
    }
    try {
      const bench::share_rules found = rules.of(ctx, *models, next.what);
      bench::measure(ctx, *models, next.what, found, missing, time_is_left, [&](bench::cell c) {
        c.copy_gb_s = copy_gb_s;
        c.guide_top_p = found.guide.top_p;
        c.draft_top_p = found.draft.top_p;
        file.add(c);
        print(c);
      });
    } catch (const specattn::device_error& error) {
      if (std::string(error.what()).find(cudaGetErrorString(cudaErrorMemoryAllocation)) == std::string::npos) throw;
      std::fprintf(stderr, "%s %d x %d, %s: left out, %s\n", next.what.models().name, next.what.kv_len,
                   next.what.batch, bench::name_of(next.what.decoding), error.what());
    }
  }
}

int run(const bench_options& options, const std::string& command) {
  const double end = seconds_now() + options.time_limit;
  bench::cell_file file(options.cells);
  if (options.report) {
    bench::write_report(std::cout, file);
    return 0;
  }
  if (bench::no_device()) return bench::skipped;
  cudaStream_t stream;
  bench::check(cudaStreamCreate(&stream));
  specattn::context<device> ctx(stream);
  check_small(ctx);
  if (options.smoke) return 0;
  double copy = 0;
  {
    bench::device_clock clock(stream);
    copy = bench::copy_bandwidth(clock, stream);
  }
  cudaDeviceProp properties{};
  bench::check(cudaGetDeviceProperties(&properties, 0));
  file.add_run("`" + command + "` on an " + properties.name + ", copy " + std::to_string(static_cast<int>(copy)) +
               " GB/s");
  measure_all(ctx, file, copy, end);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  bench_options options;
  CLI::App app{"The whole round at real model sizes."};
  app.add_option("--cells", options.cells, "file of finished cells, one JSON line each; none: nothing is kept");
  app.add_option("--time-limit", options.time_limit, "seconds after which no further cell is begun")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_flag("--report", options.report, "print the tables of --cells as Markdown");
  app.add_flag("--smoke", options.smoke, "check tiny models only");
  CLI11_PARSE(app, argc, argv);
  std::string command = "decode_bench_cuda";
  for (int i = 1; i < argc; ++i) command += std::string(" ") + argv[i];
  try {
    return run(options, command);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "decode_bench: %s\n", error.what());
    return 1;
  }
}
