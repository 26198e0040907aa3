// Importance and selection on the device, for the shapes of two pairs of models, p = 0.95: four recorded steps, one as a
// sparse draft leaves it, and a batch. What mix_importance() writes is compared with the definition at 64 positions of
// every group before anything is timed.
//   importance_bench_cuda [--smoke | PAIR KV_LEN STEPS BATCH]    PAIR: 0 or 1; floats to fp16
#include "specattn/cuda/importance.cuh"

#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cuda_harness.cuh"
#include "specattn/cuda/select.cuh"

namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's

constexpr double tensor_tflops = 790;  // what a large bf16 product reaches on an H200; the arithmetic floor's rate

struct pair_shape {
  const char* name;
  std::int32_t draft_layers, draft_heads, layers, kv_heads;
  std::int32_t groups() const { return layers * kv_heads; }
  std::int32_t heads() const { return draft_layers * draft_heads; }
};
constexpr pair_shape pairs[] = {{"Llama-2-7B from TinyLlama", 22, 32, 32, 32},
                                {"Llama-3.1-8B from Llama-3.2-1B", 16, 32, 32, 8}};

struct problem {
  pair_shape pair;
  std::int32_t kv_len, steps, batch;
  bool history;
  std::int32_t rows() const { return steps * batch * pair.heads(); }
  std::int32_t groups() const { return batch * pair.groups(); }
};

/// Exponentials of N(0, 2.5) logits with four sinks and a recent window: not normalised.
template <class T>
__global__ void fill_rows(T* rows, std::size_t count, std::int32_t length, std::uint32_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    float logit = 2.5f * bench::normal(i, seed) - 6.0f;
    const auto position = static_cast<std::int32_t>(i % static_cast<std::size_t>(length));
    if (position < 4) logit += 6.0f;
    if (position >= length - 64) logit += 2.0f;
    rows[i] = specattn::from_float<T>(expf(logit));
  }
}

/// What each row sums to. A CTA takes a row.
template <class T>
__global__ void sum_rows(const T* rows, std::int32_t length, float* sums) {
  __shared__ float parts[256];
  float sum = 0.0f;
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < length; i += 256)
    sum += specattn::to_float(
        rows[static_cast<std::size_t>(blockIdx.x) * static_cast<std::size_t>(length) + static_cast<std::size_t>(i)]);
  parts[threadIdx.x] = sum;
  for (unsigned apart = 128; apart > 0; apart /= 2) {
    __syncthreads();
    if (threadIdx.x < apart) parts[threadIdx.x] += parts[threadIdx.x + apart];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = parts[0];
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
        mixture.terms.push_back({h, static_cast<float>(1 + random() % 1000) / static_cast<float>(600 * terms)});
    }
    for (std::int32_t s = pair.heads(); s < mixture.signals.count(); ++s) mixture.terms.push_back({s, 0.02f});
    mixture.first.push_back(static_cast<std::int32_t>(mixture.terms.size()));
  }
  return mixture;
}

template <class T, class U>
struct inputs {
  problem of;
  specattn::buffer<T, device> weights;
  specattn::buffer<float, device> masses;
  specattn::importance_args<device, T, U> args;
  inputs(const problem& p, std::uint32_t seed, U* out, cudaStream_t stream)
      : of(p),
        weights(static_cast<std::size_t>(p.rows()) * static_cast<std::size_t>(p.kv_len)),
        masses(static_cast<std::size_t>(p.rows())) {
    const pair_shape& pair = p.pair;
    fill_rows<<<1024, 256, 0, stream>>>(weights.data(), weights.size(), p.kv_len, seed);
    sum_rows<<<static_cast<unsigned>(p.rows()), 256, 0, stream>>>(weights.data(), p.kv_len, masses.data());
    args.draft_weights = {weights.data(), {p.steps, pair.draft_layers, p.batch, pair.draft_heads, p.kv_len}};
    args.masses = {masses.data(), {p.steps, pair.draft_layers, p.batch, pair.draft_heads}};
    args.kv_len = p.kv_len;
    args.out = {out, {pair.layers, p.batch, pair.kv_heads, 1, p.kv_len}};
  }
};

/// The importance of `position` for every group of every sequence, by the definition.
template <class T, class U>
std::vector<double> exact_column(const inputs<T, U>& in, const specattn::sparse_mixture& mixture,
                                 std::int32_t position) {
  const problem& p = in.of;
  const std::int32_t q_heads = p.pair.draft_heads, kv_heads = p.pair.kv_heads;
  std::vector<T> column(in.masses.size());
  std::vector<float> masses(in.masses.size());
  bench::check(cudaMemcpy(masses.data(), in.masses.data(), in.masses.bytes(), cudaMemcpyDeviceToHost));
  bench::check(cudaMemcpy2D(column.data(), sizeof(T), in.weights.data() + position,
                            sizeof(T) * static_cast<std::size_t>(p.kv_len), sizeof(T), column.size(),
                            cudaMemcpyDeviceToHost));
  std::vector<double> sums(static_cast<std::size_t>(p.groups()));
  for (std::int32_t s = 0; s < p.batch; ++s) {
    std::vector<double> signals(static_cast<std::size_t>(mixture.signals.count()));
    for (std::int32_t i = 0; i < p.rows(); ++i) {
      const auto row = static_cast<std::size_t>(i);
      if (i / q_heads % p.batch != s) continue;
      const std::int32_t head = i / (q_heads * p.batch) % p.pair.draft_layers * q_heads + i % q_heads;
      signals[static_cast<std::size_t>(head)] +=
          static_cast<double>(specattn::to_float(column[row])) / masses[row] / p.steps;
    }
    const auto heads = static_cast<std::size_t>(p.pair.heads());
    signals[heads] = position >= p.kv_len - 64 ? 1.0 / 64 : 0.0;
    signals[heads + 1] = position < 4 ? 0.25 : 0.0;
    for (std::int32_t g = 0; g < p.pair.groups(); ++g) {
      double& sum = sums[static_cast<std::size_t>((g / kv_heads * p.batch + s) * kv_heads + g % kv_heads)];
      for (std::int32_t t = mixture.first[static_cast<std::size_t>(g)];
           t < mixture.first[static_cast<std::size_t>(g) + 1]; ++t) {
        const auto term = mixture.terms[static_cast<std::size_t>(t)];
        sum += static_cast<double>(term.coefficient) * signals[static_cast<std::size_t>(term.signal)];
      }
    }
  }
  return sums;
}

/// Root of the mean squared relative error; ends the program where an error is beyond importance_error.
template <class T, class U>
double validated(const inputs<T, U>& in, const specattn::sparse_mixture& mixture) {
  const std::int32_t kv_len = in.of.kv_len;
  double squares = 0.0;
  std::size_t count = 0;
  for (std::int32_t n = 0; n < 64; ++n) {
    const std::int32_t position = n < 3 ? n : n > 60 ? kv_len - 64 + n : (n * 7919 + 13) % kv_len;
    const std::vector<double> want = exact_column(in, mixture, position);
    std::vector<U> got(want.size());
    bench::check(cudaMemcpy2D(got.data(), sizeof(U), in.args.out.data() + position,
                              sizeof(U) * static_cast<std::size_t>(kv_len), sizeof(U), got.size(),
                              cudaMemcpyDeviceToHost));
    for (std::size_t g = 0; g < got.size(); ++g, ++count) {
      const double value = static_cast<double>(specattn::to_float(got[g])) * specattn::importance_unit<U>;
      const double error = std::abs(value - want[g]) / want[g];
      squares += error * error;
      if (!(error < specattn::importance_error<device>)) {
        std::fprintf(stderr, "group %zu, position %d: %g, expected %g\n", g, position, value, want[g]);
        std::exit(1);
      }
    }
  }
  return std::sqrt(squares / static_cast<double>(count));
}

/// What one problem needs at the least, in microseconds.
struct floors {
  double bytes, tflop, importance, selection;
  floors(double read, double written, double kept, double operations, double copy)
      : bytes(read + written),
        tflop(operations * 1e-12),
        importance(std::max(bytes * 1e-3 / copy, tflop * 1e6 / tensor_tflops)),
        selection((written + kept) * 1e-3 / copy) {}
};

template <class T, class U>
void measure(const problem& p, specattn::context<device>& ctx, bench::device_clock& clock, double copy, bool smoke) {
  const auto cells = static_cast<std::size_t>(p.groups()) * static_cast<std::size_t>(p.kv_len);
  const double read = static_cast<double>(sizeof(T)) * p.rows() * p.kv_len;
  const auto host = make_mixture(p.pair, 32, p.history);
  const specattn::resident_mixture<device> mixture(host);
  specattn::buffer<U, device> rows(cells);
  specattn::selection<device> lists(p.groups(), p.kv_len);
  const int sets = smoke ? 1 : static_cast<int>(1.0 + 200e6 / read) + 1;  // together beyond the L2
  std::vector<std::unique_ptr<inputs<T, U>>> data;
  for (int i = 0; i < sets; ++i)
    data.push_back(std::make_unique<inputs<T, U>>(p, 7u + static_cast<unsigned>(i), rows.data(), ctx.stream()));
  specattn::weight_rows<U, device> from;
  from.weights = rows.shaped({p.groups(), 1, p.kv_len});
  auto out = lists.view();
  out.mass = {};
  const specattn::selection_rule rule;
  ctx.reserve_workspace((std::max)(specattn::importance_workspace_bytes(ctx, mixture, p.steps, p.kv_len, p.batch),
                                   specattn::select_workspace_bytes(ctx, p.groups(), 1, p.kv_len, rule)));
  const auto mix = [&](int i) {
    specattn::mix_importance(ctx, mixture, data[static_cast<std::size_t>(i % sets)]->args);
  };
  mix(0);
  bench::check(cudaStreamSynchronize(ctx.stream()));
  const double error = validated(*data[0], host);
  specattn::select(ctx, from, rule, out);
  std::vector<std::int32_t> counts(static_cast<std::size_t>(p.groups()));
  bench::check(cudaStreamSynchronize(ctx.stream()));
  bench::check(cudaMemcpy(counts.data(), out.counts.data(), counts.size() * 4, cudaMemcpyDeviceToHost));
  double kept = 0.0;
  for (const std::int32_t count : counts) kept += 4.0 * count;
  specattn::buffer<float, device> history_weights(p.history ? cells : 0);
  if (p.history) {  // what was kept becomes the round before's list
    fill_rows<<<1024, 256, 0, ctx.stream()>>>(history_weights.data(), cells, p.kv_len, 3u);
    for (auto& each : data) {
      each->args.history.positions = {out.positions.data(), {1, p.groups(), p.kv_len}};
      each->args.history.counts = {out.counts.data(), {1, p.groups()}};
      each->args.history.weights = {history_weights.data(), {1, p.groups(), p.kv_len}};
    }
  }
  if (smoke) return;
  const floors least(read + (p.history ? 2 * kept : 0), sizeof(U) * static_cast<double>(cells), kept,
                     2.0 * p.pair.heads() * static_cast<double>(cells), copy);
  const double importance_us = clock.net_us(mix, 2 * sets < 6 ? 6 : 2 * sets);
  const double select_us = clock.net_us([&](int) { specattn::select(ctx, from, rule, out); }, 6);
  const double total_us = clock.net_us([&](int i) { mix(i), specattn::select(ctx, from, rule, out); }, 6);
  const double floor = least.importance + least.selection;
  std::printf(
      "| %s | %d | %s | %s | %d | %d | %s | %.0f | %.1f | %.1f | %.1f | %.2f | %.0f | %.1f | %.1f | %.1f | %.1f | "
      "%.2f | "
      "%.2f |\n",
      p.pair.name, p.batch, sizeof(T) == 4 ? "fp32" : "bf16", sizeof(U) == 4 ? "fp32" : "fp16", p.steps, p.kv_len,
      p.history ? "yes" : "no", least.bytes * 1e-6, least.tflop * 1e3, importance_us, least.importance,
      importance_us / least.importance, least.bytes * 1e-3 / importance_us, select_us, least.selection, total_us,
      floor, total_us / floor, 100 * error);
  std::fflush(stdout);
}

/// Lists of every group from rows stored as U, and the rows.
template <class U>
struct chosen {
  std::vector<std::int32_t> positions, counts;
  std::vector<U> rows;
  chosen(const problem& p, const specattn::sparse_mixture& host, specattn::context<device>& ctx) {
    const specattn::resident_mixture<device> mixture(host);
    specattn::buffer<U, device> out(static_cast<std::size_t>(p.groups()) * static_cast<std::size_t>(p.kv_len));
    const inputs<float, U> in(p, 7u, out.data(), ctx.stream());
    specattn::selection<device> lists(p.groups(), p.kv_len);
    specattn::weight_rows<U, device> from;
    from.weights = out.shaped({p.groups(), 1, p.kv_len});
    ctx.reserve_workspace(specattn::importance_workspace_bytes(ctx, mixture, p.steps, p.kv_len, p.batch));
    specattn::mix_importance(ctx, mixture, in.args);
    specattn::select(ctx, from, specattn::selection_rule{}, lists.view());
    positions.resize(out.size());
    rows.resize(out.size());
    counts.resize(static_cast<std::size_t>(p.groups()));
    bench::check(cudaStreamSynchronize(ctx.stream()));
    const auto view = lists.view();
    bench::check(cudaMemcpy2D(positions.data(), 4 * static_cast<std::size_t>(p.kv_len), view.positions.data(),
                              4 * static_cast<std::size_t>(view.positions.stride(0)),
                              4 * static_cast<std::size_t>(p.kv_len), counts.size(), cudaMemcpyDeviceToHost));
    bench::check(cudaMemcpy(counts.data(), view.counts.data(), counts.size() * 4, cudaMemcpyDeviceToHost));
    bench::check(cudaMemcpy(rows.data(), out.data(), out.bytes(), cudaMemcpyDeviceToHost));
  }
};

/// What storing importance as fp16 does to the lists: entries that only one of the two has, and the mass they hold.
void compare_lists(const problem& p, specattn::context<device>& ctx) {
  const auto mixture = make_mixture(p.pair, 32, false);
  const chosen<float> wide(p, mixture, ctx);
  const chosen<specattn::fp16> narrow(p, mixture, ctx);
  double entries = 0.0, differ = 0.0, most_differ = 0.0, most_mass = 0.0;
  for (std::int32_t g = 0; g < p.groups(); ++g) {
    const std::size_t at = static_cast<std::size_t>(g) * static_cast<std::size_t>(p.kv_len);
    std::vector<bool> kept(static_cast<std::size_t>(p.kv_len)), also = kept;
    const std::int32_t count = wide.counts[static_cast<std::size_t>(g)];
    for (std::int32_t i = 0; i < count; ++i)
      kept[static_cast<std::size_t>(wide.positions[at + static_cast<std::size_t>(i)])] = true;
    for (std::int32_t i = 0; i < narrow.counts[static_cast<std::size_t>(g)]; ++i)
      also[static_cast<std::size_t>(narrow.positions[at + static_cast<std::size_t>(i)])] = true;
    double here = 0.0, mass = 0.0, gained = 0.0;
    for (std::size_t i = 0; i < kept.size(); ++i) {
      mass += wide.rows[at + i];
      here += kept[i] != also[i] ? 1.0 : 0.0;
      gained += wide.rows[at + i] * (static_cast<double>(also[i]) - static_cast<double>(kept[i]));
    }
    entries += count;
    differ += here;
    most_differ = std::max(most_differ, here / count);
    most_mass = std::max(most_mass, std::abs(gained) / mass);
  }
  std::printf("| %s | %d | %.0f | %.4f | %.4f | %.2g |\n", p.pair.name, p.kv_len, entries / p.groups(),
              100 * differ / entries, 100 * most_differ, most_mass);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (bench::no_device()) return bench::skipped;
  bench::opened_device opened(argc, argv);
  std::printf(
      "copy: %.0f GB/s; times are graph replays less an empty node of %.2f us, inputs cold; 32 terms a group; "
      "arithmetic floor at %.0f TFLOP/s\n",
      opened.copy_gb_s, opened.clock.empty_us(), tensor_tflops);
  std::printf(
      "| pair | batch | recording | rows | steps | kv_len | history | MB | GFLOP | importance us | floor us | of "
      "floor | "
      "GB/s "
      "| select us | floor us | both us | floor us | of floor | rms error %% "
      "|\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
  if (argc == 5) {
    measure<float, specattn::fp16>(
        {pairs[std::atoi(argv[1]) % 2], std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]), false},
        opened.ctx, opened.clock, opened.copy_gb_s, false);
    return 0;
  }
  using specattn::bf16;
  using specattn::fp16;
  const auto measure_all = [&](const problem& p) {
    measure<bf16, float>(p, opened.ctx, opened.clock, opened.copy_gb_s, opened.smoke);
    measure<float, float>(p, opened.ctx, opened.clock, opened.copy_gb_s, opened.smoke);
    measure<bf16, fp16>(p, opened.ctx, opened.clock, opened.copy_gb_s, opened.smoke);
    measure<float, fp16>(p, opened.ctx, opened.clock, opened.copy_gb_s, opened.smoke);
  };
  for (const pair_shape& pair : pairs) {
    for (const std::int32_t kv_len : {8192, 32768, 131072}) {
      measure_all({pair, kv_len, 4, 1, false});
      if (opened.smoke) return 0;
    }
    measure_all({pair, 32768, 1, 1, false});
    measure<bf16, float>({pair, 32768, 4, 1, true}, opened.ctx, opened.clock, opened.copy_gb_s, opened.smoke);
  }
  for (const std::int32_t kv_len : {8192, 32768}) measure_all({pairs[1], kv_len, 1, 8, false});
  std::printf(
      "\nLists from rows of fp16 beside those from floats\n\n| pair | kv_len | entries a list | entries that only "
      "one "
      "has %% | most of a list %% | most mass gained or lost |\n|---|---|---|---|---|---|\n");
  for (const pair_shape& pair : pairs) {
    for (const std::int32_t kv_len : {8192, 32768, 131072}) {
      if (pair.groups() <= 256 || kv_len <= 32768) compare_lists({pair, kv_len, 1, 1, false}, opened.ctx);
    }
  }
  return 0;
}
