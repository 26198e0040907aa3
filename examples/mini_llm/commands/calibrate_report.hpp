// A calibration as a table, as JSON and as pictures.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "specattn/cpu/calibrate.hpp"

namespace mini_llm {

/// Nats that three rules leave between the target's attention and what guides it, by (layer, kv head).
struct rule_divergences {
  std::vector<float> layer_map;  ///< [target layers, kv_heads] the paper's: mean heads of the mapped draft layer
  std::vector<float> best_head;  ///< [target layers, kv_heads] the nearest single draft head
  std::vector<float> mixture;    ///< [target layers, kv_heads] the fit
};

rule_divergences compare_rules(const specattn::calibration& made);
double mean_of(const std::vector<float>& values);

/// Names of an alignment's signals, in their order: "draft 0.1", "window 16", "sinks", "history".
std::vector<std::string> signal_names(const specattn::signal_set& signals);

void print_calibration(std::ostream& out, const specattn::calibration& made);
nlohmann::ordered_json to_json(const specattn::calibration& made);

/// Target layer × draft layer, the layer map framed.
std::string draw_divergence(const specattn::calibration& made);
/// Coefficients of every (layer, kv head) × signal.
std::string draw_mixtures(const specattn::calibration& made);

}  // namespace mini_llm
