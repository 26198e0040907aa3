// kv_cache on the device: the CPU's cases, and what only a device can get wrong.
#include "specattn/cuda/kv_cache.cuh"

#include "cuda_fixture.cuh"

struct kv_cache_fixture : cuda_fixture {
  template <class T>
  std::vector<std::remove_const_t<T>> read(T* from, std::ptrdiff_t count) {
    std::vector<std::remove_const_t<T>> copy(static_cast<std::size_t>(count));
    specattn::detail::check_cuda(cudaStreamSynchronize(stream()), "test");
    specattn::detail::check_cuda(cudaMemcpy(copy.data(), from, copy.size() * sizeof(T), cudaMemcpyDeviceToHost),
                                 "test");
    return copy;
  }
};

#include "kv_cache/cases.hpp"
#include "kv_cache/fp8_cases.hpp"
#include "kv_cache/generation_cases.hpp"
#include "kv_cache/rotary_cases.hpp"

namespace kv_cache_testing {

using device = specattn::cuda;

TEST_CASE(
    "kv_cache on the device: a captured append is one launch and follows a layout that changes between replays") {
  kv_cache_fixture fixture;
  specattn::kv_cache<float, device> cache({2, 1, 2, 4, 64, 16, 0});
  cache.reserve(0, 64);
  cache.reserve(1, 64);
  cache.publish(fixture.context());
  const specattn::buffer<float, device> rows(6 * 2 * 4);
  const specattn::buffer<std::int32_t, device> offsets(3), lengths(2), cache_rows(2);
  const auto set = [](const auto& to, const auto& from) {
    cudaMemcpy(to.data(), from.data(), to.bytes(), cudaMemcpyHostToDevice);
  };
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  specattn::detail::check_cuda(cudaStreamBeginCapture(fixture.stream(), cudaStreamCaptureModeThreadLocal), "test");
  cache.append(fixture.context(), 0, {offsets.shaped({3}), lengths.shaped({2}), cache_rows.shaped({2})},
               rows.shaped({6, 2, 4}), rows.shaped({6, 2, 4}));
  specattn::detail::check_cuda(cudaStreamEndCapture(fixture.stream(), &graph), "test");
  std::size_t nodes = 0;
  specattn::detail::check_cuda(cudaGraphGetNodes(graph, nullptr, &nodes), "test");
  CHECK(nodes == 1);
  specattn::detail::check_cuda(cudaGraphInstantiate(&ready, graph, 0), "test");
  std::vector<float> want(2 * 64);  // by cache row and position, the first element of its head 0
  std::mt19937 random(3);
  for (int replay = 0; replay < 40; ++replay) {
    const auto first = static_cast<std::int32_t>(random() % 7), second = static_cast<std::int32_t>(random() % 3);
    const std::vector<std::int32_t> ends = {0, first, std::min(first + second, 6)};
    const std::vector<std::int32_t> at = {static_cast<std::int32_t>(random() % 58),
                                          static_cast<std::int32_t>(random() % 58)};
    const std::vector<std::int32_t> to = {replay % 2, 1 - replay % 2};
    std::vector<float> k(rows.size());
    for (std::size_t i = 0; i < k.size(); ++i) k[i] = static_cast<float>(replay * 100) + static_cast<float>(i);
    set(offsets, ends);
    set(lengths, at);
    set(cache_rows, to);
    set(rows, k);
    specattn::detail::check_cuda(cudaGraphLaunch(ready, fixture.stream()), "test");
    specattn::detail::check_cuda(cudaStreamSynchronize(fixture.stream()), "test");
    for (int s = 0; s < 2; ++s) {
      const auto u = static_cast<std::size_t>(s);
      for (std::int32_t i = ends[u]; i < ends[u + 1]; ++i)
        want[static_cast<std::size_t>(to[u] * 64 + at[u] + i - ends[u])] = k[static_cast<std::size_t>(i * 8)];
    }
  }
  auto view = cache.layer(0);
  const auto table = fixture.read(view.block_table.data(), view.block_table.size());
  view.block_table = {table.data(), view.block_table.extents()};
  const auto stored = fixture.read(view.keys, 2 * 64 * 8);
  for (std::int32_t row = 0; row < 2; ++row)
    for (std::int32_t p = 0; p < 64; ++p)
      CHECK(stored[static_cast<std::size_t>(view.offset(row, p, 0))] == want[static_cast<std::size_t>(row * 64 + p)]);
  cudaGraphExecDestroy(ready);
  cudaGraphDestroy(graph);
}

TEST_CASE("kv_cache on the device: pages taken and published while the stream is busy reach later work only") {
  kv_cache_fixture fixture;
  specattn::kv_cache<float, device> cache({1, 1, 1, 4, 4000, 1, 0});
  const specattn::buffer<float, device> ones = fixture.upload(std::vector<float>(4000 * 4, 1.0f));
  std::vector<float> numbers(4000 * 4);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>(i / 4);
  const specattn::buffer<float, device> counted = fixture.upload(numbers);
  for (int turn = 0; turn < 20; ++turn) {  // nothing here waits: all of it is queued before the last turn has run
    cache.append(fixture.context(), 0, 0, ones.shaped({4000, 1, 4}), ones.shaped({4000, 1, 4}));
    cache.roll_back(0, 0);
    cache.append(fixture.context(), 0, 0, counted.shaped({4000, 1, 4}), counted.shaped({4000, 1, 4}));
    cache.advance(0, 4000);
    if (turn < 19) cache.clear(0);
  }
  auto view = cache.layer(0);
  const auto table = fixture.read(view.block_table.data(), view.block_table.size());
  view.block_table = {table.data(), view.block_table.extents()};
  const auto stored = fixture.read(view.keys, 4000 * 4);
  int wrong = 0;
  for (std::int32_t p = 0; p < 4000; ++p)
    wrong += stored[static_cast<std::size_t>(view.offset(0, p, 0))] != static_cast<float>(p) ? 1 : 0;
  CHECK(wrong == 0);
}

}  // namespace kv_cache_testing
