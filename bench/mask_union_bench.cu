// mask_union() on the device: 6 slots of 8 kv heads, each list 22 % of the prefix, of which neighbours share nine in ten. The
// CPU's unions judge the device's before anything is timed. Bytes are those of the lists read and of the unions written.
//   mask_union_bench_cuda [--smoke]
#include "specattn/cuda/mask_union.cuh"

#include <random>
#include <vector>

#include "cuda_harness.cuh"
#include "specattn/cpu/mask_union.hpp"

namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's

constexpr std::int32_t kv_heads = 8, slots = 6;
constexpr double share = 0.22, own = 0.1;

template <specattn::backend B>
struct memory {
  template <class T>
  using buffer = specattn::buffer<T, B>;
  buffer<std::int32_t> lists, list_counts, slot_offsets, kv_lens, positions, counts;
  buffer<std::uint32_t> words;

  specattn::mask_union_args<B> args(std::int32_t sequences, std::int32_t kv_len) const {
    const std::ptrdiff_t groups = std::ptrdiff_t{sequences} * kv_heads;
    specattn::mask_union_args<B> a;
    a.lists.positions = lists.shaped({groups * slots, kv_len});
    a.lists.counts = list_counts.shaped({groups * slots});
    a.slot_offsets = slot_offsets.shaped({sequences + 1});
    a.kv_lens = kv_lens.shaped({sequences});
    a.kv_heads = kv_heads;
    a.out.positions = positions.shaped({groups, kv_len});
    a.out.counts = counts.shaped({groups});
    a.slot_masks = words.shaped({groups, kv_len});
    return a;
  }
};

template <class T>
specattn::buffer<T> on_host(const std::vector<T>& from) {
  specattn::buffer<T> copy(from.size());
  std::copy(from.begin(), from.end(), copy.data());
  return copy;
}
template <class T>
specattn::buffer<T, device> on_device(const specattn::buffer<T>& from) {
  specattn::buffer<T, device> copy(from.size());
  bench::check(cudaMemcpy(copy.data(), from.data(), from.bytes(), cudaMemcpyHostToDevice));
  return copy;
}
template <class T>
bool same(const specattn::buffer<T, device>& got, const specattn::buffer<T>& want) {
  std::vector<T> copy(got.size());
  bench::check(cudaMemcpy(copy.data(), got.data(), got.bytes(), cudaMemcpyDeviceToHost));
  return std::equal(copy.begin(), copy.end(), want.data());
}

memory<specattn::cpu> drawn(std::int32_t sequences, std::int32_t kv_len) {
  std::mt19937 engine(5);
  const auto so = [&](double probability) { return engine() * 0x1p-32 < probability; };
  const auto row = static_cast<std::size_t>(kv_len), groups = static_cast<std::size_t>(sequences * kv_heads);
  std::vector<std::int32_t> lists(groups * slots * row, -1), counts(groups * slots, 0), offsets;
  for (std::size_t g = 0; g < groups; ++g) {
    for (std::int32_t at = 0; at < kv_len; ++at) {
      const bool common = so(share);
      for (std::size_t slot = 0; slot < slots; ++slot) {
        const std::size_t list = (g / kv_heads * slots + slot) * kv_heads + g % kv_heads;
        if (so(own) ? so(share) : common) lists[list * row + static_cast<std::size_t>(counts[list]++)] = at;
      }
    }
  }
  for (std::int32_t s = 0; s <= sequences; ++s) offsets.push_back(s * slots);
  memory<specattn::cpu> made;
  made.lists = on_host(lists);
  made.list_counts = on_host(counts);
  made.slot_offsets = on_host(offsets);
  made.kv_lens = on_host(std::vector<std::int32_t>(static_cast<std::size_t>(sequences), kv_len));
  made.positions = specattn::buffer<std::int32_t>(groups * row);
  made.counts = specattn::buffer<std::int32_t>(groups);
  made.words = specattn::buffer<std::uint32_t>(groups * row);
  return made;
}

void measure(std::int32_t sequences, std::int32_t kv_len, specattn::context<device>& ctx, bench::device_clock& clock,
             double copy) {
  const memory<specattn::cpu> host = drawn(sequences, kv_len);
  std::vector<memory<device>> sets;  // more than the L2 holds, so that lists are cold
  const int wanted = std::clamp(static_cast<int>(3e8 / static_cast<double>(host.lists.bytes() * share)), 2, 200);
  for (int i = 0; i < wanted; ++i)
    sets.push_back({on_device(host.lists), on_device(host.list_counts), on_device(host.slot_offsets),
                    on_device(host.kv_lens), on_device(host.positions), on_device(host.counts),
                    on_device(host.words)});
  specattn::context<specattn::cpu> cpu(2);
  specattn::mask_union(cpu, host.args(sequences, kv_len));
  const auto run = [&](int i) {
    specattn::mask_union(ctx, sets[static_cast<std::size_t>(i % wanted)].args(sequences, kv_len));
  };
  run(0);
  bench::check(cudaStreamSynchronize(ctx.stream()));
  if (!same(sets[0].positions, host.positions) || !same(sets[0].counts, host.counts) ||
      !same(sets[0].words, host.words)) {
    std::fprintf(stderr, "%d sequences, kv_len %d: not the CPU's unions\n", sequences, kv_len);
    std::exit(1);
  }
  double read = 0, written = 0;
  for (std::size_t i = 0; i < host.list_counts.size(); ++i) read += 4.0 * host.list_counts.data()[i];
  for (std::size_t i = 0; i < host.counts.size(); ++i) written += 8.0 * host.counts.data()[i];
  const double us = clock.net_us(run, (std::max)(wanted, 8)), bytes = read + written;
  std::printf("| %d | %d | %.1f | %.2f | %.2f | %.0f | %.0f %% |\n", sequences, kv_len, us, read * 1e-6,
              written * 1e-6, bytes * 1e-3 / us, 100 * bytes * 1e-3 / us / copy);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (bench::no_device()) return bench::skipped;
  bench::opened_device opened(argc, argv);
  std::printf("copy: %.0f GB/s; times are graph replays less an empty node of %.2f us\n", opened.copy_gb_s,
              opened.clock.empty_us());
  std::printf("| sequences | kv_len | us | MB read | MB written | GB/s | of copy |\n|---|---|---|---|---|---|---|\n");
  if (opened.smoke) {
    measure(2, 700, opened.ctx, opened.clock, opened.copy_gb_s);
    return 0;
  }
  measure(1, 8192, opened.ctx, opened.clock, opened.copy_gb_s);
  measure(1, 32768, opened.ctx, opened.clock, opened.copy_gb_s);
  measure(1, 131072, opened.ctx, opened.clock, opened.copy_gb_s);
  measure(8, 32768, opened.ctx, opened.clock, opened.copy_gb_s);
  measure(32, 32768, opened.ctx, opened.clock, opened.copy_gb_s);  // or as many layers of one sequence
  return 0;
}
