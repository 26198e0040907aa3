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
    std::string guarantee;  ///< what its text is worth
    run_result best;        ///< at its best draft length
    std::vector<run_result> tried;
  };
  std::vector<system> systems;  ///< autoregressive, dense speculation, dense with a sparse draft, guided
};

/// Decodes `request` with every system, draft lengths 1 … 8, three times each (the median by decode time counts).
/// Prompts are prefilled once for the dense systems and once for the guided one.
comparison compare_systems(const session& made, const specattn::decode_request& request);

void print_comparison(std::ostream& out, const comparison& table);
nlohmann::json to_json(const comparison& table);

}  // namespace mini_llm
