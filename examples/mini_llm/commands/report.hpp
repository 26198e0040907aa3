// What a run measured, as lines for people and as JSON for programs.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "specattn/decode_options.hpp"

namespace mini_llm {

struct run_result {
  std::int32_t prompt_tokens = 0;
  double prefill_seconds = 0;
  double decode_seconds = 0;
  std::int32_t draft_length = 0;
  specattn::decode_counts counts;
  specattn::round_trace trace;  ///< of all rounds together
  specattn::finish_reason finish = specattn::finish_reason::running;

  double tokens_per_second() const;
  double acceptance() const;      ///< accepted / proposed; 0 where nothing was proposed
  double tokens_a_round() const;  ///< emitted / rounds; 0 where there was none
  double rows_saved() const;      ///< share of KV rows not read; 0 where none were due
  double guide_share() const;     ///< of the rounds' time
};

std::string_view name_of(specattn::finish_reason reason);

/// The closing lines, in llama.cpp's words where it has them.
void print_report(std::ostream& out, const run_result& result);

/// `timings` has the names llama-server gives them; draft fields are absent when nothing was drafted.
nlohmann::json to_json(const run_result& result);

/// Largest resident size of this process so far, in bytes; 0 where the system does not tell.
std::size_t peak_resident_bytes();

}  // namespace mini_llm
