// What select() must return, by sorting. Plain loops on exact numbers; includes nothing of the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace oracle {

enum class select_rows { unite, mean, max };

/// One group: `rows` of `length` weights (longer rows are cut) and the rule.
struct select_input {
  std::vector<std::vector<float>> rows;
  int length = 0;
  float top_p = 0.95f;
  long long max_tokens = 1LL << 40;
  long long capacity = 1LL << 40;  // entries of the list
  int sinks = 0;
  int recent = 0;
  int page_size = 1;
  select_rows combine = select_rows::unite;
  bool bisection = false;
  bool emit_pages = false;
};

struct select_output {
  std::vector<int> list;
  float mass = 1.0f;
  bool capped = false;
  bool invalid_weight = false;
  bool invalid_rule = false;
};

__extension__ typedef __int128 wide;
using masses = std::vector<std::uint64_t>;
using item_set = std::vector<bool>;

/// The least integer >= p * mass, for 0 < p < 1.
inline std::uint64_t select_target(float p, std::uint64_t mass) {
  int exponent = 0;
  const double fraction = std::frexp(static_cast<double>(p), &exponent);  // p = fraction * 2^exponent
  const wide mantissa = static_cast<wide>(std::ldexp(fraction, 24));
  const int shift = 24 - exponent;
  if (shift > 120) return mass > 0 ? 1 : 0;
  const wide product = mantissa * static_cast<wide>(mass);
  const wide whole = product >> shift;
  return static_cast<std::uint64_t>(whole) + ((whole << shift) != product ? 1 : 0);
}

/// Weights with NaN, infinite and negative ones replaced by zero.
inline std::vector<float> select_clean(const std::vector<float>& row, int length, bool& invalid) {
  std::vector<float> clean(row.begin(), row.begin() + length);
  for (float& w : clean) {
    if (std::isfinite(w) && w >= 0) continue;
    w = 0.0f;
    invalid = true;
  }
  return clean;
}

/// 40 - e where the row's maximum is in [2^e, 2^(e+1)).
inline int select_exponent(const std::vector<float>& row) {
  const float largest = row.empty() ? 0.0f : *std::max_element(row.begin(), row.end());
  return largest > 0 ? 40 - std::ilogb(largest) : 0;
}

inline masses select_masses(const std::vector<float>& row) {
  masses result;
  const int exponent = select_exponent(row);
  for (const float w : row)
    result.push_back(static_cast<std::uint64_t>(std::nearbyint(std::ldexp(static_cast<double>(w), exponent))));
  return result;
}

inline std::uint64_t total_of(const masses& m) { return std::accumulate(m.begin(), m.end(), std::uint64_t{0}); }

/// The row scaled to a sum of 2^48: the scale is one float, every product is rounded to a float, then to an integer.
inline masses select_shares(const std::vector<float>& row) {
  const std::uint64_t total = total_of(select_masses(row));
  masses result(row.size(), 0);
  if (total == 0) return result;
  // A row below 2^-64 counts as multiplied by 2^90.
  const bool tiny = std::ldexp(1.0, 40 - select_exponent(row)) < std::ldexp(1.0, -64);
  const double unit = std::ldexp(1.0, select_exponent(row) + 48 - (tiny ? 90 : 0));
  const float scale = static_cast<float>(unit / static_cast<double>(total));
  for (std::size_t i = 0; i < row.size(); ++i) {
    const float weight = tiny ? static_cast<float>(std::ldexp(static_cast<double>(row[i]), 90)) : row[i];
    const float share = weight * scale;
    result[i] = static_cast<std::uint64_t>(std::nearbyint(static_cast<double>(share)));
  }
  return result;
}

inline masses select_pages(const masses& items, int page_size) {
  masses pages((items.size() + static_cast<std::size_t>(page_size) - 1) / static_cast<std::size_t>(page_size), 0);
  for (std::size_t i = 0; i < items.size(); ++i) pages[i / static_cast<std::size_t>(page_size)] += items[i];
  return pages;
}

/// Items by the order of choice: heavier first, then smaller.
template <class Weight>
std::vector<int> select_order(const std::vector<Weight>& weights) {
  std::vector<int> order(weights.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return weights[static_cast<std::size_t>(a)] > weights[static_cast<std::size_t>(b)];
  });
  return order;
}

inline void add_least_set(const std::vector<int>& order, const masses& mass, const item_set& forced,
                          std::uint64_t target, item_set& kept) {
  std::uint64_t held = 0;
  for (std::size_t i = 0; i < mass.size(); ++i) held += forced[i] ? mass[i] : 0;
  for (const int item : order) {
    const auto i = static_cast<std::size_t>(item);
    if (held >= target) return;
    if (forced[i]) continue;
    held += mass[i];
    kept[i] = true;
  }
}

/// Ten halvings of [0, max]. `Real` holds max * 1024 and every middle exactly (double for weights, wide for masses).
template <class Real, class Weight>
void add_bisected(const std::vector<Weight>& weights, const masses& mass, const item_set& forced,
                  std::uint64_t target, item_set& kept) {
  std::uint64_t forced_mass = 0;
  for (std::size_t i = 0; i < mass.size(); ++i) forced_mass += forced[i] ? mass[i] : 0;
  if (forced_mass >= target) return;
  Real low = 0;
  Real high = static_cast<Real>(*std::max_element(weights.begin(), weights.end())) * 1024;
  const auto reaches = [&](std::size_t i, Real bound) { return static_cast<Real>(weights[i]) * 1024 >= bound; };
  for (int step = 0; step < 10; ++step) {
    const Real middle = (low + high) / 2;
    std::uint64_t held = forced_mass;
    for (std::size_t i = 0; i < mass.size(); ++i) held += !forced[i] && reaches(i, middle) ? mass[i] : 0;
    (held >= target ? low : high) = middle;
  }
  for (std::size_t i = 0; i < mass.size(); ++i)
    if (reaches(i, low)) kept[i] = true;
}

template <class Real, class Weight>
void add_choice(const select_input& in, const std::vector<Weight>& weights, const masses& mass,
                const item_set& forced, item_set& kept) {
  if (in.top_p >= 1) {
    kept.assign(kept.size(), true);
  } else if (in.top_p > 0 && total_of(mass) > 0) {
    const std::uint64_t target = select_target(in.top_p, total_of(mass));
    if (in.bisection)
      add_bisected<Real>(weights, mass, forced, target, kept);
    else
      add_least_set(select_order(weights), mass, forced, target, kept);
  }
}

/// Keeps the first `limit`: forced before others, then as `order` says.
inline void cut_to(std::size_t limit, const std::vector<int>& order, const item_set& forced, item_set& kept) {
  item_set left(kept.size(), false);
  for (const bool turn : {true, false}) {
    for (const int item : order) {
      const auto i = static_cast<std::size_t>(item);
      if (limit == 0 || !kept[i] || forced[i] != turn) continue;
      left[i] = true;
      --limit;
    }
  }
  kept = left;
}

inline select_output select(const select_input& in) {
  select_output out;
  out.invalid_rule = std::isnan(in.top_p);
  const auto page = static_cast<std::size_t>(in.page_size);
  const auto length = static_cast<std::size_t>(in.length);
  const std::size_t items = (length + page - 1) / page;
  item_set forced(items, false);
  for (std::size_t i = 0; i < length; ++i)
    if (i < static_cast<std::size_t>(in.sinks) || i + static_cast<std::size_t>(in.recent) >= length)
      forced[i / page] = true;
  item_set kept = forced;
  masses combined(length, 0);
  std::vector<float> last_row;
  const bool choose_by_row = in.rows.size() == 1 || in.combine == select_rows::unite;
  for (const auto& row : in.rows) {
    last_row = select_clean(row, in.length, out.invalid_weight);
    const masses mass = select_masses(last_row);
    if (choose_by_row && page == 1) add_choice<double>(in, last_row, mass, forced, kept);
    if (choose_by_row && page > 1)
      add_choice<wide>(in, select_pages(mass, in.page_size), select_pages(mass, in.page_size), forced, kept);
    const masses share = in.rows.size() == 1 ? mass : select_shares(last_row);
    for (std::size_t i = 0; i < length; ++i)
      combined[i] = in.combine == select_rows::max ? std::max(combined[i], share[i]) : combined[i] + share[i];
  }
  const masses score = select_pages(combined, in.page_size);
  if (!choose_by_row) add_choice<wide>(in, score, score, forced, kept);

  const auto fits = [&](long long tokens) {
    return tokens >= in.length ? items : static_cast<std::size_t>(tokens / in.page_size);
  };
  std::size_t limit =
      std::min(fits(in.max_tokens), in.emit_pages ? static_cast<std::size_t>(in.capacity) : fits(in.capacity));
  if (static_cast<std::size_t>(std::count(kept.begin(), kept.end(), true)) > limit) {
    out.capped = true;
    const bool by_weight = in.rows.size() == 1 && page == 1;
    cut_to(limit, by_weight ? select_order(last_row) : select_order(score), forced, kept);
  }
  std::uint64_t held = 0;
  for (std::size_t i = 0; i < items; ++i) {
    if (!kept[i]) continue;
    held += score[i];
    if (in.emit_pages) out.list.push_back(static_cast<int>(i));
    for (std::size_t j = i * page; !in.emit_pages && j < std::min((i + 1) * page, length); ++j)
      out.list.push_back(static_cast<int>(j));
  }
  const std::uint64_t total = total_of(score);
  if (total > 0) out.mass = static_cast<float>(static_cast<double>(held) / static_cast<double>(total));
  return out;
}

}  // namespace oracle
