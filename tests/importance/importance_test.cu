// mix_importance() on the device: the CPU's cases, and what only a device can get wrong.
#include "specattn/cuda/importance.cuh"

#include "cpu_fixture.hpp"
#include "cuda_fixture.cuh"
#include "cuda_replay.cuh"
#include "specattn/cpu/select.hpp"

using importance_fixture = cuda_fixture;

#include "importance/cases.hpp"

namespace importance_testing {

TEST_CASE("importance on the device: many tiles for each CTA, one slab of groups to nine, windows beyond the first") {
  cuda_fixture fixture;
  std::uint32_t seed = 200;
  const auto try_shape = [&](const shape& sizes, std::int32_t kv_len) {
    agrees(fixture, make_problem(kv_len, 1, ++seed, sizes));
    agrees<specattn::bf16>(fixture, make_problem(kv_len / 3, 4, ++seed, sizes));
  };
  try_shape({1, 9, 3, 8, 8}, 70000);
  try_shape({2, 40, 32, 8, 1}, 17500);
  try_shape({2, 40, 64, 8, 8}, 9000);
  try_shape({2, 33, 32, 24, 3}, 5000);
  try_shape({1, 5, 11, 200, 8}, 3000);
}

TEST_CASE("importance on the device: a captured graph follows lengths that change between replays") {
  cuda_fixture fixture;
  problem p = make_problem(9000, 3, 21, shape{4, 20, 33, 8, 8});
  for (std::int32_t& count : p.history_counts) count = 0;
  resident_problem<cuda_fixture, specattn::fp16> resident(fixture, p);
  resident.reserve(fixture);
  const auto length = fixture.upload(std::vector<std::int32_t>{1});
  resident.args.length = length.shaped({1});
  const cuda_replay captured(fixture,
                             [&] { specattn::mix_importance(fixture.context(), resident.mixture, resident.args); });
  const std::vector<float> clean(resident.out.size(), -7.0f);
  for (const std::int32_t now : {9000, 1, 4097, 0, 127, 8999}) {
    specattn::detail::check_cuda(cudaMemcpy(length.data(), &now, 4, cudaMemcpyHostToDevice), "test");
    specattn::detail::check_cuda(
        cudaMemcpy(resident.out.data(), clean.data(), resident.out.bytes(), cudaMemcpyHostToDevice), "test");
    captured.launch();
    p.lengths = {now};
    check_importance<specattn::cuda>(p, resident.results(fixture));
  }
}

TEST_CASE("importance on the device: two streams at once, 20 times, give the same bits") {
  cuda_fixture first, second;
  problem p = make_problem(12000, 4, 22, shape{4, 32, 64, 16, 8});
  resident_problem<cuda_fixture, specattn::bf16> here(first, p), there(second, p);
  const std::vector<float> want = here.run(first);
  there.reserve(second);
  for (int turn = 0; turn < 20; ++turn) {
    specattn::mix_importance(first.context(), here.mixture, here.args);
    specattn::mix_importance(second.context(), there.mixture, there.args);
    CHECK(first.download(here.out) == want);
    CHECK(second.download(there.out) == want);
  }
}

/// Rows as attention has them: exponentials of normal logits, heavy sinks.
void make_peaked(problem& p, std::mt19937& random) {
  std::normal_distribution<float> logit(0.0f, 2.5f);
  for (std::int32_t row = 0; row < p.steps * p.heads(); ++row) {
    double mass = 0.0;
    for (std::int32_t i = 0; i < p.kv_len; ++i) {
      float& weight = p.weights[p.cell(row, i)];
      weight = std::exp(logit(random) + (i < 4 ? 6.0f : 0.0f));
      mass += weight;
    }
    p.masses[static_cast<std::size_t>(row)] = static_cast<float>(mass);
  }
}

TEST_CASE("importance on the device: a selection from it holds its share of the exact importance within 1 %") {
  cuda_fixture fixture;
  cpu_fixture host;
  std::mt19937 random(23);
  problem p = make_problem(6000, 4, 23, shape{6, 32, 8, 8, 8});
  make_peaked(p, random);
  for (std::int32_t& count : p.history_counts) count = 0;
  resident_problem<cuda_fixture, specattn::bf16> resident(fixture, p);
  const std::vector<float> rows = resident.run(fixture);
  specattn::selection<specattn::cpu> lists(p.groups(), p.kv_len);
  specattn::weight_rows<float> from;
  from.weights = {rows.data(), {p.groups(), 1, p.kv_len}, {p.capacity, p.capacity, 1}};
  specattn::selection_rule rule;
  rule.sinks = rule.recent = 0;
  auto& context = host.context();
  context.reserve_workspace(specattn::select_workspace_bytes(context, p.groups(), 1, p.kv_len, rule));
  specattn::select(context, from, rule, lists.view());
  double least = 1.0, most = 0.0;
  for (std::int32_t g = 0; g < p.groups(); ++g) {
    const std::vector<double> exact = expected(p, 0, g, 0, p.steps);
    double mass = 0.0, kept = 0.0;
    for (const double x : exact) mass += x;
    for (std::int32_t i = 0; i < lists.view().counts[g]; ++i)
      kept += exact[static_cast<std::size_t>(lists.view().positions(g, i))];
    least = std::min(least, kept / mass);
    most = std::max(most, kept / mass);
  }
  CHECK(least > 0.94);
  CHECK(most < 0.96);
}

}  // namespace importance_testing
