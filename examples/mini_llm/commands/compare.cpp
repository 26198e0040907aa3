#include "compare.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <ostream>
#include <utility>

namespace mini_llm {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

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

run_result median(std::vector<run_result> runs) {
  std::sort(runs.begin(), runs.end(),
            [](const run_result& a, const run_result& b) { return a.decode_seconds < b.decode_seconds; });
  return runs[runs.size() / 2];
}

void add(run_result& sum, const run_result& run) {
  sum.decode_seconds += run.decode_seconds;
  sum.counts += run.counts;
  sum.trace += run.trace;
}

/// A system with the prompt in its caches.
struct contender {
  comparison::system* system;
  std::unique_ptr<engine> decoder;
  std::int32_t row;

  contender(comparison::system& of, const session& made, const guide_choice& guide,
            const specattn::decode_options& options, const specattn::decode_request& request)
      : system(&of), decoder(made.make(guide, options)) {
    row = decoder->add(request, [](std::int32_t, std::int32_t) {});
    decode_once(*decoder, row, request, of.shortest);  // warm-up
  }

  /// Tries every draft length on one text.
  void sweep(const specattn::decode_request& request) {
    for (std::int32_t length = system->shortest; length <= system->longest; ++length) {
      std::vector<run_result> runs;
      for (int i = 0; i < repeats; ++i) runs.push_back(decode_once(*decoder, row, request, length));
      system->tried.push_back(median(std::move(runs)));
    }
    const auto fastest =
        std::max_element(system->tried.begin(), system->tried.end(),
                         [](const auto& a, const auto& b) { return a.tokens_per_second() < b.tokens_per_second(); });
    system->best.prompt_tokens = fastest->prompt_tokens;
    system->best.draft_length = fastest->draft_length;
  }
};

/// The systems take turns, so that a disturbance of the machine meets all of them; a text is one seed.
void contest(std::vector<contender>& contenders, specattn::decode_request request) {
  for (int text = 0; text < comparison::texts; ++text, ++request.sampler.seed) {
    std::vector<std::vector<run_result>> runs(contenders.size());
    for (int i = 0; i < repeats; ++i) {
      for (std::size_t c = 0; c < contenders.size(); ++c) {
        contender& each = contenders[c];
        runs[c].push_back(decode_once(*each.decoder, each.row, request, each.system->best.draft_length));
      }
    }
    for (std::size_t c = 0; c < contenders.size(); ++c) add(contenders[c].system->best, median(std::move(runs[c])));
  }
}

/// The guided system's rounds of each length against the cost model.
void predict_rounds(comparison& table, const specattn::round_planner& planner) {
  const auto cost = planner.cost();
  const auto work = planner.workload();
  for (const run_result& run : table.systems[3].tried) {
    table.predictions.push_back({run.draft_length, specattn::round_seconds(cost, work, {run.draft_length, true}),
                                 run.trace.seconds() / static_cast<double>(run.counts.rounds)});
  }
}

}  // namespace

comparison compare_systems(const session& made, const specattn::decode_request& request) {
  comparison table;
  table.systems.reserve(5);  // contenders point into it
  std::vector<contender> contenders;
  const auto enter = [&](std::string name, std::string guarantee, const guide_choice& guide,
                         const specattn::decode_options& options) {
    const bool drafts = options.draft_length > 0;
    const std::int32_t shortest = options.adaptive ? options.draft_length : drafts ? 1 : 0;
    table.systems.push_back({std::move(name), std::move(guarantee), shortest, options.draft_length, {}, {}});
    contenders.emplace_back(table.systems.back(), made, guide, options, request);
    contenders.back().sweep(request);
  };
  guide_choice dense;
  dense.kind = guide_kind::none;
  specattn::decode_options options = made.decode;
  options.refresh_every = 0;
  options.record_every = 1;
  options.sparse_draft = false;
  options.adaptive = false;
  options.draft_length = 0;
  enter("autoregressive", "exact", dense, options);
  if (made.draft) {
    options.draft_length = comparison::longest_draft;
    enter("dense speculation", "exact", dense, options);
    if (made.guide.kind != guide_kind::none) {
      options.sparse_draft = true;
      options.record_steps = 1;
      enter("dense verify, sparse draft", "lossless", dense, options);
      options = made.decode;
      options.adaptive = false;
      options.draft_length = comparison::longest_draft;
      enter("SpecAttn (" + std::string(name_of(made.guide.kind)) + ")", "approximate", made.guide, options);
      options.adaptive = true;
      enter("SpecAttn, adaptive", "approximate", made.guide, options);
      predict_rounds(table, *contenders.back().decoder->planner());
    }
  }
  contest(contenders, request);
  return table;
}

void print_comparison(std::ostream& out, const comparison& table) {
  char line[256];
  out << "\nthe same prompt and length, each system at its own best draft length, over " << comparison::texts
      << " texts (seeds), the systems\ntaking turns, each text's median of " << repeats << " runs:\n";
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
  const comparison::system& guided = table.systems[3];
  const double over_dense = guided.best.tokens_per_second() / table.systems[1].best.tokens_per_second();
  std::snprintf(line, sizeof line, "%s: %.2fx dense speculation, %.2fx autoregressive, %.1f %% fewer KV rows read\n",
                guided.name.c_str(), over_dense, guided.best.tokens_per_second() / base,
                100.0 * guided.best.rows_saved());
  out << line;
  if (over_dense < 1.0) out << "It did not pay here: dense speculation was faster.\n";
  out << "a guided round of 1, 2, … drafted tokens, us, as the adaptive run's cost model predicts it (measured):";
  for (const comparison::prediction& p : table.predictions) {
    std::snprintf(line, sizeof line, " %.0f (%.0f)", 1e6 * p.predicted_seconds, 1e6 * p.measured_seconds);
    out << line;
  }
  out << '\n';
}

nlohmann::json to_json(const comparison& table) {
  nlohmann::json systems = nlohmann::json::array();
  for (const comparison::system& s : table.systems) {
    nlohmann::json tried = nlohmann::json::array();
    for (const run_result& run : s.tried) tried.push_back(to_json(run));
    systems.push_back({{"system", s.name}, {"text_is", s.guarantee}, {"best", to_json(s.best)}, {"tried", tried}});
  }
  for (const comparison::prediction& p : table.predictions) {
    for (nlohmann::json& system : systems) {
      if (system["system"] != table.systems[3].name) continue;
      system["predicted"].push_back({{"draft_length", p.draft_length},
                                     {"predicted_round_us", 1e6 * p.predicted_seconds},
                                     {"measured_round_us", 1e6 * p.measured_seconds}});
    }
  }
  return systems;
}

}  // namespace mini_llm
