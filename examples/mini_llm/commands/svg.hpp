// Pictures as SVG text: line charts and heat maps.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mini_llm {

enum class axis_scale { linear, logarithmic };

struct chart_axis {
  std::string label;
  axis_scale scale = axis_scale::linear;
  std::optional<double> low{};   ///< empty: from the data
  std::optional<double> high{};  ///< empty: from the data
};

/// Points joined in the order given. Points outside the axes, or not finite, are left out.
struct chart_series {
  std::string label;
  std::vector<std::pair<double, double>> points;
};

struct line_chart {
  std::string title;
  chart_axis x, y;
  std::vector<chart_series> series;
};

/// Values in cells, a colour and a number each; marked cells get a frame.
struct heat_map {
  std::string title;
  std::string row_label, column_label;
  std::vector<std::string> rows, columns;
  std::vector<double> values;                               ///< [rows, columns]
  std::vector<std::pair<std::size_t, std::size_t>> marked;  ///< (row, column)
  int digits = 2;                                           ///< after the point
  bool blank_zeros = false;                                 ///< cells that would read 0.00 hold no number
};

/// An SVG document, ending in a newline. \throws contract_error when sizes do not fit
std::string draw(const line_chart& chart);
std::string draw(const heat_map& map);

/// Round values that divide [low, high] into about `count` steps; powers of ten and their 2 and 5 on a log axis.
std::vector<double> axis_ticks(double low, double high, axis_scale scale, int count = 6);

}  // namespace mini_llm
