#include "compare.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ostream>

namespace mini_llm {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

constexpr std::int32_t longest_draft = 8;
constexpr int repeats = 3;

run_result decode_once(engine& decoder, std::int32_t row, specattn::decode_request request,
                       std::int32_t draft_length) {
  request.draft_length = draft_length;
  decoder.rewind(row, request);
  run_result result;
  result.prompt_tokens = static_cast<std::int32_t>(request.prompt.size());
  result.draft_length = draft_length;
  const double start = now();
  bool running = request.max_new_tokens > 0;
  while (running) {
    running = decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; });
    result.trace += decoder.last_round();
  }
  result.decode_seconds = now() - start;
  result.counts = decoder.counts(row);
  result.finish = decoder.finish(row);
  return result;
}

run_result decode_median(engine& decoder, std::int32_t row, const specattn::decode_request& request,
                         std::int32_t draft_length) {
  std::vector<run_result> runs;
  for (int i = 0; i < repeats; ++i) runs.push_back(decode_once(decoder, row, request, draft_length));
  std::sort(runs.begin(), runs.end(),
            [](const run_result& a, const run_result& b) { return a.decode_seconds < b.decode_seconds; });
  return runs[repeats / 2];
}

comparison::system sweep(std::string name, std::string guarantee, engine& decoder, std::int32_t row,
                         const specattn::decode_request& request, std::int32_t from, std::int32_t to) {
  comparison::system system{std::move(name), std::move(guarantee), {}, {}};
  for (std::int32_t length = from; length <= to; ++length) {
    system.tried.push_back(decode_median(decoder, row, request, length));
  }
  system.best = *std::max_element(system.tried.begin(), system.tried.end(), [](const auto& a, const auto& b) {
    return a.tokens_per_second() < b.tokens_per_second();
  });
  return system;
}

}  // namespace

comparison compare_systems(const session& made, const specattn::decode_request& request) {
  comparison table;
  specattn::decode_options options = made.decode;
  options.refresh_every = 0;
  options.sparse_draft = false;
  options.draft_length = made.draft ? longest_draft : 0;
  guide_choice dense;
  dense.kind = guide_kind::none;
  const auto progress = [](std::int32_t, std::int32_t) {};
  {
    const auto decoder = made.make(dense, options);
    const std::int32_t row = decoder->add(request, progress);
    decode_once(*decoder, row, request, 0);  // warm-up
    table.systems.push_back(sweep("autoregressive", "exact", *decoder, row, request, 0, 0));
    if (!made.draft) return table;
    table.systems.push_back(sweep("dense speculation", "exact", *decoder, row, request, 1, longest_draft));
  }
  if (made.guide.kind == guide_kind::none) return table;
  options = made.decode;
  options.draft_length = longest_draft;
  {
    options.sparse_draft = true;
    options.record_steps = 1;
    const auto decoder = made.make(dense, options);
    const std::int32_t row = decoder->add(request, progress);
    table.systems.push_back(
        sweep("dense verify, sparse draft", "lossless", *decoder, row, request, 1, longest_draft));
  }
  options.sparse_draft = made.decode.sparse_draft;
  options.record_steps = made.decode.record_steps;
  const auto decoder = made.make(made.guide, options);
  const std::int32_t row = decoder->add(request, progress);
  table.systems.push_back(sweep("SpecAttn (" + std::string(name_of(made.guide.kind)) + ")", "approximate", *decoder,
                                row, request, 1, longest_draft));
  return table;
}

void print_comparison(std::ostream& out, const comparison& table) {
  char line[256];
  out << "\nthe same prompt and length, each system at its own best draft length (median of " << repeats
      << " runs):\n";
  std::snprintf(line, sizeof line, "%-28s %-12s %6s %9s %9s %11s %10s %8s %10s\n", "system", "text is", "draft",
                "tok/s", "against", "acceptance", "tok/round", "KV read", "selecting");
  out << line;
  const double base = table.systems.front().best.tokens_per_second();
  for (const comparison::system& s : table.systems) {
    std::snprintf(line, sizeof line, "%-28s %-12s %6d %9.1f %8.2fx %11.3f %10.2f %7.1f%% %9.1f%%\n", s.name.c_str(),
                  s.guarantee.c_str(), s.best.draft_length, s.best.tokens_per_second(),
                  base > 0 ? s.best.tokens_per_second() / base : 0.0, s.best.acceptance(), s.best.tokens_a_round(),
                  100.0 * (1.0 - s.best.rows_saved()), 100.0 * s.best.guide_share());
    out << line;
  }
  if (table.systems.size() < 4) return;
  const comparison::system& guided = table.systems.back();
  const double over_dense = guided.best.tokens_per_second() / table.systems[1].best.tokens_per_second();
  std::snprintf(line, sizeof line, "%s: %.2fx dense speculation, %.2fx autoregressive, %.1f %% fewer KV rows read\n",
                guided.name.c_str(), over_dense, guided.best.tokens_per_second() / base,
                100.0 * guided.best.rows_saved());
  out << line;
  if (over_dense < 1.0) out << "It did not pay here: dense speculation was faster.\n";
}

nlohmann::json to_json(const comparison& table) {
  nlohmann::json systems = nlohmann::json::array();
  for (const comparison::system& s : table.systems) {
    nlohmann::json tried = nlohmann::json::array();
    for (const run_result& run : s.tried) tried.push_back(to_json(run));
    systems.push_back({{"system", s.name}, {"text_is", s.guarantee}, {"best", to_json(s.best)}, {"tried", tried}});
  }
  return systems;
}

}  // namespace mini_llm
