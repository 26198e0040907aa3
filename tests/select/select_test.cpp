// select() on the CPU.
#include "specattn/cpu/select.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu_fixture.hpp"
#include "select/problem.hpp"

using select_fixture = cpu_fixture;

#include "select/cases.hpp"
#include "select/group_cases.hpp"

namespace select_testing {

TEST_CASE("select: one to four threads give identical lists, masses and flags") {
  std::mt19937 random(31);
  for (const auto rows : {specattn::combine::unite, specattn::combine::mean, specattn::combine::max}) {
    specattn::selection_rule rule;
    rule.rows = rows;
    auto p = dense_problem<float>(13, 4, 1531, rule);
    fill_mixed(p, random);
    cpu_fixture alone(1);
    const answer want = solve(alone, p);
    for (int threads = 2; threads <= 4; ++threads) {
      cpu_fixture team(threads);
      const answer got = solve(team, p);
      CHECK(got.positions == want.positions);
      CHECK(got.counts == want.counts);
      CHECK(got.mass == want.mass);
      CHECK(got.status == want.status);
    }
  }
}

#if defined(__x86_64__)
TEST_CASE("select: flush-to-zero and denormals-are-zero change nothing") {
  std::mt19937 random(33);
  for (const auto rows : {specattn::combine::unite, specattn::combine::mean}) {
    for (const shape kind : {shape::subnormal, shape::tiny, shape::sparse, shape::huge}) {
      auto p = dense_problem<float>(1, 2, 900, bare(0.9f));
      p.rule.rows = rows;
      p.memory = make_row(kind, 1800, random);
      cpu_fixture alone(1);
      const answer want = solve(alone, p);
      const unsigned mode = _mm_getcsr();
      _mm_setcsr(mode | 0x8040u);
      const answer got = solve(alone, p);
      _mm_setcsr(mode);
      CHECK(got.positions == want.positions);
      CHECK(got.mass == want.mass);
    }
  }
}
#endif

TEST_CASE("select: a workspace that is too small is refused before anything is written") {
  specattn::context<specattn::cpu> context(1);
  specattn::buffer<float> weights(100);
  specattn::selection<specattn::cpu> out(1, 100);
  specattn::weight_rows<float> from;
  from.weights = weights.shaped({1, 1, 100});
  out.view().counts[0] = 77;
  CHECK_THROWS_AS(specattn::select(context, from, specattn::selection_rule{}, out.view()), specattn::contract_error);
  CHECK(out.view().counts[0] == 77);
}

TEST_CASE("select: lists pass validate()") {
  std::mt19937 random(32);
  cpu_fixture fixture;
  specattn::buffer<float> weights = fixture.upload(make_row(shape::softmax, 5000, random));
  specattn::selection<specattn::cpu> out(1, 5000);
  specattn::weight_rows<float> from;
  from.weights = weights.shaped({1, 1, 5000});
  const specattn::selection_rule rule;
  fixture.context().reserve_workspace(specattn::select_workspace_bytes(fixture.context(), 1, 1, 5000, rule));
  specattn::select(fixture.context(), from, rule, out.view());
  CHECK_NOTHROW(specattn::validate(out.view(), 0, 5000));
  CHECK_THROWS_AS(specattn::validate(out.view(), 0, 4999), specattn::contract_error);
}

}  // namespace select_testing
