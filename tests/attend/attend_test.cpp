// attend() on the CPU.
#include "specattn/cpu/attend.hpp"

#include "cpu_fixture.hpp"
#include "specattn/cpu/kv_cache.hpp"

struct attend_fixture : cpu_fixture {
  using cpu_fixture::cpu_fixture;
  template <class T>
  static constexpr double tolerance = 2e-5;
};

#include "attend/cases.hpp"

namespace attend_testing {

TEST_CASE("attend: one to four threads give the same bits, whether they share sequences or positions") {
  for (std::int32_t kv_len : {60, 700, 3001}) {
    for (const auto& slots : {std::vector<std::int32_t>{1}, {5}, {1, 9}}) {
      for (std::int32_t kv_heads : {1, 2, 3}) {
        pass_shape shape;
        shape.kv_lens = {kv_len, 400};
        shape.kv_lens.resize(slots.size());
        shape.slots = slots;
        shape.kv_heads = kv_heads;
        shape.head_dim = 32;
        auto p = random_problem<fp16>(shape);
        p.record = true;
        cpu_fixture alone(1);
        const answer want = run(alone, p);
        for (int threads = 2; threads <= 4; ++threads) {
          cpu_fixture team(threads);
          const answer got = run(team, p);
          CHECK(got.out == want.out);
          CHECK(got.lse == want.lse);
          CHECK(got.weights == want.weights);
        }
      }
    }
  }
}

TEST_CASE("attend: the workspace grows with every field of the shape") {
  using shape = specattn::attend_shape;
  for (int threads : {1, 3}) {
    const specattn::context<specattn::cpu> ctx(threads);
    for (const shape& small : {shape{2, 9, 8, 2, 64, 1000}, shape{1, 1, 1, 1, 1, 1}}) {
      for (auto field :
           {&shape::sequences, &shape::slots, &shape::q_heads, &shape::kv_heads, &shape::head_dim, &shape::kv_len}) {
        shape larger = small;
        std::size_t bytes = specattn::attend_workspace_bytes(ctx, small);
        for (int step = 0; step < 300; ++step) {
          larger.*field += 1 + step / 8;
          const std::size_t more = specattn::attend_workspace_bytes(ctx, larger);
          CHECK(more >= bytes);
          bytes = more;
        }
      }
    }
  }
}

// ---- misuse -------------------------------------------------------------------------------------------------

/// A dense pass of one sequence of 20 positions and 2 slots, ready to be spoilt.
struct small_pass {
  specattn::context<specattn::cpu> ctx{1};
  specattn::kv_cache<float> cache{{1, 1, 2, 8, 64, 16, 0}};
  std::vector<float> q = std::vector<float>(2 * 4 * 8), out = q, weights = std::vector<float>(4 * 22);
  std::vector<std::int32_t> offsets = {0, 2}, kv_lens = {20}, rows = {0}, positions = {1, 5, 19, 0, 2, 3},
                            counts = {3, 3};
  specattn::attend_args<float> args;

  small_pass() {
    cache.reserve(0, 22);
    args.q = specattn::view<const float, 3>(q.data(), {2, 4, 8});
    args.out = specattn::view<float, 3>(out.data(), {2, 4, 8});
    args.kv = cache.layer(0);
    args.slot_offsets = specattn::view<const std::int32_t, 1>(offsets.data(), {2});
    args.kv_lens = specattn::view<const std::int32_t, 1>(kv_lens.data(), {1});
    args.cache_rows = specattn::view<const std::int32_t, 1>(rows.data(), {1});
    args.kept.positions = specattn::view<std::int32_t, 2>(positions.data(), {2, 3});
    args.kept.counts = specattn::view<std::int32_t, 1>(counts.data(), {2});
    ctx.reserve_workspace(1 << 20);
  }
  std::string message() {
    try {
      specattn::attend(ctx, args);
    } catch (const specattn::contract_error& error) {
      return error.what();
    }
    return "";
  }
};

TEST_CASE("attend: misuse throws a message that names the values") {
  CHECK(small_pass().message() == "");
  const auto refused = [](auto spoil, const char* part) {
    small_pass pass;
    spoil(pass);
    const std::string message = pass.message();
    CAPTURE(message);
    CHECK(message.find(part) != std::string::npos);
  };
  using pass = small_pass;
  refused([](pass& p) { p.args.q = {p.q.data(), {2, 3, 8}}; }, "3 q_heads over 2 kv_heads");
  refused([](pass& p) { p.args.q = {p.q.data(), {2, 4, 4}}; }, "head_dim 4, the cache 8");
  refused([](pass& p) { p.args.out = {p.out.data(), {1, 4, 8}}; }, "out is [1, 4, 8], q is [2, 4, 8]");
  refused([](pass& p) { p.args.slot_offsets = {p.offsets.data(), {1}}; }, "1 slot_offsets for 1 sequences");
  refused([](pass& p) { p.offsets[1] = 3; }, "sequence 0 has slots 0 … 3 of 2");
  refused([](pass& p) { p.offsets[0] = -1; }, "slots -1 … 2");
  refused([](pass& p) { p.kv_lens[0] = -4; }, "kv_len -4");
  refused([](pass& p) { p.kv_lens[0] = 64; }, "66 positions, its block table 4 pages of 16");
  refused([](pass& p) { p.rows[0] = 1; }, "cache row 1 of 1");
  refused([](pass& p) { p.counts[1] = 4; }, "selection group 1 has count 4, capacity 3");
  refused([](pass& p) { p.counts[1] = -2; }, "count -2");
  refused([](pass& p) { p.positions[2] = 20; }, "keeps positions 1 … 20, outside kv_len 20");
  refused(
      [](pass& p) {
        p.args.kept_sequence_stride = 2, p.args.kept.counts = {p.counts.data(), {1}};
      },
      "the selection has 1 groups, 2 are needed");
  refused(
      [](pass& p) {
        p.args.recording.weights = {p.weights.data(), {1, 4, 4}};
      },
      "leaves 5 weights a row, the recording holds 4");
  refused([](pass& p) { p.args.recording.weights = {p.weights.data(), {1, 2, 22}}; }, "the recording is [1, 2, …]");
  refused([](pass& p) { p.args.lse = {p.weights.data(), {1, 4}}; }, "lse is [1, 4], needed [2, 4]");

  specattn::context<specattn::cpu> poor(1, 64);
  small_pass p;
  CHECK_THROWS_WITH_AS(specattn::attend(poor, p.args), doctest::Contains("attend: needs a workspace of"),
                       specattn::contract_error);
}

TEST_CASE("attend: no slots is no work") {
  small_pass p;
  p.args.q = {p.q.data(), {0, 4, 8}};
  p.args.out = {p.out.data(), {0, 4, 8}};
  p.offsets[1] = 0;
  CHECK(p.message() == "");
}

}  // namespace attend_testing
