// recompute() on the device: the CPU's cases, and that a graph follows lengths.
#include "specattn/cuda/recompute.cuh"

#include "cuda_fixture.cuh"
#include "cuda_replay.cuh"
#include "specattn/cuda/attend.cuh"
#include "specattn/cuda/kv_cache.cuh"

struct attend_fixture : cuda_fixture {
  /// attend()'s own on a 16-bit cache.
  template <class T>
  static constexpr double tolerance = std::is_same_v<T, specattn::bf16> ? 1e-4 : 2e-5;
};

#include "recompute/cases.hpp"

namespace attend_testing {

TEST_CASE("recompute on the device: long ragged batches leave attend's recording") {
  attend_fixture fixture;
  for (const auto& [group, head_dim] : {std::pair{4, 128}, {8, 64}, {1, 128}}) {
    pass_shape shape;
    shape.kv_lens = {20000, 3, 7001, 0, 640, 1};
    shape.slots = {6, 6, 1, 2, 0, 9};
    shape.group = group;
    shape.head_dim = head_dim;
    shape.page_size = group == 8 ? 16 : 0;
    equals_recording_in_all_storage(fixture, shape, record_slots::newest);
  }
}

TEST_CASE("recompute on the device: a captured graph follows lengths that change between replays") {
  attend_fixture fixture;
  const auto check = [](cudaError_t status) { specattn::detail::check_cuda(status, "test"); };
  pass_shape shape;
  shape.kv_lens = {900};
  shape.slots = {3};
  shape.group = 4;
  shape.head_dim = 128;
  const auto p = random_problem<fp16>(shape);
  const auto cache = filled_cache(fixture, p);
  const std::vector<float> untouched(8 * 903, stale);
  const auto q = fixture.upload(p.q), lse = fixture.upload(std::vector<float>(3 * 8)),
             weights = fixture.upload(untouched), plain = fixture.upload(untouched);
  const auto offsets = fixture.upload(std::vector<std::int32_t>{0, 3}), kv_lens = fixture.upload(p.shape.kv_lens);
  specattn::recompute_args<fp16, specattn::cuda> args;
  args.q = q.shaped({3, 8, 128});
  args.kv = cache.layer(1);
  args.slot_offsets = offsets.shaped({2});
  args.kv_lens = kv_lens.shaped({1});
  args.lse = lse.shaped({3, 8});
  args.recording.weights = weights.shaped({1, 8, 903});
  const cuda_replay captured(fixture, [&] { specattn::recompute(fixture.context(), args); });
  args.recording.weights = plain.shaped({1, 8, 903});
  for (const std::int32_t kv_len : {900, 0, 17, 512}) {
    for (const auto* to : {&weights, &plain})
      check(cudaMemcpy(to->data(), untouched.data(), to->bytes(), cudaMemcpyHostToDevice));
    check(cudaMemcpy(kv_lens.data(), &kv_len, sizeof kv_len, cudaMemcpyHostToDevice));
    captured.launch();
    specattn::recompute(fixture.context(), args);
    const auto replayed = fixture.download(weights);
    CHECK(replayed == fixture.download(plain));
    CHECK(std::count(replayed.begin(), replayed.end(), stale) == 8 * (900 - kv_len));
  }
}

}  // namespace attend_testing
