// select() on the device over the table of rows × lengths, p = 0.95, ascending lists out. Lists are compared with the
// CPU's before anything is timed.
//   select_bench_cuda [--smoke | ROWS LENGTH]
#include "specattn/cuda/select.cuh"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda_harness.cuh"
#include "specattn/cpu/select.hpp"

namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's

/// Rows as attention has them: exponentials of N(0, 2.5) logits, four sinks, a recent window. Not normalised.
__global__ void fill_rows(float* rows, std::size_t count, std::int32_t length, std::uint32_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    std::uint64_t x = (i + 1) * 0x9e3779b97f4a7c15u + seed;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    const float u = (static_cast<float>(x >> 40) + 0.5f) * 0x1p-24f;
    const float v = static_cast<float>(x & 0xffffffu) * 0x1p-24f;
    float logit = 2.5f * sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v);
    const auto position = static_cast<std::int32_t>(i % static_cast<std::size_t>(length));
    if (position < 4) logit += 6.0f;
    if (position >= length - 64) logit += 2.0f;
    rows[i] = expf(logit);
  }
}

struct cell {
  std::ptrdiff_t rows;
  std::ptrdiff_t length;
  double goal_us;
};
constexpr cell table[] = {{8, 8192, 9},     {8, 32768, 12},    {8, 131072, 18},   {64, 32768, 13},    {256, 8192, 13},
                          {256, 32768, 25}, {256, 131072, 75}, {1024, 32768, 70}, {1024, 131072, 260}};

struct device_rows {
  specattn::buffer<float, device> weights;
  specattn::selection<device> lists;
  device_rows(const cell& c, std::uint32_t seed, cudaStream_t stream)
      : weights(static_cast<std::size_t>(c.rows * c.length)), lists(c.rows, c.length) {
    fill_rows<<<1024, 256, 0, stream>>>(weights.data(), weights.size(), static_cast<std::int32_t>(c.length), seed);
  }
  void select(specattn::context<device>& ctx, const cell& c, const specattn::selection_rule& rule) {
    specattn::importance<float, device> from;
    from.weights = weights.shaped({c.rows, 1, c.length});
    auto out = lists.view();
    out.mass = {};
    specattn::select(ctx, from, rule, out);
  }
};

/// The first eight rows' lists against the CPU's. Returns the share of positions kept.
double validated(const device_rows& got, const cell& c, const specattn::selection_rule& rule) {
  const std::ptrdiff_t rows = c.rows < 8 ? c.rows : 8;
  const auto cells = static_cast<std::size_t>(rows * c.length);
  std::vector<float> weights(cells);
  std::vector<std::int32_t> positions(cells), counts(static_cast<std::size_t>(rows));
  bench::check(cudaMemcpy(weights.data(), got.weights.data(), cells * 4, cudaMemcpyDeviceToHost));
  const auto lists = got.lists.view();
  bench::check(cudaMemcpy(positions.data(), lists.positions.data(), cells * 4, cudaMemcpyDeviceToHost));
  bench::check(cudaMemcpy(counts.data(), lists.counts.data(), counts.size() * 4, cudaMemcpyDeviceToHost));
  specattn::context<specattn::cpu> ctx;
  specattn::selection<specattn::cpu> want(rows, c.length);
  specattn::importance<float> from;
  from.weights = {weights.data(), {rows, 1, c.length}};
  ctx.reserve_workspace(specattn::select_workspace_bytes(ctx, rows, 1, c.length, rule));
  specattn::select(ctx, from, rule, want.view());
  double kept = 0;
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    const std::int32_t count = want.view().counts[r];
    if (counts[static_cast<std::size_t>(r)] != count ||
        std::memcmp(&want.view().positions(r, 0), positions.data() + r * c.length,
                    static_cast<std::size_t>(count) * 4) != 0) {
      std::fprintf(stderr, "row %td of %td x %td: %d positions, the CPU keeps %d or others\n", r, c.rows, c.length,
                   counts[static_cast<std::size_t>(r)], count);
      std::exit(1);
    }
    kept += static_cast<double>(count) / static_cast<double>(c.length * rows);
  }
  return kept;
}

void measure(const cell& c, specattn::context<device>& ctx, bench::device_clock& clock, double copy, bool smoke) {
  const double bytes = 4.0 * static_cast<double>(c.rows * c.length);
  const int sets = smoke ? 1 : static_cast<int>(std::min(64.0, 2.0 + 256e6 / bytes));  // together beyond the L2
  std::vector<std::unique_ptr<device_rows>> data;
  for (int i = 0; i < sets; ++i) data.push_back(std::make_unique<device_rows>(c, 77u + i, ctx.stream()));
  for (const float p : {0.95f, 1.0f}) {
    specattn::selection_rule rule;
    rule.top_p = p;
    data[0]->select(ctx, c, rule);
    bench::check(cudaStreamSynchronize(ctx.stream()));
    const double kept = validated(*data[0], c, rule);
    if (smoke) continue;
    const double cold =
        clock.net_us([&](int i) { data[static_cast<std::size_t>(i % sets)]->select(ctx, c, rule); }, 2 * sets);
    const double warm = clock.net_us([&](int) { data[0]->select(ctx, c, rule); }, 20);
    const double moved = bytes + kept * bytes;
    std::printf("| %td | %td | %.2f | %.1f | %.1f | %.1f | %s | %.1f | %.0f | %.0f %% |\n", c.rows, c.length, p,
                100 * kept, cold, warm, p < 1 ? std::to_string(static_cast<int>(c.goal_us)).c_str() : "-",
                moved * 1e-6, moved * 1e-3 / cold, 100 * moved * 1e-3 / cold / copy);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "SKIPPED: no CUDA device\n");
    return 77;
  }
  const bool smoke = argc > 1 && std::strcmp(argv[1], "--smoke") == 0;
  cudaStream_t stream;
  bench::check(cudaStreamCreate(&stream));
  specattn::context<device> ctx(stream);
  bench::device_clock clock(stream);
  bench::print_device();
  const double copy = smoke ? 1 : bench::copy_bandwidth(clock, stream);
  std::printf("copy: %.0f GB/s; times are graph replays less an empty node of %.2f us; fp32, 4 sinks, 16 recent\n",
              copy, clock.empty_us());
  std::printf(
      "| rows | length | p | kept %% | cold us | warm us | goal us | MB | GB/s cold | of copy "
      "|\n|---|---|---|---|---|---|---|---|---|---|\n");
  if (argc == 3) {
    measure({std::atol(argv[1]), std::atol(argv[2]), 0}, ctx, clock, copy, false);
    return 0;
  }
  for (const cell& c : table) {
    measure(c, ctx, clock, copy, smoke);
    if (smoke) break;
  }
  return 0;
}
