// Perplexities as a markdown table, as JSON and as a picture.
#pragma once

#include <iosfwd>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "perplexity.hpp"

namespace mini_llm {

/// Reductions at which guides are compared, percent.
inline constexpr double compared_reductions[] = {65, 78, 90};

void print_table(std::ostream& out, const context_result& result);
nlohmann::ordered_json to_json(const std::vector<context_result>& results);
/// Rise against reduction, one line a guide and context.
std::string draw_results(const std::vector<context_result>& results);

}  // namespace mini_llm
