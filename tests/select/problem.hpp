// A selection on host data: what the tests of every backend state, solve and compare with the oracle.
#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "oracle/select_oracle.hpp"
#include "specattn/select.hpp"

namespace select_testing {

constexpr std::int32_t unlimited = std::numeric_limits<std::int32_t>::max();
constexpr std::int32_t stale = 0x5a5a5a5a;  // what the output holds before a call

/// Everything forced off: the bare rule.
inline specattn::selection_rule bare(float top_p) {
  specattn::selection_rule rule;
  rule.top_p = top_p;
  rule.sinks = 0;
  rule.recent = 0;
  return rule;
}

template <specattn::storage T>
struct problem {
  std::ptrdiff_t groups = 1;
  std::ptrdiff_t rows = 1;
  std::ptrdiff_t kv_len = 0;
  std::vector<T> memory;  // the weights, somewhere in it
  std::ptrdiff_t offset = 0;
  std::ptrdiff_t strides[3] = {0, 0, 1};
  std::vector<std::int32_t> kv_lens;
  std::vector<float> top_p;
  specattn::selection_rule rule;
  std::ptrdiff_t capacity = 0;
  bool wants_mass = true;

  T& at(std::ptrdiff_t g, std::ptrdiff_t r, std::ptrdiff_t i) {
    return memory[static_cast<std::size_t>(offset + g * strides[0] + r * strides[1] + i * strides[2])];
  }
  const T& at(std::ptrdiff_t g, std::ptrdiff_t r, std::ptrdiff_t i) const {
    return const_cast<problem*>(this)->at(g, r, i);
  }
  std::int32_t length(std::ptrdiff_t g) const {
    return kv_lens.empty() ? static_cast<std::int32_t>(kv_len) : kv_lens[static_cast<std::size_t>(g)];
  }
};

template <specattn::storage T>
problem<T> dense_problem(std::ptrdiff_t groups, std::ptrdiff_t rows, std::ptrdiff_t kv_len,
                         const specattn::selection_rule& rule) {
  problem<T> p;
  p.groups = groups;
  p.rows = rows;
  p.kv_len = kv_len;
  p.rule = rule;
  p.strides[0] = rows * kv_len;
  p.strides[1] = kv_len;
  p.memory.resize(static_cast<std::size_t>(groups * rows * kv_len));
  p.capacity = kv_len;
  return p;
}

/// One row of the given weights.
inline problem<float> row_problem(const std::vector<float>& row, const specattn::selection_rule& rule) {
  problem<float> p = dense_problem<float>(1, 1, static_cast<std::ptrdiff_t>(row.size()), rule);
  p.memory = row;
  return p;
}

struct answer {
  std::vector<std::int32_t> positions;  // [groups, capacity]
  std::vector<std::int32_t> counts;
  std::vector<float> mass;
  std::vector<std::uint32_t> status;
  std::ptrdiff_t capacity = 0;

  std::vector<int> list(std::ptrdiff_t g) const {
    const auto begin = positions.begin() + g * capacity;
    return {begin, begin + counts[static_cast<std::size_t>(g)]};
  }
};

template <class Fixture, specattn::storage T>
answer solve(Fixture& fixture, const problem<T>& p) {
  using backend = typename Fixture::backend;
  const auto memory = fixture.upload(p.memory);
  const auto kv_lens = fixture.upload(p.kv_lens);
  const auto top_p = fixture.upload(p.top_p);
  const auto groups = static_cast<std::size_t>(p.groups);
  const auto positions =
      fixture.upload(std::vector<std::int32_t>(groups * static_cast<std::size_t>(p.capacity), stale));
  const auto counts = fixture.upload(std::vector<std::int32_t>(groups, stale));
  const auto mass = fixture.upload(std::vector<float>(groups, -1.0f));
  const auto status = fixture.upload(std::vector<std::uint32_t>(groups, 0x80000000u));

  specattn::weight_rows<T, backend> from;
  from.weights = {memory.data() + p.offset, {p.groups, p.rows, p.kv_len}, {p.strides[0], p.strides[1], p.strides[2]}};
  if (!p.kv_lens.empty()) from.kv_lens = {kv_lens.data(), {p.groups}};
  if (!p.top_p.empty()) from.top_p = {top_p.data(), {p.groups}};
  specattn::selection_view<backend> out;
  out.positions = {positions.data(), {p.groups, p.capacity}};
  out.counts = {counts.data(), {p.groups}};
  if (p.wants_mass) out.mass = {mass.data(), {p.groups}};
  out.status = {status.data(), {p.groups}};

  auto& context = fixture.context();
  context.reserve_workspace(specattn::select_workspace_bytes(context, p.groups, p.rows, p.kv_len, p.rule));
  fixture.soil_workspace();
  specattn::select(context, from, p.rule, out);
  return {fixture.download(positions), fixture.download(counts), fixture.download(mass), fixture.download(status),
          p.capacity};
}

template <specattn::storage T>
oracle::select_output expected(const problem<T>& p, std::ptrdiff_t g) {
  oracle::select_input in;
  in.length = p.length(g);
  for (std::ptrdiff_t r = 0; r < p.rows; ++r) {
    std::vector<float> row;
    for (std::int32_t i = 0; i < in.length; ++i) row.push_back(specattn::to_float(p.at(g, r, i)));
    in.rows.push_back(std::move(row));
  }
  in.top_p = p.top_p.empty() ? p.rule.top_p : p.top_p[static_cast<std::size_t>(g)];
  in.max_tokens = p.rule.max_tokens;
  in.capacity = p.capacity;
  in.sinks = p.rule.sinks;
  in.recent = p.rule.recent;
  in.page_size = p.rule.page_size;
  in.combine = p.rule.rows == specattn::combine::unite  ? oracle::select_rows::unite
               : p.rule.rows == specattn::combine::mean ? oracle::select_rows::mean
                                                        : oracle::select_rows::max;
  in.bisection = p.rule.method == specattn::threshold_method::bisection;
  in.emit_pages = p.rule.output == specattn::emit::pages;
  return oracle::select(in);
}

inline std::uint32_t expected_status(const oracle::select_output& want) {
  return (want.capped ? specattn::selection_capped : 0u) |
         (want.invalid_weight ? specattn::selection_invalid_weight : 0u) |
         (want.invalid_rule ? specattn::selection_invalid_rule : 0u);
}

/// The first difference between a group's answer and the oracle's, or "".
template <specattn::storage T>
std::string difference(const problem<T>& p, const answer& got, std::ptrdiff_t g) {
  const oracle::select_output want = expected(p, g);
  const auto at = static_cast<std::size_t>(g);
  const std::string where = "group " + std::to_string(g) + " of kv_len " + std::to_string(p.length(g)) + ": ";
  const auto count = static_cast<std::ptrdiff_t>(want.list.size());
  if (got.counts[at] != count)
    return where + "count " + std::to_string(got.counts[at]) + ", not " + std::to_string(count);
  if (got.list(g) != want.list) return where + "another list of the same count";
  if (p.wants_mass && got.mass[at] != want.mass)
    return where + "mass " + std::to_string(got.mass[at]) + ", not " + std::to_string(want.mass);
  if (got.status[at] != expected_status(want)) return where + "status " + std::to_string(got.status[at]);
  const std::ptrdiff_t padded = specattn::padded_count(count, p.capacity);
  for (std::ptrdiff_t i = count; i < p.capacity; ++i) {
    const std::int32_t entry = got.positions[at * static_cast<std::size_t>(p.capacity) + static_cast<std::size_t>(i)];
    if (entry != (i < padded ? -1 : stale)) return where + "entry " + std::to_string(i) + " behind the list";
  }
  return "";
}

/// Solves and compares every group with the oracle. Returns the rows compared.
template <class Fixture, specattn::storage T>
std::ptrdiff_t agrees_with_oracle(Fixture& fixture, const problem<T>& p) {
  const answer got = solve(fixture, p);
  std::string first;
  for (std::ptrdiff_t g = 0; g < p.groups && first.empty(); ++g) first = difference(p, got, g);
  CHECK(first == "");
  return p.groups * p.rows;
}

// ---- rows ---------------------------------------------------------------------------------------------------

enum class shape {
  uniform,
  softmax,
  one_hot,
  equal,
  tied,
  subnormal,
  coarse_bin,
  pivot_bits,
  tiny,
  huge,
  sparse,
  count
};

/// A row of the given kind. `bits` of the two adversarial kinds lie in one coarse bin, or around a rounding pivot.
inline std::vector<float> make_row(shape kind, std::ptrdiff_t length, std::mt19937& random) {
  std::uniform_real_distribution<float> unit(0.0f, 1.0f);
  std::normal_distribution<float> normal(0.0f, 2.0f);
  std::vector<float> row(static_cast<std::size_t>(length));
  const auto spike = length > 0 ? random() % static_cast<std::uint32_t>(length) : 0;
  for (std::size_t i = 0; i < row.size(); ++i) {
    const auto step = static_cast<std::uint32_t>(i);
    switch (kind) {
      case shape::uniform:
        row[i] = unit(random);
        break;
      case shape::softmax:
        row[i] = std::exp(normal(random) - (i == 0 ? 0.0f : 6.0f));
        break;
      case shape::one_hot:
        row[i] = i == spike ? 1.0f : 0.0f;
        break;
      case shape::equal:
        row[i] = 0.3f;
        break;
      case shape::tied:
        row[i] = static_cast<float>(1 + random() % 5) * 0.125f;
        break;
      case shape::subnormal:
        row[i] = std::bit_cast<float>(static_cast<std::uint32_t>(random() % 5000));
        break;
      case shape::coarse_bin:
        row[i] = std::bit_cast<float>(0x3f800000u + step);
        break;
      case shape::pivot_bits:
        row[i] = std::bit_cast<float>(0x3805ed27u + (step * 7919u) % 40009u);
        break;
      case shape::tiny:
        row[i] = std::ldexp(unit(random), -100);
        break;
      case shape::huge:
        row[i] = unit(random) * 3e38f;
        break;
      default:
        row[i] = random() % 4 == 0 ? std::ldexp(unit(random), -static_cast<int>(random() % 60)) : 0.0f;
    }
  }
  return row;
}

/// Fills every group and row with rows of mixed kinds.
template <specattn::storage T>
void fill_mixed(problem<T>& p, std::mt19937& random) {
  for (std::ptrdiff_t g = 0; g < p.groups; ++g) {
    for (std::ptrdiff_t r = 0; r < p.rows; ++r) {
      const auto kind = static_cast<shape>(random() % static_cast<std::uint32_t>(shape::count));
      const std::vector<float> row = make_row(kind, p.kv_len, random);
      for (std::ptrdiff_t i = 0; i < p.kv_len; ++i)
        p.at(g, r, i) = specattn::from_float<T>(row[static_cast<std::size_t>(i)]);
    }
  }
}

}  // namespace select_testing
