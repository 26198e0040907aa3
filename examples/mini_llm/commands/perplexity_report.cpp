#include "perplexity_report.hpp"

#include <algorithm>
#include <cmath>
#include <ostream>

#include "svg.hpp"

namespace mini_llm {
namespace {

/// The guides of a result in the order of their first points, dense apart.
std::vector<guide_kind> guides_of(const context_result& result) {
  std::vector<guide_kind> kinds;
  for (const point_result& point : result.points) {
    if (point.point.kind == guide_kind::none) continue;
    if (std::find(kinds.begin(), kinds.end(), point.point.kind) == kinds.end()) kinds.push_back(point.point.kind);
  }
  return kinds;
}

void print_interpolated(std::ostream& out, const context_result& result) {
  out << "\n| rise % at a reduction of |";
  for (const double reduction : compared_reductions) out << print(" %g %% |", reduction);
  out << "\n|---|";
  for ([[maybe_unused]] const double reduction : compared_reductions) out << "---|";
  out << '\n';
  for (const guide_kind kind : guides_of(result)) {
    out << "| " << name_of(kind) << " |";
    for (const double reduction : compared_reductions) {
      const double rise = rise_at(result, kind, reduction);
      out << (std::isnan(rise) ? std::string(" – |") : print(" %+.2f |", rise));
    }
    out << '\n';
  }
}

}  // namespace

void print_table(std::ostream& out, const context_result& result) {
  const point_result& dense = result.dense();
  out << print("%d tokens, %zu texts, %lld tokens scored\n\n", result.context, result.texts.size(),
               static_cast<long long>(dense.tokens))
      << "| guide | perplexity | ± | rise % | ± | mean of the texts' rises % | KV reduction % | seconds |\n"
         "|---|---|---|---|---|---|---|---|\n";
  for (const point_result& point : result.points) {
    const double perplexity = perplexity_of(point);
    out << print("| %s | %.3f | %.3f |", point.point.label().c_str(), perplexity, perplexity * point.standard_error);
    if (&point == &dense) {
      out << print(" – | – | – | – | %.1f |\n", point.seconds);
    } else {
      const double rise = rise_percent(point, dense);
      out << print(" %+.2f | %.2f | %+.2f | %.1f | %.1f |\n", rise, (100 + rise) * point.rise_error,
                   mean_text_rise_percent(point, dense), reduction_percent(point), point.seconds);
    }
  }
  print_interpolated(out, result);
  out << '\n';
}

nlohmann::ordered_json to_json(const std::vector<context_result>& results) {
  nlohmann::ordered_json all = nlohmann::ordered_json::array();
  for (const context_result& result : results) {
    nlohmann::ordered_json points = nlohmann::ordered_json::array();
    for (const point_result& point : result.points) {
      points.push_back({{"guide", name_of(point.point.kind)},
                        {"setting", point.point.setting},
                        {"perplexity", perplexity_of(point)},
                        {"nll", point.nll},
                        {"nll_standard_error", point.standard_error},
                        {"rise_percent", rise_percent(point, result.dense())},
                        {"mean_text_rise_percent", mean_text_rise_percent(point, result.dense())},
                        {"nll_rise_standard_error", point.rise_error},
                        {"reduction_percent", reduction_percent(point)},
                        {"kv_rows_read", point.counts.kv_rows_read},
                        {"kv_rows_dense", point.counts.kv_rows_dense},
                        {"text_nll", point.text_nll},
                        {"seconds", point.seconds}});
    }
    nlohmann::ordered_json compared = nlohmann::ordered_json::object();
    for (const guide_kind kind : guides_of(result)) {
      for (const double reduction : compared_reductions) {
        const double rise = rise_at(result, kind, reduction);
        if (!std::isnan(rise)) compared[std::string(name_of(kind))][print("%g", reduction)] = rise;
      }
    }
    all.push_back({{"context", result.context},
                   {"texts", result.texts},
                   {"tokens", result.dense().tokens},
                   {"points", points},
                   {"rise_at_reduction", compared}});
  }
  return all;
}

std::string draw_results(const std::vector<context_result>& results) {
  line_chart chart;
  chart.title = "Perplexity's rise by what is not read";
  chart.x = {"KV rows not read, %", axis_scale::linear, std::nullopt, 100.0};
  chart.y = {"rise over dense, %", axis_scale::logarithmic, 0.1, std::nullopt};
  for (const context_result& result : results) {
    for (const guide_kind kind : guides_of(result)) {
      chart_series series;
      series.label = std::string(name_of(kind)) + (results.size() > 1 ? print(" %d", result.context) : std::string());
      for (const point_result& point : result.points) {
        if (point.point.kind != kind) continue;
        series.points.emplace_back(reduction_percent(point), rise_percent(point, result.dense()));
      }
      std::sort(series.points.begin(), series.points.end());
      chart.series.push_back(std::move(series));
    }
  }
  return draw(chart);
}

}  // namespace mini_llm
