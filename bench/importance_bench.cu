// Importance and selection on the device, for the shapes of two pairs of models: four recorded steps, p = 0.95. What
// mix_importance() writes is compared with the definition at 64 positions of every group before anything is timed.
//   importance_bench_cuda [--smoke | PAIR KV_LEN]    PAIR: 0 or 1
#include "specattn/cuda/importance.cuh"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cuda_harness.cuh"
#include "specattn/cuda/select.cuh"

namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's

constexpr double tensor_tflops = 790;  // what a large bf16 product reaches on an H200; the arithmetic floor's rate
constexpr std::int32_t steps = 4;

struct pair_shape {
  const char* name;
  std::int32_t draft_layers, draft_heads, layers, kv_heads;
  std::int32_t groups() const { return layers * kv_heads; }
  std::int32_t heads() const { return draft_layers * draft_heads; }
};
constexpr pair_shape pairs[] = {{"Llama-2-7B from TinyLlama", 22, 32, 32, 32},
                                {"Llama-3.1-8B from Llama-3.2-1B", 16, 32, 32, 8}};

/// Exponentials of N(0, 2.5) logits with four sinks and a recent window: not normalised.
template <class T>
__global__ void fill_rows(T* rows, std::size_t count, std::int32_t length, std::uint32_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    std::uint64_t x = (i + 1) * 0x9e3779b97f4a7c15u + seed;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    const float u = (static_cast<float>(x >> 40) + 0.5f) * 0x1p-24f;
    const float v = static_cast<float>(x & 0xffffffu) * 0x1p-24f;
    float logit = 2.5f * sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v) - 6.0f;
    const auto position = static_cast<std::int32_t>(i % static_cast<std::size_t>(length));
    if (position < 4) logit += 6.0f;
    if (position >= length - 64) logit += 2.0f;
    rows[i] = specattn::from_float<T>(expf(logit));
  }
}

/// `terms` random draft heads, a window of 64, the sinks and, if wanted, history for each group.
specattn::sparse_mixture make_mixture(const pair_shape& pair, int terms, bool history) {
  std::mt19937 random(5);
  specattn::sparse_mixture mixture;
  mixture.kv_heads = pair.kv_heads;
  mixture.signals = {pair.draft_layers, pair.draft_heads, {64}, 4, history};
  mixture.first.push_back(0);
  for (std::int32_t g = 0; g < pair.groups(); ++g) {
    std::vector<bool> used(static_cast<std::size_t>(pair.heads()));
    for (int t = 0; t < terms; ++t) used[random() % used.size()] = true;
    for (std::int32_t h = 0; h < pair.heads(); ++h) {
      if (used[static_cast<std::size_t>(h)])
        mixture.terms.push_back({h, static_cast<float>(1 + random() % 1000) / static_cast<float>(500 * terms)});
    }
    for (std::int32_t s = pair.heads(); s < mixture.signals.count(); ++s) mixture.terms.push_back({s, 0.02f});
    mixture.first.push_back(static_cast<std::int32_t>(mixture.terms.size()));
  }
  return mixture;
}

template <class T>
struct inputs {
  specattn::buffer<T, device> weights;
  specattn::buffer<float, device> masses;
  specattn::importance_args<device, T> args;
  inputs(const pair_shape& pair, std::int32_t kv_len, std::uint32_t seed, float* out, cudaStream_t stream)
      : weights(static_cast<std::size_t>(steps * pair.heads()) * static_cast<std::size_t>(kv_len)),
        masses(static_cast<std::size_t>(steps * pair.heads())) {
    fill_rows<<<1024, 256, 0, stream>>>(weights.data(), weights.size(), kv_len, seed);
    std::vector<float> host(masses.size());
    for (std::size_t i = 0; i < host.size(); ++i)
      host[i] = 0.05f * static_cast<float>(kv_len) * (1.0f + static_cast<float>(i % 7) / 7.0f);
    bench::check(cudaMemcpy(masses.data(), host.data(), masses.bytes(), cudaMemcpyHostToDevice));
    args.draft_weights = {weights.data(), {steps, pair.draft_layers, pair.draft_heads, kv_len}};
    args.masses = {masses.data(), {steps, pair.draft_layers, pair.draft_heads}};
    args.kv_len = kv_len;
    args.out = {out, {pair.layers, pair.kv_heads, 1, kv_len}};
  }
};

/// The importance of `position` for every group, by the definition.
template <class T>
std::vector<double> exact_column(const inputs<T>& in, const specattn::sparse_mixture& mixture,
                                 std::int32_t position) {
  const std::int32_t kv_len = in.args.kv_len, heads = mixture.signals.draft_heads();
  std::vector<T> column(in.masses.size());
  std::vector<float> masses(in.masses.size());
  bench::check(cudaMemcpy(masses.data(), in.masses.data(), in.masses.bytes(), cudaMemcpyDeviceToHost));
  bench::check(cudaMemcpy2D(column.data(), sizeof(T), in.weights.data() + position,
                            sizeof(T) * static_cast<std::size_t>(kv_len), sizeof(T), column.size(),
                            cudaMemcpyDeviceToHost));
  std::vector<double> signals(static_cast<std::size_t>(mixture.signals.count()));
  for (std::size_t i = 0; i < column.size(); ++i)
    signals[i % static_cast<std::size_t>(heads)] +=
        static_cast<double>(specattn::to_float(column[i])) / masses[i] / steps;
  signals[static_cast<std::size_t>(heads)] = position >= kv_len - 64 ? 1.0 / 64 : 0.0;
  signals[static_cast<std::size_t>(heads) + 1] = position < 4 ? 0.25 : 0.0;
  std::vector<double> sums(static_cast<std::size_t>(mixture.groups()));
  for (std::size_t g = 0; g < sums.size(); ++g) {
    for (std::int32_t t = mixture.first[g]; t < mixture.first[g + 1]; ++t) {
      const auto term = mixture.terms[static_cast<std::size_t>(t)];
      sums[g] += static_cast<double>(term.coefficient) * signals[static_cast<std::size_t>(term.signal)];
    }
  }
  return sums;
}

/// Root of the mean squared relative error; ends the program where an error is beyond importance_error.
template <class T>
double validated(const inputs<T>& in, const specattn::sparse_mixture& mixture) {
  const std::int32_t kv_len = in.args.kv_len;
  double squares = 0.0;
  std::size_t count = 0;
  for (std::int32_t n = 0; n < 64; ++n) {
    const std::int32_t position = n < 3 ? n : n > 60 ? kv_len - 64 + n : (n * 7919 + 13) % kv_len;
    const std::vector<double> want = exact_column(in, mixture, position);
    std::vector<float> got(want.size());
    bench::check(cudaMemcpy2D(got.data(), 4, in.args.out.data() + position, 4 * static_cast<std::size_t>(kv_len), 4,
                              got.size(), cudaMemcpyDeviceToHost));
    for (std::size_t g = 0; g < got.size(); ++g, ++count) {
      const double error = std::abs(got[g] - want[g]) / want[g];
      squares += error * error;
      if (!(error < specattn::importance_error<device>)) {
        std::fprintf(stderr, "group %zu, position %d: %g, expected %g\n", g, position, got[g], want[g]);
        std::exit(1);
      }
    }
  }
  return std::sqrt(squares / static_cast<double>(count));
}

template <class T>
void measure(const pair_shape& pair, std::int32_t kv_len, bool history, specattn::context<device>& ctx,
             bench::device_clock& clock, double copy, bool smoke) {
  const auto cells = static_cast<std::size_t>(pair.groups()) * static_cast<std::size_t>(kv_len);
  const double read = static_cast<double>(sizeof(T)) * steps * pair.heads() * kv_len;
  const double written = 4.0 * static_cast<double>(cells);
  const double tflop = 2e-12 * pair.heads() * static_cast<double>(cells);
  const auto host = make_mixture(pair, 32, history);
  const specattn::resident_mixture<device> mixture(host);
  specattn::buffer<float, device> rows(cells);
  specattn::selection<device> lists(pair.groups(), kv_len);
  const int sets = smoke ? 1 : static_cast<int>(1.0 + 200e6 / read) + 1;  // together beyond the L2
  std::vector<std::unique_ptr<inputs<T>>> data;
  for (int i = 0; i < sets; ++i)
    data.push_back(
        std::make_unique<inputs<T>>(pair, kv_len, 7u + static_cast<unsigned>(i), rows.data(), ctx.stream()));
  specattn::importance<float, device> from;
  from.weights = rows.shaped({pair.groups(), 1, kv_len});
  auto out = lists.view();
  out.mass = {};
  const specattn::selection_rule rule;
  ctx.reserve_workspace((std::max)(specattn::importance_workspace_bytes(ctx, mixture, steps, kv_len),
                                   specattn::select_workspace_bytes(ctx, pair.groups(), 1, kv_len, rule)));
  const auto mix = [&](int i) {
    specattn::mix_importance(ctx, mixture, data[static_cast<std::size_t>(i % sets)]->args);
  };
  mix(0);
  bench::check(cudaStreamSynchronize(ctx.stream()));
  const double error = validated(*data[0], host);
  specattn::select(ctx, from, rule, out);
  std::vector<std::int32_t> counts(static_cast<std::size_t>(pair.groups()));
  bench::check(cudaStreamSynchronize(ctx.stream()));
  bench::check(cudaMemcpy(counts.data(), out.counts.data(), counts.size() * 4, cudaMemcpyDeviceToHost));
  double kept = 0.0;
  for (const std::int32_t count : counts) kept += 4.0 * count;
  specattn::buffer<float, device> history_weights(history ? cells : 0);
  if (history) {  // what was kept becomes the round before's list
    fill_rows<<<1024, 256, 0, ctx.stream()>>>(history_weights.data(), cells, kv_len, 3u);
    for (auto& each : data) {
      each->args.history.positions = out.positions;
      each->args.history.counts = out.counts;
      each->args.history.weights = history_weights.shaped({pair.groups(), kv_len});
    }
  }
  if (smoke) return;
  const double importance_us = clock.net_us(mix, 2 * sets < 6 ? 6 : 2 * sets);
  const double select_us = clock.net_us([&](int) { specattn::select(ctx, from, rule, out); }, 6);
  const double total_us = clock.net_us([&](int i) { mix(i), specattn::select(ctx, from, rule, out); }, 6);
  const double mix_floor = std::max((read + written) * 1e-3 / copy, tflop * 1e6 / tensor_tflops);
  const double select_floor = (written + kept) * 1e-3 / copy;
  std::printf("| %s | %s | %d | %s | %.0f | %.1f | %.1f | %.1f | %.0f | %.1f | %.1f | %.1f | %.1f | %.2f | %.2f |\n",
              pair.name, sizeof(T) == 4 ? "fp32" : "bf16", kv_len, history ? "yes" : "no", (read + written) * 1e-6,
              tflop * 1e3, importance_us, mix_floor, (read + written) * 1e-3 / importance_us, select_us, select_floor,
              total_us, mix_floor + select_floor, total_us / (mix_floor + select_floor), 100 * error);
  std::fflush(stdout);
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
  std::printf(
      "copy: %.0f GB/s; times are graph replays less an empty node of %.2f us, inputs cold; %d steps, 32 terms a "
      "group; arithmetic floor at %.0f TFLOP/s\n",
      copy, clock.empty_us(), steps, tensor_tflops);
  std::printf(
      "| pair | recording | kv_len | history | MB | GFLOP | importance us | floor us | GB/s | select us | floor us "
      "| both us | floor us | of floor | rms error %% |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
      "---|\n");
  if (argc == 3) {
    measure<specattn::bf16>(pairs[std::atoi(argv[1]) % 2], std::atoi(argv[2]), false, ctx, clock, copy, false);
    return 0;
  }
  for (const pair_shape& pair : pairs) {
    for (const std::int32_t kv_len : {8192, 32768, 131072}) {
      measure<specattn::bf16>(pair, kv_len, false, ctx, clock, copy, smoke);
      if (smoke) return 0;
      measure<float>(pair, kv_len, false, ctx, clock, copy, smoke);
      if (kv_len == 32768) measure<specattn::bf16>(pair, kv_len, true, ctx, clock, copy, smoke);
    }
  }
  return 0;
}
