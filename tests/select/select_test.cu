// select() on the device: the CPU's cases, and what only a device can get wrong.
#include "specattn/cuda/select.cuh"

#include <memory>

#include "cpu_fixture.hpp"
#include "cuda_fixture.cuh"
#include "cuda_replay.cuh"
#include "specattn/cpu/select.hpp"

using select_fixture = cuda_fixture;

#include "select/cases.hpp"
#include "select/device_cases.hpp"
#include "select/group_cases.hpp"

namespace select_testing {

TEST_CASE("select on the device: 100 000 random and adversarial rows give the CPU's lists, masses and flags") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  std::mt19937 random(51);
  std::ptrdiff_t rows = 0;
  for (int turn = 0; turn < 200; ++turn) {
    specattn::selection_rule rule;
    rule.top_p = static_cast<float>(random() % 1000) / 1000.0f;
    if (turn % 2 == 0) rule.sinks = rule.recent = 0;
    if (turn % 5 == 1) rule.max_tokens = static_cast<std::int32_t>(random() % 200);
    if (turn % 17 == 3) rule.method = specattn::threshold_method::bisection;
    auto p = dense_problem<float>(512, 1, 1 + static_cast<std::ptrdiff_t>(random() % 1500), rule);
    fill_mixed(p, random);
    p.kv_lens.resize(512);
    for (std::int32_t& length : p.kv_lens) length = static_cast<std::int32_t>(random() % (p.kv_len + 1));
    same_as_cpu(fixture, cpu, p);
    rows += 512;
  }
  CHECK(rows >= 100000);
}

TEST_CASE("select on the device: every cluster size, and rows beyond the largest, give the CPU's lists") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  std::mt19937 random(52);
  for (const std::ptrdiff_t groups : {1, 40, 300}) {
    for (const std::ptrdiff_t length : {1023, 5000, 16384, 16385, 33000, 131072, 131073, 300000}) {
      if (groups * length > 12000000) continue;
      auto p = dense_problem<float>(groups, 1, length, specattn::selection_rule{});
      fill_mixed(p, random);
      same_as_cpu(fixture, cpu, p);
      p.rule.max_tokens = static_cast<std::int32_t>(length / 7);
      same_as_cpu(fixture, cpu, p);
    }
  }
}

TEST_CASE("select on the device: rows of every kind, on one CTA and on eight, give the CPU's lists") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  std::mt19937 random(56);
  for (const std::ptrdiff_t length : {4096, 16384, 40000, 131072}) {
    for (const float top_p : {0.3f, 0.9f, 0.95f, 0.999f}) {
      specattn::selection_rule rule;
      rule.top_p = top_p;
      if (top_p > 0.9f && top_p < 0.99f) rule.recent = 3000;
      auto p = dense_problem<float>(8, 1, length, rule);
      fill_kinds(p, random);
      same_as_cpu(fixture, cpu, p);
    }
  }
}

TEST_CASE("select on the device: flat rows by hundreds, on as few CTAs as hold them, give the CPU's lists") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  for (const std::ptrdiff_t length : {5000, 12000, 16384, 32768}) {
    check_flat<float>(fixture, cpu, 1100, length);
    check_flat<fp16>(fixture, cpu, 1100, length);
  }
  check_flat<bf16>(fixture, cpu, 1100, 32768);
}

TEST_CASE("select on the device: a captured graph follows lengths that change between replays") {
  cuda_fixture fixture;
  specattn::context<specattn::cpu> cpu;
  std::mt19937 random(53);
  auto p = dense_problem<float>(24, 1, 9000, specattn::selection_rule{});
  fill_mixed(p, random);
  const auto weights = fixture.upload(p.memory);
  const auto lengths = fixture.upload(std::vector<std::int32_t>(24, 1));
  specattn::selection<specattn::cuda> lists(24, 9000);
  specattn::weight_rows<float, specattn::cuda> from;
  from.weights = weights.shaped({24, 1, 9000});
  from.kv_lens = lengths.shaped({24});
  const cuda_replay captured(fixture, [&] { specattn::select(fixture.context(), from, p.rule, lists.view()); });
  specattn::selection<specattn::cpu> want(24, 9000);
  specattn::weight_rows<float> host;
  host.weights = {p.memory.data(), {24, 1, 9000}};
  cpu.reserve_workspace(specattn::select_workspace_bytes(cpu, 24, 1, 9000, p.rule));
  for (int replay = 0; replay < 100; ++replay) {
    std::vector<std::int32_t> now(24);
    for (std::int32_t& length : now) length = static_cast<std::int32_t>(random() % 9001);
    specattn::detail::check_cuda(cudaMemcpy(lengths.data(), now.data(), lengths.bytes(), cudaMemcpyHostToDevice),
                                 "test");
    captured.launch();
    specattn::detail::check_cuda(cudaStreamSynchronize(fixture.stream()), "test");
    host.kv_lens = {now.data(), {24}};
    specattn::select(cpu, host, p.rule, want.view());
    std::vector<std::int32_t> counts(24), positions(24 * 9000);
    const auto got = lists.view();
    cudaMemcpy(counts.data(), got.counts.data(), counts.size() * 4, cudaMemcpyDeviceToHost);
    cudaMemcpy(positions.data(), got.positions.data(), positions.size() * 4, cudaMemcpyDeviceToHost);
    bool same = true;
    for (std::ptrdiff_t g = 0; g < 24; ++g) {
      const std::int32_t count = want.view().counts[g];
      same =
          same && counts[static_cast<std::size_t>(g)] == count &&
          std::equal(positions.data() + g * 9000, positions.data() + g * 9000 + count, &want.view().positions(g, 0));
    }
    CHECK(same);
  }
}

TEST_CASE("select on the device: two streams at once, 50 times, give the same lists to the bit") {
  cuda_fixture first, second;
  std::mt19937 random(54);
  auto p = dense_problem<float>(64, 1, 20000, specattn::selection_rule{});
  fill_mixed(p, random);
  const auto weights = first.upload(p.memory);
  specattn::weight_rows<float, specattn::cuda> from;
  from.weights = weights.shaped({64, 1, 20000});
  specattn::selection<specattn::cuda> here(64, 20000), there(64, 20000);
  const answer want = solve(first, p);
  const auto bytes = static_cast<std::size_t>(64) * 20000 * 4;
  std::vector<std::int32_t> a(64 * 20000), b(64 * 20000);
  for (int turn = 0; turn < 50; ++turn) {
    cudaMemset(here.view().positions.data(), 0x5a, bytes);
    cudaMemset(there.view().positions.data(), 0x5a, bytes);
    cudaDeviceSynchronize();
    specattn::select(first.context(), from, p.rule, here.view());
    specattn::select(second.context(), from, p.rule, there.view());
    specattn::detail::check_cuda(cudaDeviceSynchronize(), "test");
    cudaMemcpy(a.data(), here.view().positions.data(), bytes, cudaMemcpyDeviceToHost);
    cudaMemcpy(b.data(), there.view().positions.data(), bytes, cudaMemcpyDeviceToHost);
    CHECK(a == want.positions);
    CHECK(b == want.positions);
  }
}

TEST_CASE("select on the device: rows times positions may pass 2^32") {
  cuda_fixture fixture;
  const std::ptrdiff_t groups = 33000, length = 131072;
  std::size_t free_bytes = 0, all_bytes = 0;
  cudaMemGetInfo(&free_bytes, &all_bytes);
  if (free_bytes < static_cast<std::size_t>(groups * length) * 2 + (std::size_t{1} << 30)) {
    MESSAGE("left out: 10 GB of device memory are needed");
    return;
  }
  const specattn::buffer<bf16, specattn::cuda> weights(static_cast<std::size_t>(groups * length));
  const std::vector<bf16> last = {specattn::from_float<bf16>(1.0f), specattn::from_float<bf16>(3.0f)};
  cudaMemcpy(weights.data() + (groups - 1) * length + 99998, last.data(), 4, cudaMemcpyHostToDevice);
  specattn::selection<specattn::cuda> lists(groups, 64);
  specattn::weight_rows<bf16, specattn::cuda> from;
  from.weights = weights.shaped({groups, 1, length});
  specattn::select(fixture.context(), from, bare(0.9f), lists.view());
  specattn::detail::check_cuda(cudaStreamSynchronize(fixture.stream()), "test");
  std::int32_t count = 0, positions[2] = {};
  cudaMemcpy(&count, lists.view().counts.data() + groups - 1, 4, cudaMemcpyDeviceToHost);
  cudaMemcpy(positions, lists.view().positions.data() + (groups - 1) * 64, 8, cudaMemcpyDeviceToHost);
  CHECK(count == 2);
  CHECK(positions[0] == 99998);
  CHECK(positions[1] == 99999);
}

}  // namespace select_testing
