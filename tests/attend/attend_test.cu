// attend() on the device: the CPU's cases, and what only a device can get wrong.
#include "specattn/cuda/attend.cuh"

#include "cpu_fixture.hpp"
#include "cuda_fixture.cuh"
#include "cuda_replay.cuh"
#include "specattn/attention_pass.hpp"
#include "specattn/cpu/attend.hpp"
#include "specattn/cpu/kv_cache.hpp"
#include "specattn/cuda/kv_cache.cuh"

struct attend_fixture : cuda_fixture {
  static constexpr bool to_the_bit = false;  // shares end where the batch's sum of positions says
  /// Queries and weights meet a 16-bit cache with 16 bits or more of their own.
  template <class T>
  static constexpr double tolerance = std::is_same_v<T, specattn::bf16> ? 1e-4 : 2e-5;
};

#include "attend/cases.hpp"

namespace attend_testing {

void check(cudaError_t status) { specattn::detail::check_cuda(status, "test"); }

/// The largest difference between two answers to one problem, NaN counted as infinite.
double difference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = std::abs(double{a[i]} - double{b[i]});
    largest = d <= largest ? largest : d >= 0 ? d : std::numeric_limits<double>::infinity();
  }
  return largest;
}

template <specattn::storage T>
void agrees_with_cpu(attend_fixture& fixture, const problem<T>& p) {
  cpu_fixture cpu(8);
  const answer want = run(cpu, p), got = run(fixture, p);
  CHECK(difference(want.out, got.out) < attend_fixture::tolerance<T>);
  CHECK(difference(want.lse, got.lse) < attend_fixture::tolerance<T>);
  CHECK(difference(want.weights, got.weights) < attend_fixture::tolerance<T>);
}

TEST_CASE("attend on the device: long ragged batches, dense, listed and mixed, agree with the CPU") {
  attend_fixture fixture;
  for (const std::int32_t page_size : {0, 16}) {
    for (const auto& [group, head_dim] : {std::pair{4, 128}, {8, 64}, {1, 128}, {2, 256}, {4, 96}, {7, 48}}) {
      CAPTURE(group);
      CAPTURE(head_dim);
      pass_shape shape;
      shape.kv_lens = {20000, 3, 7001, 0, 640, 1};
      shape.slots = {6, 6, 1, 2, 0, 9};
      shape.kv_heads = 2;
      shape.group = group;
      shape.head_dim = head_dim;
      shape.page_size = page_size;
      auto p = random_problem<bf16>(shape);
      agrees_with_cpu(fixture, p);
      p.record = true;
      p.recorded = page_size == 0 ? record_slots::newest : record_slots::all;
      keep_random(p, 0.22);
      agrees_with_cpu(fixture, p);
      p.all.assign(6, {false, true});
      agrees_with_cpu(fixture, p);
    }
  }
}

TEST_CASE("attend on the device: any number of heads to share the device among, equal lists and unequal ones") {
  attend_fixture fixture;
  for (const std::int32_t kv_heads : {1, 2, 3, 5, 8, 11, 33, 67, 133}) {
    for (const std::int32_t kv_len : {3000, 100}) {
      CAPTURE(kv_heads);
      CAPTURE(kv_len);
      pass_shape shape;
      shape.kv_lens = {kv_len};
      shape.slots = {kv_heads == 3 ? 9 : 6};
      shape.kv_heads = kv_heads;
      shape.group = 4;
      auto p = random_problem<bf16>(shape);
      p.record = true;
      agrees_with_cpu(fixture, p);
      keep_random(p, 0.3);
      agrees_with_cpu(fixture, p);
      for (std::size_t head = 0; head < p.kept[0].size(); head += 2) p.kept[0][head].resize(head % 7);
      agrees_with_cpu(fixture, p);
    }
  }
}

TEST_CASE("attend on the device: a batch of many short sequences and a long prefill agree with the CPU") {
  attend_fixture fixture;
  pass_shape shape;
  shape.kv_lens.clear();
  shape.slots.clear();
  for (std::int32_t s = 0; s < 200; ++s) {
    shape.kv_lens.push_back(s * 37 % 300);
    shape.slots.push_back(s % 8);
  }
  auto p = random_problem<fp16>(shape);
  p.record = true;
  agrees_with_cpu(fixture, p);
  keep_random(p, 0.3);
  agrees_with_cpu(fixture, p);
  shape.kv_lens = {0, 100};
  shape.slots = {1500, 700};
  agrees_with_cpu(fixture, random_problem<bf16>(shape));
}

TEST_CASE("attend on the device: a sequence's results do not depend on the rest of the batch, but for rounding") {
  attend_fixture fixture;
  pass_shape shape;
  shape.kv_lens = {9000};
  shape.slots = {6};
  shape.head_dim = 128;
  auto alone = random_problem<fp16>(shape);
  keep_random(alone, 0.5);
  const auto want = run(fixture, alone);
  for (const std::int32_t other : {1, 50, 800, 12345}) {
    shape.kv_lens = {9000, other, other};
    shape.slots = {6, 1, 3};
    auto p = random_problem<fp16>(shape);
    p.texts[0] = alone.texts[0];
    keep_random(p, 0.4);
    p.kept[0] = alone.kept[0];
    std::copy(alone.q.begin(), alone.q.end(), p.q.begin());
    auto got = run(fixture, p);
    got.out.resize(want.out.size());
    got.lse.resize(want.lse.size());
    CHECK(difference(want.out, got.out) < 2e-6);
    CHECK(difference(want.lse, got.lse) < 4e-6);
  }
}

TEST_CASE("attend on the device: the same pass twice gives the same bits") {
  attend_fixture fixture;
  pass_shape shape;
  shape.kv_lens = {9000, 4001};
  shape.slots = {6, 3};
  shape.head_dim = 128;
  auto p = random_problem<bf16>(shape);
  keep_random(p, 0.3);
  p.record = true;
  const auto first = run(fixture, p), second = run(fixture, p);
  CHECK(first.out == second.out);
  CHECK(first.lse == second.lse);
  CHECK(first.weights == second.weights);
}

TEST_CASE("attend on the device: a captured graph follows lengths and counts that change between replays") {
  attend_fixture fixture;
  std::mt19937 random(61);
  pass_shape shape;
  shape.kv_lens = {5000, 5000, 5000};
  shape.slots = {6, 6, 6};
  shape.group = 4;
  shape.head_dim = 128;
  auto p = random_problem<bf16>(shape);
  const auto cache = filled_cache(fixture, p);
  const std::vector<std::int32_t> offsets = {0, 6, 12, 18};
  const auto slot_offsets = fixture.upload(offsets);
  const auto kv_lens = fixture.upload(p.shape.kv_lens), new_lens = fixture.upload(p.shape.kv_lens);
  const auto q = fixture.upload(p.q), out = fixture.upload(p.q);
  const specattn::selection<specattn::cuda> kept(6, 5000);
  specattn::attend_args<bf16, specattn::cuda> args;
  args.q = q.shaped({18, 8, 128});
  args.out = out.shaped({18, 8, 128});
  args.kv = cache.layer(1);
  args.slot_offsets = slot_offsets.shaped({4});
  args.kv_lens = kv_lens.shaped({3});
  args.kept = kept.view();
  args.kept_sequence_stride = 2;
  fixture.context().reserve_workspace(specattn::attend_workspace_bytes(fixture.context(), {3, 18, 8, 2, 128, 5006}));
  const cuda_replay captured(fixture, [&] {
    check(cudaMemcpyAsync(kv_lens.data(), new_lens.data(), kv_lens.bytes(), cudaMemcpyDeviceToDevice,
                          fixture.stream()));
    specattn::attend(fixture.context(), args);  // behind a node that is no kernel
  });
  for (int replay = 0; replay < 12; ++replay) {
    // The slots' own keys and values stay where they are written: behind the longest prefix a shorter one's tail
    // is simply other rows of the text.
    auto now = p;
    for (std::size_t s = 0; s < 3; ++s) {
      const auto length = static_cast<std::int32_t>(random() % 5001);
      now.shape.kv_lens[s] = length;
      now.texts[s].k.resize(static_cast<std::size_t>(length + 6) * 2 * 128);
      now.texts[s].v.resize(now.texts[s].k.size());
    }
    keep_random(now, 0.1 * static_cast<double>(replay % 11), static_cast<std::uint32_t>(random()));
    std::vector<std::int32_t> positions(6 * 5000, -1), counts;
    for (std::size_t g = 0; g < 6; ++g) {
      const list& of = now.kept[g / 2][g % 2];
      std::copy(of.begin(), of.end(), positions.begin() + static_cast<std::ptrdiff_t>(g * 5000));
      counts.push_back(static_cast<std::int32_t>(of.size()));
    }
    check(cudaMemcpy(args.kept.positions.data(), positions.data(), positions.size() * 4, cudaMemcpyHostToDevice));
    check(cudaMemcpy(args.kept.counts.data(), counts.data(), counts.size() * 4, cudaMemcpyHostToDevice));
    check(cudaMemcpy(new_lens.data(), now.shape.kv_lens.data(), new_lens.bytes(), cudaMemcpyHostToDevice));
    captured.launch();
    cpu_fixture cpu(8);
    CHECK(difference(run(cpu, now).out, fixture.download(out)) < attend_fixture::tolerance<bf16>);
  }
}

/// Copies numbers when the kernel behind it may long have been placed.
struct late_copy {
  const std::int32_t* from;
  std::int32_t* to;
  std::int32_t count;
};
__global__ void late_copy_kernel(late_copy copy) {
  specattn::detail::launch_dependents();
  const long long begin = clock64();
  while (clock64() - begin < 100000) {  // 50 us
  }
  for (std::int32_t i = 0; i < copy.count; ++i) copy.to[i] = copy.from[i];
}

TEST_CASE("attend on the device: lengths and counts that the kernel before writes in its end are those that count") {
  attend_fixture fixture;
  pass_shape shape;
  shape.kv_lens = {3000};
  shape.slots = {6};
  shape.kv_heads = 2;
  shape.group = 4;
  shape.head_dim = 128;
  auto p = random_problem<bf16>(shape);
  keep_random(p, 0.5);
  cpu_fixture cpu(8);
  const auto listed = run(cpu, p).out;
  for (auto& head : p.kept[0]) head.resize(head.size() / 3);
  const auto cut = run(cpu, p).out;
  const auto cache = filled_cache(fixture, p);
  const std::vector<std::int32_t> none = {0, 0, 0, 0, 0};
  std::vector<std::int32_t> positions(2 * 3000, -1), all = {0, 6, 3000}, less;
  keep_random(p, 0.5);
  for (std::size_t g = 0; g < 2; ++g) {
    std::copy(p.kept[0][g].begin(), p.kept[0][g].end(), positions.begin() + static_cast<std::ptrdiff_t>(g * 3000));
    all.push_back(static_cast<std::int32_t>(p.kept[0][g].size()));
  }
  less = all;
  less[3] /= 3, less[4] /= 3;
  const auto numbers = fixture.upload(none), listed_numbers = fixture.upload(all), cut_numbers = fixture.upload(less);
  const auto q = fixture.upload(p.q), out = fixture.upload(p.q);
  const auto lists = fixture.upload(positions);
  specattn::attend_args<bf16, specattn::cuda> args;
  args.q = q.shaped({6, 8, 128});
  args.out = out.shaped({6, 8, 128});
  args.kv = cache.layer(1);
  args.slot_offsets = {numbers.data(), {2}};
  args.kv_lens = {numbers.data() + 2, {1}};
  args.kept.positions = lists.shaped({2, 3000});
  args.kept.counts = {numbers.data() + 3, {2}};
  args.kept_sequence_stride = 2;
  fixture.context().reserve_workspace(specattn::attend_workspace_bytes(fixture.context(), {1, 6, 8, 2, 128, 3006}));
  for (int turn = 0; turn < 6; ++turn) {
    fixture.soil_workspace();
    const auto& from = turn % 2 == 0 ? listed_numbers : cut_numbers;
    specattn::detail::start_kernel(fixture.context(), late_copy_kernel, dim3(1), 1,
                                   late_copy{from.data(), numbers.data(), 5}, "test");
    specattn::attend(fixture.context(), args);
    CHECK(difference(turn % 2 == 0 ? listed : cut, fixture.download(out)) < attend_fixture::tolerance<bf16>);
  }
}

TEST_CASE(
    "attend on the device: a pass whose attention begins before its append ends has the bits of one that waits") {
  attend_fixture fixture;
  auto& ctx = fixture.context();
  for (const std::int32_t page_size : {0, 16}) {
    pass_shape shape;
    shape.kv_lens = {3000, 40};
    shape.slots = {6, 3};
    shape.kv_heads = 2;
    shape.group = 4;
    shape.head_dim = 128;
    shape.page_size = page_size;
    auto p = random_problem<bf16>(shape);
    auto cache = filled_cache(fixture, p);
    for (std::int32_t s = 0; s < 2; ++s)
      cache.roll_back(s, shape.kv_lens[static_cast<std::size_t>(s)]), cache.reserve(s, 6);
    const auto offsets = fixture.upload(std::vector<std::int32_t>{0, 6, 9});
    const auto kv_lens = fixture.upload(shape.kv_lens), rows = fixture.upload(std::vector<std::int32_t>{0, 1});
    const auto texts = fixture.upload(std::vector<std::int32_t>{3000, 3001, 3002, 3003, 3004, 3005, 40, 41, 42});
    const auto frequencies = fixture.upload(std::vector<float>(64, 0.01f));
    const specattn::rotary_view<specattn::cuda> rotary{texts.shaped({9}), frequencies.shaped({64})};
    const specattn::pass_layout<specattn::cuda> layout{offsets.shaped({3}), kv_lens.shaped({2}), rows.shaped({2})};
    specattn::attend_args<bf16, specattn::cuda> args;
    const specattn::buffer<float, specattn::cuda> out(p.q.size());
    args.out = out.shaped({9, 8, 128});
    args.kv = cache.layer(1);
    args.slot_offsets = layout.slot_offsets;
    args.kv_lens = layout.kv_lens;
    args.cache_rows = layout.cache_rows;
    ctx.reserve_workspace(specattn::attend_workspace_bytes(ctx, {2, 9, 8, 2, 128, 3006}));
    specattn::attention_pass<bf16, specattn::cuda> pass(ctx, cache, layout);
    const auto append = [&](const auto& q, const auto& k, const auto& v) {
      cache.append_rotated(ctx, 1, layout, q.shaped({9, 8, 128}), k.shaped({9, 2, 128}), v.shaped({9, 2, 128}),
                           rotary);
    };
    for (std::uint32_t turn = 0; turn < 10; ++turn) {
      const auto other = random_problem<bf16>(shape, 2 + turn);
      const std::size_t count = 9 * 2 * 128;
      const auto k = fixture.upload(std::vector<float>(other.q.begin(), other.q.begin() + count));
      const auto v = fixture.upload(std::vector<float>(other.q.end() - count, other.q.end()));
      const auto q = fixture.upload(other.q), same = fixture.upload(other.q), scratch = fixture.upload(p.q);
      append(q, k, v);
      check(cudaStreamSynchronize(fixture.stream()));
      args.q = q.shaped({9, 8, 128});
      specattn::attend(ctx, args);
      const auto want = fixture.download(out);
      append(scratch, v, k);  // rows that would show
      pass(1, same.shaped({9, 8, 128}), k.shaped({9, 2, 128}), v.shaped({9, 2, 128}), out.shaped({9, 8, 128}),
           rotary);
      CHECK(want == fixture.download(out));
    }
  }
}

TEST_CASE("attend on the device: the workspace grows with every field of the shape; one too small is refused") {
  using shape = specattn::attend_shape;
  attend_fixture fixture;
  const shape small{2, 9, 8, 2, 64, 1000};
  for (auto field :
       {&shape::sequences, &shape::slots, &shape::q_heads, &shape::kv_heads, &shape::head_dim, &shape::kv_len}) {
    shape larger = small;
    std::size_t bytes = specattn::attend_workspace_bytes(fixture.context(), small);
    for (int step = 0; step < 100; ++step) {
      larger.*field += 1 + step / 8;
      const std::size_t more = specattn::attend_workspace_bytes(fixture.context(), larger);
      CHECK(more >= bytes);
      bytes = more;
    }
  }
  const auto p = random_problem<bf16>(pass_shape{});
  const auto cache = filled_cache(fixture, p);
  const auto q = fixture.upload(p.q), out = fixture.upload(p.q);
  const auto offsets = fixture.upload(std::vector<std::int32_t>{0, 1}), kv_lens = fixture.upload(p.shape.kv_lens);
  specattn::attend_args<bf16, specattn::cuda> args;
  args.q = q.shaped({1, 4, 64});
  args.out = out.shaped({1, 4, 64});
  args.kv = cache.layer(1);
  args.slot_offsets = offsets.shaped({2});
  args.kv_lens = kv_lens.shaped({1});
  CHECK_THROWS_WITH_AS(specattn::attend(fixture.context(), args), doctest::Contains("attend: needs a workspace of"),
                       specattn::contract_error);
  args.out = out.shaped({1, 2, 64});
  CHECK_THROWS_WITH_AS(specattn::attend(fixture.context(), args), doctest::Contains("out is [1, 2, 64]"),
                       specattn::contract_error);
}

}  // namespace attend_testing
