#include "report.hpp"

#include <sys/resource.h>

#include <iomanip>
#include <ostream>
#include <sstream>

namespace mini_llm {
namespace {

double ratio(double part, double whole) { return whole > 0 ? part / whole : 0.0; }

std::string fixed(double value, int digits) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(digits) << value;
  return text.str();
}

void print_rate(std::ostream& out, const char* name, double seconds, std::int64_t tokens) {
  out << std::left << std::setw(18) << name << "= " << std::right << std::setw(10) << fixed(seconds * 1e3, 2)
      << " ms / " << std::setw(5) << tokens << " tokens (" << std::setw(8)
      << fixed(ratio(seconds * 1e3, static_cast<double>(tokens)), 3) << " ms per token, " << std::setw(9)
      << fixed(ratio(static_cast<double>(tokens), seconds), 2) << " tokens per second)\n";
}

void print_share(std::ostream& out, const char* name, double seconds, double all) {
  out << "  " << name << ' ' << fixed(seconds * 1e3, 1) << " ms (" << fixed(100 * ratio(seconds, all), 1) << " %)";
}

}  // namespace

double run_result::tokens_per_second() const { return ratio(static_cast<double>(counts.emitted), decode_seconds); }
double run_result::acceptance() const {
  return ratio(static_cast<double>(counts.accepted), static_cast<double>(counts.proposed));
}
double run_result::tokens_a_round() const {
  return ratio(static_cast<double>(counts.emitted), static_cast<double>(counts.rounds));
}
double run_result::rows_saved() const {
  if (counts.kv_rows_dense == 0) return 0.0;
  return 1.0 - static_cast<double>(counts.kv_rows_read) / static_cast<double>(counts.kv_rows_dense);
}
double run_result::guide_share() const { return ratio(trace.guide_seconds, trace.seconds()); }

std::string_view name_of(specattn::finish_reason reason) {
  switch (reason) {
    case specattn::finish_reason::running:
      return "running";
    case specattn::finish_reason::stop_token:
      return "stop token";
    case specattn::finish_reason::length:
      return "length";
    case specattn::finish_reason::context_full:
      return "context full";
    case specattn::finish_reason::cancelled:
      break;
  }
  return "cancelled";
}

void print_report(std::ostream& out, const run_result& result) {
  const specattn::decode_counts& c = result.counts;
  print_rate(out, "prompt eval time", result.prefill_seconds, result.prompt_tokens - 1);
  print_rate(out, "eval time", result.decode_seconds, c.emitted);
  if (c.proposed > 0) {
    out << "draft acceptance  = " << fixed(result.acceptance(), 5) << " ( " << c.accepted << " accepted / "
        << c.proposed << " generated ), mean length " << fixed(result.tokens_a_round(), 2) << " tokens a round over "
        << c.rounds << " rounds\n";
    out << "accepted at       =";
    for (std::int32_t i = 0; i < result.draft_length; ++i) {
      out << ' '
          << fixed(ratio(static_cast<double>(c.accepted_at[static_cast<std::size_t>(i)]),
                         static_cast<double>(c.rounds)),
                   3);
    }
    out << '\n';
  }
  out << "KV rows read      = " << c.kv_rows_read << " of " << c.kv_rows_dense << " a dense pass would read ("
      << fixed(100 * result.rows_saved(), 1) << " % fewer), " << c.dense_rounds << " of " << c.rounds
      << " rounds dense, " << c.refreshed << " refreshed\n";
  if (c.draft_rows_dense > 0) {
    out << "draft rows read   = " << c.draft_rows_read << " of " << c.draft_rows_dense << '\n';
  }
  out << "round time        =";
  const double all = result.trace.seconds();
  print_share(out, "draft", result.trace.draft_seconds, all);
  print_share(out, "importance and selection", result.trace.guide_seconds, all);
  print_share(out, "verify", result.trace.verify_seconds, all);
  print_share(out, "accept", result.trace.accept_seconds, all);
  out << '\n' << "finished          = " << name_of(result.finish) << '\n';
}

nlohmann::json to_json(const run_result& result) {
  const specattn::decode_counts& c = result.counts;
  const double prompt_ms = result.prefill_seconds * 1e3;
  const double predicted_ms = result.decode_seconds * 1e3;
  const auto prompt_n = static_cast<double>(result.prompt_tokens);
  const auto predicted_n = static_cast<double>(c.emitted);
  nlohmann::json timings{{"cache_n", 0},
                         {"prompt_n", result.prompt_tokens},
                         {"prompt_ms", prompt_ms},
                         {"prompt_per_token_ms", ratio(prompt_ms, prompt_n)},
                         {"prompt_per_second", ratio(prompt_n, result.prefill_seconds)},
                         {"predicted_n", c.emitted},
                         {"predicted_ms", predicted_ms},
                         {"predicted_per_token_ms", ratio(predicted_ms, predicted_n)},
                         {"predicted_per_second", ratio(predicted_n, result.decode_seconds)}};
  if (c.proposed > 0) {
    timings["draft_n"] = c.proposed;
    timings["draft_n_accepted"] = c.accepted;
    timings["draft_n_verif_steps"] = c.rounds;
  }
  return {{"timings", timings},
          {"draft_length", result.draft_length},
          {"counts",
           {{"rounds", c.rounds},
            {"dense_rounds", c.dense_rounds},
            {"refreshed", c.refreshed},
            {"draft_failures", c.draft_failures},
            {"proposed", c.proposed},
            {"accepted", c.accepted},
            {"corrected", c.corrected},
            {"bonus", c.bonus},
            {"emitted", c.emitted},
            {"discarded", c.discarded},
            {"kv_rows_read", c.kv_rows_read},
            {"kv_rows_dense", c.kv_rows_dense},
            {"draft_rows_read", c.draft_rows_read},
            {"draft_rows_dense", c.draft_rows_dense}}},
          {"kv_rows_saved", result.rows_saved()},
          {"round_seconds",
           {{"draft", result.trace.draft_seconds},
            {"guide", result.trace.guide_seconds},
            {"verify", result.trace.verify_seconds},
            {"accept", result.trace.accept_seconds}}},
          {"finish", name_of(result.finish)}};
}

std::size_t peak_resident_bytes() {
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
  return static_cast<std::size_t>(usage.ru_maxrss) * 1024;
}

}  // namespace mini_llm
