#include "calibrate_report.hpp"

#include <algorithm>
#include <numeric>
#include <ostream>

#include "command_input.hpp"
#include "svg.hpp"

namespace mini_llm {
namespace {

std::size_t at(std::int32_t row, std::int32_t columns, std::int32_t column) {
  return static_cast<std::size_t>(row) * static_cast<std::size_t>(columns) + static_cast<std::size_t>(column);
}

std::vector<std::string> group_names(const specattn::model_fingerprint& target) {
  std::vector<std::string> names;
  for (std::int32_t g = 0; g < target.layers * target.kv_heads; ++g) {
    names.push_back(print("%d.%d", g / target.kv_heads, g % target.kv_heads));
  }
  return names;
}

}  // namespace

double mean_of(const std::vector<float>& values) {
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  return values.empty() ? 0.0 : sum / static_cast<double>(values.size());
}

rule_divergences compare_rules(const specattn::calibration& made) {
  const specattn::alignment& fitted = made.fitted;
  const std::int32_t heads = fitted.signals.draft_heads();
  rule_divergences rules;
  for (std::int32_t g = 0; g < fitted.target.layers * fitted.target.kv_heads; ++g) {
    const std::int32_t mapped = fitted.layer_map[static_cast<std::size_t>(g / fitted.target.kv_heads)];
    rules.layer_map.push_back(made.layer_divergence[at(g, fitted.signals.draft_layers, mapped)]);
    const auto first = made.head_divergence.begin() + std::ptrdiff_t{g} * heads;
    rules.best_head.push_back(*std::min_element(first, first + heads));
  }
  rules.mixture = fitted.mixture_divergence;
  return rules;
}

std::vector<std::string> signal_names(const specattn::signal_set& signals) {
  std::vector<std::string> names;
  for (std::int32_t i = 0; i < signals.draft_heads(); ++i) {
    names.push_back(print("draft %d.%d", i / signals.draft_q_heads, i % signals.draft_q_heads));
  }
  for (const std::int32_t window : signals.windows) names.push_back(print("last %d", window));
  if (signals.sinks > 0) names.push_back("sinks");
  if (signals.history) names.push_back("history");
  return names;
}

void print_calibration(std::ostream& out, const specattn::calibration& made) {
  const specattn::alignment& fitted = made.fitted;
  out << print(
      "Divergence of a draft layer's mean attention from a target layer's, nats (* the monotone map; "
      "%lld blocks)\n\n",
      static_cast<long long>(made.samples));
  out << "| target layer |";
  for (std::int32_t i = 0; i < fitted.draft.layers; ++i) out << print(" draft %d |", i);
  out << "\n|---|" << [&] {
    std::string rule;
    for (std::int32_t i = 0; i < fitted.draft.layers; ++i) rule += "---|";
    return rule;
  }() << '\n';
  for (std::int32_t j = 0; j < fitted.target.layers; ++j) {
    out << print("| %d |", j);
    for (std::int32_t i = 0; i < fitted.draft.layers; ++i) {
      const bool mapped = fitted.layer_map[static_cast<std::size_t>(j)] == i;
      out << print(" %.3f%s |", fitted.divergence[at(j, fitted.draft.layers, i)], mapped ? "*" : "");
    }
    out << '\n';
  }
  const rule_divergences rules = compare_rules(made);
  const std::vector<std::string> names = signal_names(fitted.signals);
  out << "\nWhat each rule leaves, nats\n\n"
         "| layer.kv head | layer map | best head | mixture | its largest signals |\n|---|---|---|---|---|\n";
  for (std::int32_t g = 0; g < fitted.target.layers * fitted.target.kv_heads; ++g) {
    const auto group = static_cast<std::size_t>(g);
    std::vector<std::size_t> order(names.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const float* row = fitted.coefficients.data() + group * names.size();
    std::sort(order.begin(), order.end(), [row](std::size_t a, std::size_t b) { return row[a] > row[b]; });
    std::string largest;
    for (std::size_t i = 0; i < (std::min)(order.size(), std::size_t{3}); ++i) {
      largest += print("%s%s %.2f", i == 0 ? "" : ", ", names[order[i]].c_str(), row[order[i]]);
    }
    out << print("| %d.%d | %.3f | %.3f | %.3f | %s |\n", g / fitted.target.kv_heads, g % fitted.target.kv_heads,
                 rules.layer_map[group], rules.best_head[group], rules.mixture[group], largest.c_str());
  }
  out << print("| mean | %.3f | %.3f | %.3f | |\n", mean_of(rules.layer_map), mean_of(rules.best_head),
               mean_of(rules.mixture));
}

nlohmann::ordered_json to_json(const specattn::calibration& made) {
  const specattn::alignment& fitted = made.fitted;
  const rule_divergences rules = compare_rules(made);
  return {{"samples", made.samples},
          {"iterations", made.iterations},
          {"target", fitted.target.name},
          {"draft", fitted.draft.name},
          {"layer_map", fitted.layer_map},
          {"divergence", fitted.divergence},
          {"mean_divergence",
           {{"layer_map", mean_of(rules.layer_map)},
            {"best_head", mean_of(rules.best_head)},
            {"mixture", mean_of(rules.mixture)}}},
          {"group_divergence",
           {{"layer_map", rules.layer_map}, {"best_head", rules.best_head}, {"mixture", rules.mixture}}},
          {"signals", signal_names(fitted.signals)},
          {"coefficients", fitted.coefficients}};
}

std::string draw_divergence(const specattn::calibration& made) {
  const specattn::alignment& fitted = made.fitted;
  heat_map map;
  map.title = "KL(target || draft), nats; framed: the monotone layer map";
  map.row_label = "target layer";
  map.column_label = "draft layer";
  for (std::int32_t j = 0; j < fitted.target.layers; ++j) {
    map.rows.push_back(std::to_string(j));
    map.marked.emplace_back(j, fitted.layer_map[static_cast<std::size_t>(j)]);
  }
  for (std::int32_t i = 0; i < fitted.draft.layers; ++i) map.columns.push_back(std::to_string(i));
  map.values.assign(fitted.divergence.begin(), fitted.divergence.end());
  return draw(map);
}

std::string draw_mixtures(const specattn::calibration& made) {
  heat_map map;
  map.title = "Mixture of signals for each target head";
  map.row_label = "target layer.kv head";
  map.column_label = "";
  map.rows = group_names(made.fitted.target);
  map.columns = signal_names(made.fitted.signals);
  map.values.assign(made.fitted.coefficients.begin(), made.fitted.coefficients.end());
  map.blank_zeros = true;
  return draw(map);
}

}  // namespace mini_llm
