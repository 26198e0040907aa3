#include "svg.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>

#include "specattn/error.hpp"

namespace mini_llm {
namespace {

constexpr const char* ink = "#1f2933";
constexpr const char* faint = "#dfe3e8";
// Distinguishable without seeing red and green apart (Okabe and Ito's palette, darkened for white paper).
constexpr std::array<const char*, 8> palette{"#0072b2", "#d55e00", "#009e73", "#cc3399",
                                             "#b8860b", "#56a0d3", "#6b4fa0", "#444444"};

std::string number(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

/// A tick's text: no more digits than it needs.
std::string short_number(double value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.6g", std::abs(value) < 1e-12 ? 0.0 : value);
  return text;
}

std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

/// Collects elements; coordinates are pixels.
class canvas {
 public:
  canvas(double width, double height) {
    out_ = "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " + number(width, 0) + " " + number(height, 0) +
           "\" width=\"" + number(width, 0) + "\" height=\"" + number(height, 0) +
           "\" font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\" font-size=\"13\">\n";
    rectangle(0, 0, width, height, "#ffffff");
  }
  void rectangle(double x, double y, double width, double height, std::string_view fill,
                 std::string_view stroke = "none", double stroke_width = 1) {
    out_ += "<rect x=\"" + number(x, 1) + "\" y=\"" + number(y, 1) + "\" width=\"" + number(width, 1) +
            "\" height=\"" + number(height, 1) + "\" fill=\"" + std::string(fill) + "\"";
    if (stroke != "none") {
      out_ += " stroke=\"" + std::string(stroke) + "\" stroke-width=\"" + number(stroke_width, 1) + "\"";
    }
    out_ += "/>\n";
  }
  void line(double x0, double y0, double x1, double y1, std::string_view stroke) {
    out_ += "<line x1=\"" + number(x0, 1) + "\" y1=\"" + number(y0, 1) + "\" x2=\"" + number(x1, 1) + "\" y2=\"" +
            number(y1, 1) + "\" stroke=\"" + std::string(stroke) + "\"/>\n";
  }
  void text(double x, double y, std::string_view words, std::string_view anchor, std::string_view more = {}) {
    out_ += "<text x=\"" + number(x, 1) + "\" y=\"" + number(y, 1) + "\" text-anchor=\"" + std::string(anchor) +
            "\" " + (more.find("fill=") == more.npos ? "fill=\"" + std::string(ink) + "\" " : std::string()) +
            std::string(more) + ">" + escaped(words) + "</text>\n";
  }
  void path(const std::vector<std::pair<double, double>>& points, std::string_view colour) {
    if (points.size() > 1) {
      out_ += "<polyline fill=\"none\" stroke-width=\"2\" stroke-linejoin=\"round\" stroke=\"" + std::string(colour) +
              "\" points=\"";
      for (const auto& [x, y] : points) out_ += number(x, 1) + "," + number(y, 1) + " ";
      out_ += "\"/>\n";
    }
    for (const auto& [x, y] : points) {
      out_ += "<circle r=\"3.2\" cx=\"" + number(x, 1) + "\" cy=\"" + number(y, 1) + "\" fill=\"" +
              std::string(colour) + "\"/>\n";
    }
  }
  std::string finish() { return std::move(out_) + "</svg>\n"; }

 private:
  std::string out_;
};

/// Maps an axis's values to pixels.
struct scaled_axis {
  axis_scale scale;
  double low, high, first_pixel, last_pixel;

  bool holds(double value) const {
    return std::isfinite(value) && value >= low && value <= high && (scale == axis_scale::linear || value > 0);
  }
  double pixel(double value) const {
    const bool log = scale == axis_scale::logarithmic;
    const double from = log ? std::log(low) : low;
    const double to = log ? std::log(high) : high;
    return first_pixel + ((log ? std::log(value) : value) - from) / (to - from) * (last_pixel - first_pixel);
  }
};

scaled_axis fit_axis(const chart_axis& axis, const std::vector<chart_series>& series, bool is_x, double first_pixel,
                     double last_pixel) {
  double low = std::numeric_limits<double>::infinity();
  double high = -low;
  for (const chart_series& one : series) {
    for (const auto& [x, y] : one.points) {
      const double value = is_x ? x : y;
      if (!std::isfinite(value) || (axis.scale == axis_scale::logarithmic && value <= 0)) continue;
      low = (std::min)(low, value);
      high = (std::max)(high, value);
    }
  }
  if (low > high) low = axis.scale == axis_scale::linear ? 0 : 1, high = low + 1;
  const double margin = axis.scale == axis_scale::linear ? 0.04 * (high - low) : 0;
  low = axis.low.value_or(axis.scale == axis_scale::linear ? low - margin : low / 1.1);
  high = axis.high.value_or(axis.scale == axis_scale::linear ? high + margin : high * 1.1);
  if (!(high > low)) high = low + (std::max)(1e-6, std::abs(low) * 0.1);
  return {axis.scale, low, high, first_pixel, last_pixel};
}

struct frame {
  double left = 70, right = 610, top = 48, bottom = 400;
};

void draw_axes(canvas& out, const frame& area, const line_chart& chart, const scaled_axis& x, const scaled_axis& y) {
  for (const double tick : axis_ticks(x.low, x.high, x.scale)) {
    out.line(x.pixel(tick), area.top, x.pixel(tick), area.bottom, faint);
    out.text(x.pixel(tick), area.bottom + 18, short_number(tick), "middle");
  }
  for (const double tick : axis_ticks(y.low, y.high, y.scale)) {
    out.line(area.left, y.pixel(tick), area.right, y.pixel(tick), faint);
    out.text(area.left - 8, y.pixel(tick) + 4.5, short_number(tick), "end");
  }
  out.rectangle(area.left, area.top, area.right - area.left, area.bottom - area.top, "none", ink);
  out.text((area.left + area.right) / 2, area.bottom + 42, chart.x.label, "middle");
  const double middle = (area.top + area.bottom) / 2;
  out.text(18, middle, chart.y.label, "middle", "transform=\"rotate(-90 18 " + number(middle, 1) + ")\"");
  out.text(area.left, 28, chart.title, "start", "font-size=\"16\" font-weight=\"bold\"");
}

/// White to deep blue by `share` in [0, 1].
std::string shade(double share) {
  static constexpr std::array<std::array<double, 3>, 4> stops{
      {{255, 255, 255}, {189, 215, 231}, {66, 146, 198}, {8, 48, 107}}};
  const double at = std::clamp(share, 0.0, 1.0) * 3;
  const auto from = (std::min)(static_cast<std::size_t>(at), std::size_t{2});
  const double part = at - static_cast<double>(from);
  char text[8];
  std::array<int, 3> rgb{};
  for (std::size_t i = 0; i < 3; ++i) {
    rgb[i] = static_cast<int>(std::lround(stops[from][i] + part * (stops[from + 1][i] - stops[from][i])));
  }
  std::snprintf(text, sizeof text, "#%02x%02x%02x", static_cast<unsigned>(rgb[0]) & 255u,
                static_cast<unsigned>(rgb[1]) & 255u, static_cast<unsigned>(rgb[2]) & 255u);
  return text;
}

std::size_t longest(const std::vector<std::string>& words) {
  std::size_t length = 0;
  for (const std::string& word : words) length = (std::max)(length, word.size());
  return length;
}

}  // namespace

std::vector<double> axis_ticks(double low, double high, axis_scale scale, int count) {
  std::vector<double> ticks;
  if (scale == axis_scale::logarithmic) {
    const bool wide = std::log10(high / low) > 3;
    for (double power = std::pow(10, std::floor(std::log10(low))); power <= high; power *= 10) {
      for (const double factor : {1.0, 2.0, 5.0}) {
        if (wide && factor > 1) continue;
        if (power * factor >= low && power * factor <= high) ticks.push_back(power * factor);
      }
    }
    return ticks;
  }
  const double rough = (high - low) / count;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (power * factor >= rough) {
      step = power * factor;
      break;
    }
  }
  const double first = std::ceil(low / step - 1e-9);
  for (int i = 0; (first + i) * step <= high + 1e-9 * step; ++i) ticks.push_back((first + i) * step);
  return ticks;
}

std::string draw(const line_chart& chart) {
  const frame area;
  canvas out(790, 460);
  const scaled_axis x = fit_axis(chart.x, chart.series, true, area.left, area.right);
  const scaled_axis y = fit_axis(chart.y, chart.series, false, area.bottom, area.top);
  draw_axes(out, area, chart, x, y);
  double legend = area.top + 12;
  for (std::size_t i = 0; i < chart.series.size(); ++i) {
    const char* colour = palette[i % palette.size()];
    std::vector<std::pair<double, double>> pixels;
    for (const auto& [px, py] : chart.series[i].points) {
      if (x.holds(px) && y.holds(py)) pixels.emplace_back(x.pixel(px), y.pixel(py));
    }
    out.path(pixels, colour);
    out.path({{area.right + 16, legend}, {area.right + 40, legend}}, colour);
    out.text(area.right + 48, legend + 4.5, chart.series[i].label, "start");
    legend += 22;
  }
  return out.finish();
}

std::string draw(const heat_map& map) {
  specattn::detail::expects(map.values.size() == map.rows.size() * map.columns.size(),
                            "heat map: ", map.values.size(), " values for ", map.rows.size(), " × ",
                            map.columns.size(), " cells");
  const double cell = 46, height = 26;
  const double left = 44 + 7.5 * static_cast<double>(longest(map.rows));
  const bool slanted = longest(map.columns) > 5;
  const double top = 66 + (slanted ? 4.6 * static_cast<double>(longest(map.columns)) : 12);
  const auto columns = static_cast<double>(map.columns.size());
  const auto rows = static_cast<double>(map.rows.size());
  const double title_width = 30 + 9.0 * static_cast<double>(map.title.size());
  canvas out((std::max)(left + columns * cell + 40, title_width), top + rows * height + 24);
  out.text(16, 28, map.title, "start", "font-size=\"16\" font-weight=\"bold\"");
  out.text(left + columns * cell / 2, 50, map.column_label, "middle");
  const double middle = top + rows * height / 2;
  out.text(18, middle, map.row_label, "middle", "transform=\"rotate(-90 18 " + number(middle, 1) + ")\"");
  const double high = map.values.empty() ? 1 : *std::max_element(map.values.begin(), map.values.end());
  for (std::size_t c = 0; c < map.columns.size(); ++c) {
    const double x = left + (static_cast<double>(c) + 0.5) * cell;
    const std::string turn = "transform=\"rotate(-40 " + number(x, 1) + " " + number(top - 8, 1) + ")\"";
    out.text(x, top - 8, map.columns[c], slanted ? "start" : "middle", slanted ? turn : std::string());
  }
  for (std::size_t r = 0; r < map.rows.size(); ++r) {
    const double y = top + static_cast<double>(r) * height;
    out.text(left - 8, y + height / 2 + 4.5, map.rows[r], "end");
    for (std::size_t c = 0; c < map.columns.size(); ++c) {
      const double value = map.values[r * map.columns.size() + c];
      const double share = high > 0 ? value / high : 0;
      const double x = left + static_cast<double>(c) * cell;
      out.rectangle(x, y, cell - 1, height - 1, shade(share), faint);
      if (map.blank_zeros && value < 0.5 * std::pow(10, -map.digits)) continue;
      out.text(x + cell / 2, y + height / 2 + 4, number(value, map.digits), "middle",
               share > 0.55 ? "font-size=\"12\" fill=\"#ffffff\"" : "font-size=\"12\"");
    }
  }
  for (const auto& [r, c] : map.marked) {
    out.rectangle(left + static_cast<double>(c) * cell, top + static_cast<double>(r) * height, cell - 1, height - 1,
                  "none", palette[1], 2.6);
  }
  return out.finish();
}

}  // namespace mini_llm
