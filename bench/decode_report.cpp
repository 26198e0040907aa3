#include "decode_report.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "specattn/cost_model.hpp"

namespace bench {
namespace {

std::string number(double value, int digits) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}
std::string ratio_or_dash(double value) { return value > 0 ? number(value, 2) + "x" : "-"; }

/// Milliseconds that moving the models' weights once a pass and KV rows takes at the copy bandwidth.
double bytes_ms(const cell& c, double draft_steps, double draft_rows, double target_rows) {
  const llama_size &target = c.models().target, &draft = c.models().draft;
  const double bytes = draft_steps * draft.weight_bytes() + draft_rows * draft.row_bytes() + target.weight_bytes() +
                       target_rows * target.row_bytes();
  return 1e3 * bytes / (1e9 * c.copy_gb_s);
}

/// How much faster than dense speculation, at the same draft length, bytes alone would make a round.
double bound_over_dense(const cell& c) {
  const double dense_draft_rows = c.draft_steps > 0 ? c.draft_rows_dense * c.draft_length / c.draft_steps : 0.0;
  return bytes_ms(c, c.draft_length, dense_draft_rows, c.target_rows_dense) /
         bytes_ms(c, c.draft_steps, c.draft_rows, c.target_rows);
}

double tokens_a_second(const cell& c, double acceptance) {
  return 1e3 * c.batch * specattn::tokens_a_round(acceptance, c.draft_length) / c.round_ms;
}

const cell* find(const cell_file& file, setup what, way decoding, double kept, std::int32_t draft_length) {
  what.decoding = decoding;
  what.kept = has_guide(decoding) || has_sparse_draft(decoding) ? kept : 1.0;
  return file.find(what, draft_length);
}

/// Of one way, the draft length with the most tokens a second.
const cell* best_of(const cell_file& file, setup what, way decoding, double kept, double acceptance) {
  const cell* best = nullptr;
  for (std::int32_t length = 0; length <= 15; ++length) {
    const cell* c = find(file, what, decoding, kept, length);
    if (c != nullptr && (best == nullptr || tokens_a_second(*c, acceptance) > tokens_a_second(*best, acceptance)))
      best = c;
  }
  return best;
}

double over(const cell* faster, const cell* slower) {
  return faster != nullptr && slower != nullptr ? slower->round_ms / faster->round_ms : 0.0;
}

void write_goals(std::ostream& out, const cell_file& file) {
  out << "## The rows with goals\n\nDraft length 4, 22 % kept; rounds of equal draft length, so that acceptance "
         "cancels. "
         "In brackets what bytes alone would give at the copy bandwidth measured in the same run.\n\n"
         "| target <- draft | kv_len | batch | dense ms | SpecAttn ms | over dense | goal | dense draft | sparse "
         "draft, "
         "dense verify | 10 % kept | recording every 4th round | importance + selection "
         "|\n|---|---|---|---|---|---|---|---|---|---|---|---|\n";
  for (const goal_row& row : goal_rows) {
    const setup what{row.pair, row.kv_len, row.batch};
    const cell* dense = find(file, what, way::dense, 1, 4);
    const cell* ours = find(file, what, way::specattn, 0.22, 4);
    if (dense == nullptr || ours == nullptr) continue;
    const auto with_bound = [&](const cell* c) {
      return c == nullptr ? std::string("-")
                          : ratio_or_dash(over(c, dense)) + " (" + number(bound_over_dense(*c), 2) + ")" +
                                (c->fell_back() ? " fell back" : "");
    };
    const bool met = over(ours, dense) >= row.goal && !ours->fell_back();
    out << "| " << what.models().target.name << " <- " << what.models().draft.name << " | " << row.kv_len << " | "
        << row.batch << " | " << number(dense->round_ms, 2) << " | " << number(ours->round_ms, 2) << " | **"
        << with_bound(ours) << "** | " << number(row.goal, 2) << (met ? " met" : " missed") << " | "
        << with_bound(find(file, what, way::dense_draft, 0.22, 4)) << " | "
        << with_bound(find(file, what, way::sparse_draft, 0.22, 4)) << " | "
        << with_bound(find(file, what, way::specattn, 0.10, 4)) << " | "
        << with_bound(find(file, what, way::reuse, 0.22, 4)) << " | " << number(100 * ours->guide_share(), 1)
        << " % |\n";
  }
}

void write_speeds(std::ostream& out, const cell_file& file, double acceptance) {
  out << "\n## Tokens a second at an acceptance of " << number(acceptance, 1)
      << "\n\nEach way at its own best draft length (in brackets); random weights accept nothing, so tokens a round "
         "are "
         "computed. 22 % kept.\n\n| target | kv_len | batch | autoregressive | dense speculation | sparse draft, "
         "dense "
         "verify | SpecAttn | recording every 4th round | over autoregressive | over dense speculation "
         "|\n|---|---|---|---|---|---|---|---|---|---|\n";
  std::vector<setup> seen;
  for (const cell& c : file.cells()) {
    const setup what{c.pair, c.kv_len, c.batch};
    if (std::find(seen.begin(), seen.end(), what) != seen.end()) continue;
    seen.push_back(what);
  }
  std::sort(seen.begin(), seen.end(), [](const setup& a, const setup& b) {
    return std::tie(a.pair, a.kv_len, a.batch) < std::tie(b.pair, b.kv_len, b.batch);
  });
  for (const setup& what : seen) {
    const auto speed = [&](const cell* c) {
      return c == nullptr ? std::string("-")
                          : number(tokens_a_second(*c, acceptance), 0) + " (" + std::to_string(c->draft_length) + ")";
    };
    const cell* plain = best_of(file, what, way::autoregressive, 1, acceptance);
    const cell* dense = best_of(file, what, way::dense, 1, acceptance);
    const cell* lossless = best_of(file, what, way::sparse_draft, 0.22, acceptance);
    const cell* ours = best_of(file, what, way::specattn, 0.22, acceptance);
    const cell* reused = best_of(file, what, way::reuse, 0.22, acceptance);
    if (ours == nullptr) continue;
    const auto gain = [&](const cell* c) {
      return c == nullptr ? std::string("-")
                          : ratio_or_dash(tokens_a_second(*ours, acceptance) / tokens_a_second(*c, acceptance));
    };
    out << "| " << what.models().target.name << " | " << what.kv_len << " | " << what.batch << " | "
        << (plain ? number(tokens_a_second(*plain, acceptance), 0) : "-") << " | " << speed(dense) << " | "
        << speed(lossless) << " | " << speed(ours) << " | " << speed(reused) << " | " << gain(plain) << " | "
        << gain(dense) << " |\n";
  }
}

/// What the cost model foretells of each round when it has learnt from all of the pair's.
void write_cells(std::ostream& out, const cell_file& file) {
  std::map<std::int32_t, specattn::detail::fading_fit<4>> target;
  std::map<std::int32_t, specattn::detail::fading_fit<3>> draft;
  std::map<std::int32_t, specattn::detail::fading_fit<2>> guide;
  const auto target_terms = [](const cell& c) -> std::array<double, 4> {
    const double slots = c.batch * (c.draft_length + 1);
    return {1.0, slots, c.target_rows, slots * c.target_rows};
  };
  const auto guide_terms = [](const cell& c) -> std::array<double, 2> {
    const double share = 1.0 / record_every(c.decoding);
    return {share, share * c.batch * c.cached};
  };
  const auto draft_terms = [](const cell& c) -> std::array<double, 3> {
    return {c.draft_steps, c.draft_steps * c.batch, c.draft_rows};
  };
  // All cells alike, by their relative error.
  const auto observe = [](auto& fit, auto terms, double milliseconds) {
    for (double& term : terms) term /= milliseconds;
    fit.observe(terms, 1.0, 1.0);
  };
  for (const cell& c : file.cells()) {
    observe(target[c.pair], target_terms(c), c.verify_ms + c.accept_ms + c.rest_ms());
    if (c.draft_length > 0) observe(draft[c.pair], draft_terms(c), c.draft_ms);
    if (has_guide(c.decoding)) observe(guide[c.pair], guide_terms(c), c.guide_ms);
  }
  const auto sum = [](const auto& terms, const auto& factors) {
    double total = 0;
    for (std::size_t i = 0; i < terms.size(); ++i) total += terms[i] * factors[i];
    return total;
  };
  out << "\n## Every cell\n\nMilliseconds, medians of five rounds. Floors are bytes at the measured copy bandwidth. "
         "\"foretold\" is the cost model after learning from all cells of the pair.\n\n| target | kv_len | batch | "
         "way | "
         "kept % | drafts | round | draft | of floor | importance + selection | % of round | verify | of floor | "
         "accept | "
         "rest | foretold | off % | over dense | bound | memory GB |\n"
         "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
  std::size_t close = 0;
  for (const cell& c : file.cells()) {
    double foretold = sum(target_terms(c), target[c.pair].solve());
    if (c.draft_length > 0) foretold += sum(draft_terms(c), draft[c.pair].solve());
    if (has_guide(c.decoding)) foretold += sum(guide_terms(c), guide[c.pair].solve());
    const double off = foretold / c.round_ms - 1;
    close += std::abs(off) <= 0.1;
    const byte_floor floor = floor_of(c);
    const cell* dense = find(file, c, way::dense, 1, c.draft_length);
    out << "| " << c.models().target.name << " | " << c.kv_len << " | " << c.batch << " | " << name_of(c.decoding)
        << " | " << number(100 * (has_guide(c.decoding) ? c.target_rows / c.target_rows_dense : 1.0), 1) << " | "
        << c.draft_length << " | " << number(c.round_ms, 2) << " | " << number(c.draft_ms, 2) << " | "
        << (c.draft_length > 0 ? number(c.draft_ms / floor.draft_ms, 2) : "-") << " | " << number(c.guide_ms, 3)
        << " | " << number(100 * c.guide_share(), 1) << " | " << number(c.verify_ms, 2) << " | "
        << number(c.verify_ms / floor.verify_ms, 2) << " | " << number(c.accept_ms, 3) << " | "
        << number(c.rest_ms(), 3) << " | " << number(foretold, 2) << " | " << number(100 * off, 0) << " | "
        << (has_draft(c.decoding) ? ratio_or_dash(over(&c, dense)) : "-") << " | "
        << (has_draft(c.decoding) ? number(bound_over_dense(c), 2) : "-") << (c.fell_back() ? " fell back" : "")
        << " | " << number(c.memory_gb, 1) << " |\n";
  }
  out << "\nThe cost model is within 10 % of " << close << " of " << file.cells().size() << " rounds.\n";
}

}  // namespace

byte_floor floor_of(const cell& c) {
  const double milliseconds = 1e3 / (1e9 * c.copy_gb_s);
  const llama_size &target = c.models().target, &draft = c.models().draft;
  byte_floor floor;
  floor.draft_ms = milliseconds * (c.draft_steps * draft.weight_bytes() + c.draft_rows * draft.row_bytes());
  floor.verify_ms = milliseconds * (target.weight_bytes() + c.target_rows * target.row_bytes());
  if (has_guide(c.decoding)) {
    const double prefix = 1.0 * c.batch * c.cached;
    const double steps = has_sparse_draft(c.decoding) ? 1 : c.draft_steps;
    // Recorded rows of 16 bits once, importance of 16 bits written and read once, lists written.
    floor.guide_ms = milliseconds * 2 * prefix *
                     (steps * draft.layers * draft.q_heads + target.layers * target.kv_heads * (2 + 2 * c.kept)) /
                     record_every(c.decoding);
  }
  return floor;
}

void write_report(std::ostream& out, const cell_file& file) {
  out << "# Rounds at real model sizes\n\n";
  for (const std::string& run : file.runs()) out << "* " << run << "\n";
  out << "\nMeasured: a round's wall-clock time, host included, with seeded random weights of the models' shapes "
         "made on "
         "the device, and caches of random keys and values. A round runs as one graph: draft steps, recording "
         "of all of them, importance, selection, verify pass, acceptance. Imposed: the kept share, by the top_p that "
         "keeps it, found "
         "by "
         "bisection (random weights attend nearly evenly; a trained model keeps as little at a far higher top_p); "
         "and "
         "acceptance, which enters arithmetically. Not measured here: the loss of text quality at a kept share, "
         "which "
         "needs trained models (see perplexity.md).\n\n";
  write_goals(out, file);
  for (const double acceptance : {0.8, 0.6, 0.7, 0.9}) write_speeds(out, file, acceptance);
  write_cells(out, file);
}

}  // namespace bench
