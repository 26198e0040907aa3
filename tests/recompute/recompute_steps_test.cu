// recompute_steps() on the device: the CPU's cases, and that a graph follows lengths.
#include "specattn/cuda/recompute.cuh"

#include "specattn/cuda/attend.cuh"  // keep_queries

#include "cuda_fixture.cuh"
#include "cuda_replay.cuh"

struct key_fixture : cuda_fixture {
  /// fp16's rounding; queries of a 16-bit cache enter products as sums of two of its elements.
  template <class T>
  static constexpr double tolerance = std::is_same_v<T, specattn::bf16> ? 2e-3 : 1e-3;
};

#include "recompute/steps_cases.hpp"

namespace key_testing {

TEST_CASE("recompute_steps on the device: a captured graph follows lengths that change between replays") {
  key_fixture fixture;
  const auto check = [](cudaError_t status) { specattn::detail::check_cuda(status, "test"); };
  const shape s{.steps = 2, .layers = 1, .kv_lens = {5000}};
  const problem<bf16> p(s);
  const auto keys = fixture.upload(p.keys);
  const auto q = fixture.upload(p.q), lse = fixture.upload(p.lse);
  const auto table = fixture.upload(p.table), lens = fixture.upload(s.kv_lens), slots = fixture.upload(p.slot_of);
  const std::vector<fp16> stale(8 * 5000, specattn::from_float<fp16>(-7.0f));
  const auto weights = fixture.upload(stale), plain = fixture.upload(stale);
  const auto masses = fixture.upload(std::vector<float>(8)), plain_masses = fixture.upload(std::vector<float>(8));
  specattn::recompute_steps_args<bf16, specattn::cuda> args;
  args.q = q.shaped({2, 1, s.slots(), 8, 64});
  args.lse = lse.shaped({2, 1, s.slots(), 8});
  args.slot_of = slots.shaped({2, 1});
  args.kv.keys = const_cast<bf16*>(keys.data());
  args.kv.page_stride = p.layer_stride;
  args.kv.position_stride = 64;
  args.kv.head_stride = std::ptrdiff_t{p.page} * 64;
  args.kv.block_table = table.shaped({1, 1});
  args.kv.kv_heads = 2;
  args.kv.head_dim = 64;
  args.kv_lens = lens.shaped({1});
  args.weights = weights.shaped({1, 1, 1, 8, 5000});
  args.masses = masses.shaped({1, 1, 1, 8});
  fixture.context().reserve_workspace(specattn::recompute_steps_workspace_bytes(fixture.context(), 8, 5000));
  const cuda_replay captured(fixture, [&] { specattn::recompute_steps(fixture.context(), args); });
  args.weights = plain.shaped({1, 1, 1, 8, 5000});
  args.masses = plain_masses.shaped({1, 1, 1, 8});
  for (const std::int32_t kv_len : {5000, 0, 17, 2048}) {
    for (const auto* to : {&weights, &plain})
      check(cudaMemcpy(to->data(), stale.data(), to->bytes(), cudaMemcpyHostToDevice));
    check(cudaMemcpy(lens.data(), &kv_len, sizeof kv_len, cudaMemcpyHostToDevice));
    captured.launch();
    specattn::recompute_steps(fixture.context(), args);
    const auto replayed = fixture.download(weights), called = fixture.download(plain);
    std::int32_t left = 0, differ = 0;
    for (std::size_t i = 0; i < replayed.size(); ++i) {
      left += replayed[i].bits == stale[0].bits ? 1 : 0;
      differ += replayed[i].bits != called[i].bits ? 1 : 0;
    }
    CHECK(differ == 0);
    CHECK(left == 8 * (5000 - kv_len));
    CHECK(fixture.download(masses) == fixture.download(plain_masses));
  }
}

}  // namespace key_testing
