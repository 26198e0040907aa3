// mask_union() on the device: the CPU's cases, and what only a device can get wrong.
#include "specattn/cuda/mask_union.cuh"

#include "cpu_fixture.hpp"
#include "cuda_fixture.cuh"
#include "cuda_replay.cuh"

using mask_union_fixture = cuda_fixture;

#include "mask_union/cases.hpp"
#include "mask_union/device_cases.hpp"

namespace mask_union_testing {

TEST_CASE("mask_union on the device: random batches give the CPU's unions, on clusters of every size") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  expect_cpus(fixture, cpu, 200, 5, 300);
  expect_cpus(fixture, cpu, 40, 9, 9000);
  expect_cpus(fixture, cpu, 6, 2, 100000);
  for (const std::int32_t sequences : {20, 40, 80, 160, 400}) expect_cpus(fixture, cpu, 2, sequences, 5000);
}

TEST_CASE("mask_union on the device: more unions than a grid has rows") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  const auto p = random_problem(std::vector<std::int32_t>(70000, 1), std::vector<std::int32_t>(70000, 3), 1, 0.5);
  expect_same(run(fixture, p), run(cpu, p));
}

TEST_CASE(
    "mask_union on the device: a captured union follows lists, lengths and slots; the workspace is not touched") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  const auto problem_of = [](std::vector<std::int32_t> slots, std::vector<std::int32_t> kv_lens, double share) {
    auto p = random_problem(slots, kv_lens, 2, share, 9);
    p.capacity = 3000;
    p.row = 50000;
    return p;
  };
  using on_device = staged<cuda_fixture>;
  const on_device on(fixture, problem_of({6, 3}, {4000, 70}, 0.4));
  const auto args = on.args();
  const cuda_replay replay(fixture, [&] { specattn::mask_union(fixture.context(), args); });
  CHECK(fixture.context().workspace_bytes() == 0);
  const auto copy = [](const auto& to, const auto& from) {
    REQUIRE(to.size() == from.size());
    specattn::detail::check_cuda(cudaMemcpy(to.data(), from.data(), from.bytes(), cudaMemcpyDeviceToDevice), "test");
  };
  std::vector<problem> later = {problem_of({6, 3}, {4000, 70}, 0.4), problem_of({1, 8}, {50000, 1}, 0.03),
                                problem_of({0, 9}, {7, 9000}, 0.9), problem_of({8, 1}, {0, 2999}, 0.5)};
  later.push_back(later[0]);
  later.back().all.assign(later.back().all.size(), true);
  for (const problem& p : later) {
    const on_device next(fixture, p);
    for (const auto member : {&on_device::lists, &on_device::list_counts, &on_device::slot_offsets,
                              &on_device::kv_lens, &on_device::positions, &on_device::counts})
      copy(on.*member, next.*member);
    for (const auto member : {&on_device::list_status, &on_device::words, &on_device::status})
      copy(on.*member, next.*member);
    replay.launch();
    expect_same(on.read(fixture), run(cpu, p));
  }
}

}  // namespace mask_union_testing
