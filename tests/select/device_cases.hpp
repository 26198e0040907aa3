// What select() on the device does its own way, and must do as the CPU does. Needs `cuda_fixture`: the device's, or the
// emulated one.
#pragma once

#include <cmath>

#include "cpu_fixture.hpp"
#include "select/problem.hpp"
#include "specattn/cpu/select.hpp"

namespace select_testing {

template <class T>
void same_as_cpu(cuda_fixture& fixture, cpu_fixture& cpu, const problem<T>& p) {
  const answer want = solve(cpu, p);
  const answer got = solve(fixture, p);
  CHECK(got.counts == want.counts);
  CHECK(got.positions == want.positions);
  CHECK(got.mass == want.mass);
  CHECK(got.status == want.status);
}

/// Rows of every kind, of each group's first rows: ties, flat and peaked ones, and one without mass.
inline void fill_kinds(problem<float>& p, std::mt19937& random) {
  fill_mixed(p, random);
  for (std::ptrdiff_t i = 0; i < p.kv_len; ++i) {
    const float u = static_cast<float>(random() % 65536u + 1) / 65536.0f;
    p.at(0, 0, i) = 0x1.fffffep-3f;                             // all equal, as heavy as a mass can be
    p.at(1, 0, i) = static_cast<float>(1u << (random() % 8u));  // heavy ties
    p.at(2, 0, i) = u;
    p.at(3, 0, i) = std::exp(-12.0f * u);
    p.at(4, 0, i) = i == p.kv_len / 2 ? 1.0f : 1e-9f * u;  // one-hot
    p.at(5, 0, i) = i % 3 == 0 ? u : 0.0f;                 // zeros that only a count sees
  }
}

/// As mixtures of many heads have them: nearly equal weights, which in 16 bits tie by hundreds.
template <class T>
void fill_flat(problem<T>& p, std::mt19937& random) {
  std::vector<T> near;
  for (int i = 0; i < 4096; ++i) {
    float sum = 0.0f;
    for (int head = 0; head < 24; ++head) sum += std::exp(static_cast<float>(random() % 65536u) / 16384.0f - 2.0f);
    near.push_back(specattn::from_float<T>(sum / (40.0f * static_cast<float>(p.kv_len))));
  }
  for (T& weight : p.memory) weight = near[random() % 4096u];
}

template <class T>
void check_flat(cuda_fixture& fixture, cpu_fixture& cpu, std::ptrdiff_t groups, std::ptrdiff_t length) {
  std::mt19937 random(60);
  for (const float top_p : {0.28f, 0.95f}) {
    specattn::selection_rule rule;
    rule.top_p = top_p;
    auto p = dense_problem<T>(groups, 1, length, rule);
    fill_flat(p, random);
    p.memory[static_cast<std::size_t>(length / 2)] = specattn::from_float<T>(0.5f);  // one row that is not
    same_as_cpu(fixture, cpu, p);
    p.rule.max_tokens = static_cast<std::int32_t>(length / 5);
    same_as_cpu(fixture, cpu, p);
  }
}

TEST_CASE("select on the device: flat rows of 16 and 32 bits, full of ties, give the CPU's lists") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  for (const std::ptrdiff_t length : {1000, 9000, 33000}) {
    check_flat<float>(fixture, cpu, 3, length);
    check_flat<bf16>(fixture, cpu, 3, length);
    check_flat<fp16>(fixture, cpu, 3, length);
  }
}

TEST_CASE("select on the device: caps of any depth give the CPU's lists, masses and flags") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  std::mt19937 random(58);
  for (const std::ptrdiff_t length : {700, 16384, 40000}) {
    for (const float top_p : {0.5f, 0.95f, 1.0f}) {
      for (const std::ptrdiff_t cap : {std::ptrdiff_t{21}, length / 10, length / 2, length * 7 / 10, length - 1}) {
        specattn::selection_rule rule;
        rule.top_p = top_p;
        rule.max_tokens = static_cast<std::int32_t>(cap);
        if (cap == length / 2) rule.recent = static_cast<std::int32_t>(length / 5);
        auto p = dense_problem<float>(8, 1, length, rule);
        fill_kinds(p, random);
        p.wants_mass = cap != length / 10;
        same_as_cpu(fixture, cpu, p);
      }
    }
  }
}

TEST_CASE("select on the device: unions whose mass nobody asks for are the CPU's lists") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  std::mt19937 random(59);
  for (const std::ptrdiff_t length : {1, 33, 5000, 16384, 40000}) {
    for (const float top_p : {0.3f, 0.95f, 1.0f}) {
      for (const std::ptrdiff_t rows : {2, 5}) {
        specattn::selection_rule rule;
        rule.top_p = top_p;
        auto p = dense_problem<float>(8, rows, length, rule);
        fill_kinds(p, random);
        p.wants_mass = false;
        p.kv_lens.assign(8, static_cast<std::int32_t>(length));
        p.kv_lens[6] = static_cast<std::int32_t>(length / 2);
        if (length > 100) p.at(7, 1, 50) = -1.0f;  // the whole group is swept
        same_as_cpu(fixture, cpu, p);
      }
    }
  }
}

TEST_CASE(
    "select on the device: the workspace it announces is enough, whatever the rule, the cap, the mass and the rows") {
  cpu_fixture cpu;
  std::mt19937 random(61);
  for (const std::ptrdiff_t rows : {1, 2, 3}) {
    for (const auto method : {specattn::threshold_method::exact, specattn::threshold_method::bisection}) {
      for (const auto combined : {specattn::combine::unite, specattn::combine::mean}) {
        for (const std::int32_t page_size : {1, 4}) {
          for (int turn = 0; turn < 4; ++turn) {
            specattn::selection_rule rule;
            rule.top_p = 0.7f;
            rule.method = method;
            rule.rows = combined;
            rule.page_size = page_size;
            if (turn % 2 == 1) rule.max_tokens = 60;
            auto p = dense_problem<float>(6, rows, 700, rule);
            fill_kinds(p, random);
            p.wants_mass = turn / 2 == 1;
            cuda_fixture fresh;  // whose workspace holds what this problem announces, and no more
            same_as_cpu(fresh, cpu, p);
          }
        }
      }
    }
  }
}

TEST_CASE("select on the device: a workspace announced for several rows is enough for one") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  std::mt19937 random(62);
  for (const auto method : {specattn::threshold_method::exact, specattn::threshold_method::bisection}) {
    specattn::selection_rule rule;
    rule.top_p = 0.7f;
    rule.method = method;
    rule.rows = specattn::combine::mean;
    auto p = dense_problem<float>(6, 1, 700, rule);
    fill_kinds(p, random);
    auto& ctx = fixture.context();
    CHECK(specattn::select_workspace_bytes(ctx, 6, 5, 700, rule) >=
          specattn::select_workspace_bytes(ctx, 6, 1, 700, rule));
    same_as_cpu(fixture, cpu, p);
  }
}

}  // namespace select_testing
