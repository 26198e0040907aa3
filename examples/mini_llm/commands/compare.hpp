// The same prompt through autoregressive, dense speculative and guided decoding, each at its own best draft length.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "report.hpp"
#include "session.hpp"
#include "specattn/decode_options.hpp"

namespace mini_llm {

struct comparison {
  struct system {
    std::string name;
    std::string guarantee;           ///< what its text is worth
    std::int32_t shortest, longest;  ///< draft lengths to try
    run_result best;                 ///< at its best draft length, all texts together
    std::vector<run_result> tried;   ///< each draft length on the first text
  };
  /// What the adaptive run's cost model says of a guided round of fixed length, and what such rounds took.
  struct prediction {
    std::int32_t draft_length;
    double predicted_seconds, measured_seconds;
  };
  static constexpr int texts = 5;
  static constexpr std::int32_t longest_draft = 8;  ///< that a system tries
  std::vector<system> systems;  ///< autoregressive, dense speculation, dense with a sparse draft, guided, adaptive
  std::vector<prediction> predictions;
};

/// Finds each system's best draft length on the first text (1 … 8, three runs each, the median by decode time), then
/// lets the systems take turns over five texts, seeds seed … seed + 4. Each system prefills the prompt once.
comparison compare_systems(const session& made, const specattn::decode_request& request);

void print_comparison(std::ostream& out, const comparison& table);
nlohmann::json to_json(const comparison& table);

}  // namespace mini_llm
