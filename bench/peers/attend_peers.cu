// attend() and other libraries' attention over the verify table, on the same caches, queries and lists in one process:
// the pass alone as graph replays less an empty node, and the call from idle to idle with whatever must be planned.
//   attend_peers_cuda [--smoke | BATCH KV_LEN]
#include "peers/attend_peers.cuh"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda_harness.cuh"
#include "specattn/cuda/attend.cuh"

namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's
using bench::reading;
using specattn::bf16;

struct cell {
  std::int32_t batch, kv_len;
};
constexpr cell table[] = {{1, 8192}, {1, 32768}, {1, 131072}, {8, 8192}, {8, 32768}, {16, 32768}};

struct row {
  const char* name;
  reading reads;
  double share;
};
constexpr row rows[] = {{"dense", reading::dense, 1},
                        {"22 %, one list", reading::one_list, 0.22},
                        {"22 %, a list a head", reading::list_a_head, 0.22},
                        {"10 %, one list", reading::one_list, 0.10},
                        {"10 %, a list a head", reading::list_a_head, 0.10}};

__global__ void fill(bf16* to, std::size_t count, std::uint32_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x)
    to[i] = specattn::from_float<bf16>(bench::normal(i, seed));
}

/// Where element i of [sequences, slots, q_heads, head_dim] is in [sequences, kv_heads, slots, group_heads, head_dim].
__device__ std::ptrdiff_t by_head(std::ptrdiff_t i, std::int32_t slots) {
  const std::ptrdiff_t inside = i % (bench::group_heads * bench::head_dim),
                       group = i / (bench::group_heads * bench::head_dim);
  const std::ptrdiff_t head = group % bench::kv_heads, slot = group / bench::kv_heads % slots;
  const std::ptrdiff_t sequence = group / bench::kv_heads / slots;
  return ((sequence * bench::kv_heads + head) * slots + slot) * bench::group_heads * bench::head_dim + inside;
}
/// The same queries three times: as attend() takes them, as peers do, and grouped by kv head.
__global__ void fill_queries(float* q, bf16* rounded, bf16* grouped, std::ptrdiff_t count, std::int32_t slots) {
  const std::ptrdiff_t i = blockIdx.x * std::ptrdiff_t{blockDim.x} + threadIdx.x;
  if (i >= count) return;
  rounded[i] = grouped[by_head(i, slots)] =
      specattn::from_float<bf16>(2.0f * bench::normal(static_cast<std::uint64_t>(i), 99));
  q[i] = specattn::to_float(rounded[i]);
}
/// worst: the largest difference and the largest result.
__global__ void compare(const float* ours, const bf16* theirs, std::ptrdiff_t count, std::int32_t slots, bool grouped,
                        float* worst) {
  const std::ptrdiff_t i = blockIdx.x * std::ptrdiff_t{blockDim.x} + threadIdx.x;
  if (i >= count) return;
  float off = fabsf(ours[i] - specattn::to_float(theirs[grouped ? by_head(i, slots) : i]));
  if (!(off <= 1e30f)) off = 1e30f;  // NaN
  atomicMax(reinterpret_cast<int*>(worst), __float_as_int(off));
  atomicMax(reinterpret_cast<int*>(worst) + 1, __float_as_int(fabsf(ours[i])));
}

template <class T>
specattn::buffer<T, device> upload(const std::vector<T>& host) {
  specattn::buffer<T, device> copy(host.size());
  if (!host.empty()) bench::check(cudaMemcpy(copy.data(), host.data(), copy.bytes(), cudaMemcpyHostToDevice));
  return copy;
}

/// One layer's cache: [sequences, kv_heads, positions, head_dim].
struct layer {
  specattn::buffer<bf16, device> keys, values;
  layer(std::size_t elements, std::uint32_t seed) : keys(elements), values(elements) {
    fill<<<2048, 256>>>(keys.data(), elements, 2 * seed);
    fill<<<2048, 256>>>(values.data(), elements, 2 * seed + 1);
  }
};

/// A row of a cell: the problem as peers take it, and as attend() does.
class pass {
 public:
  pass(const bench::attend_problem& shape, const row& r) : problem_(shape), queries_(shape.batch() * shape.slots) {
    const auto elements = static_cast<std::size_t>(queries_ * bench::q_heads * bench::head_dim);
    q_ = specattn::buffer<float, device>(elements);
    out_ = specattn::buffer<float, device>(elements);
    rounded_ = specattn::buffer<bf16, device>(elements);
    grouped_ = specattn::buffer<bf16, device>(elements);
    fill_queries<<<static_cast<unsigned>(elements / 256), 256>>>(q_.data(), rounded_.data(), grouped_.data(),
                                                                 static_cast<std::ptrdiff_t>(elements), shape.slots);
    std::vector<std::int32_t> offsets, cache_rows;
    for (std::int32_t s = 0; s <= shape.batch(); ++s) offsets.push_back(s * shape.slots), cache_rows.push_back(s);
    offsets_ = upload(offsets);
    table_ = upload(cache_rows);
    kv_lens_ = upload(shape.kv_lens);
    problem_.q = rounded_.data();
    problem_.q_by_head = grouped_.data();
    problem_.reads = r.reads;
    if (r.reads != reading::dense) keep(r);
  }

  const bench::attend_problem& problem() const { return problem_; }
  const specattn::buffer<std::int32_t, device>& counts() const { return counts_; }
  /// Of the keys and values that the pass must read.
  double bytes() const {
    double positions = 0;
    for (const std::int32_t kv_len : problem_.kv_lens)
      positions += bench::kv_heads * (problem_.slots + double(kv_len));
    if (problem_.reads != reading::dense) {
      positions = double(bench::kv_heads) * problem_.slots * problem_.batch();
      for (const auto& list : problem_.kept) positions += static_cast<double>(list.size());
    }
    return positions * 2 * 2 * bench::head_dim;
  }

  specattn::attend_args<bf16, device> args(const layer& l) const {
    specattn::attend_args<bf16, device> a;
    a.q = q_.shaped({queries_, bench::q_heads, bench::head_dim});
    a.out = out_.shaped({queries_, bench::q_heads, bench::head_dim});
    a.kv.keys = l.keys.data();
    a.kv.values = l.values.data();
    a.kv.position_stride = problem_.position_stride;
    a.kv.head_stride = problem_.head_stride;
    a.kv.page_stride = problem_.sequence_stride;
    a.kv.block_table = table_.shaped({problem_.batch(), 1});
    a.kv.kv_heads = bench::kv_heads;
    a.kv.head_dim = bench::head_dim;
    a.slot_offsets = offsets_.shaped({problem_.batch() + 1});
    a.kv_lens = kv_lens_.shaped({problem_.batch()});
    if (problem_.reads != reading::dense) {
      a.kept.positions = lists_.shaped({problem_.batch() * bench::kv_heads, problem_.kv_lens.front()});
      a.kept.counts = counts_.shaped({problem_.batch() * bench::kv_heads});
      a.kept_sequence_stride = bench::kv_heads;
    }
    return a;
  }

  /// The largest difference of a peer's results, in terms of the largest result.
  double off(const bench::attend_peer& peer) const {
    const specattn::buffer<float, device> worst(2);
    const auto count = static_cast<std::ptrdiff_t>(out_.size());
    compare<<<static_cast<unsigned>(count / 256), 256>>>(out_.data(), peer.out(), count, problem_.slots,
                                                         peer.by_head(), worst.data());
    float host[2];
    bench::check(cudaMemcpy(host, worst.data(), sizeof host, cudaMemcpyDeviceToHost));
    return double{host[0]} / double{host[1]};
  }

 private:
  void keep(const row& r) {
    std::mt19937 engine(5);
    const auto capacity = static_cast<std::size_t>(problem_.kv_lens.front());  // the longest
    const auto threshold = static_cast<std::uint64_t>(r.share * 0x1p32);
    std::vector<std::int32_t> lists(static_cast<std::size_t>(problem_.batch()) * bench::kv_heads * capacity, -1),
        counts;
    for (std::size_t g = 0; g < static_cast<std::size_t>(problem_.batch()) * bench::kv_heads; ++g) {
      std::vector<std::int32_t> list;
      if (r.reads == reading::one_list && g % bench::kv_heads != 0) {
        list = problem_.kept.back();
      } else {
        for (std::int32_t p = 0; p < problem_.kv_lens[g / bench::kv_heads]; ++p)
          if (engine() < threshold) list.push_back(p);
      }
      std::copy(list.begin(), list.end(), lists.begin() + static_cast<std::ptrdiff_t>(g * capacity));
      counts.push_back(static_cast<std::int32_t>(list.size()));
      problem_.kept.push_back(std::move(list));
    }
    lists_ = upload(lists);
    counts_ = upload(counts);
  }

  bench::attend_problem problem_;
  std::ptrdiff_t queries_;
  specattn::buffer<float, device> q_, out_;
  specattn::buffer<bf16, device> rounded_, grouped_;
  specattn::buffer<std::int32_t, device> offsets_, table_, kv_lens_, lists_, counts_;
};

/// Median over ten turns of the host's clock around `work`, from an idle device; in microseconds.
double host_us(const std::function<void(int)>& work) {
  std::vector<double> times;
  for (int turn = 0; turn < 12; ++turn) {
    bench::check(cudaDeviceSynchronize());
    const auto begin = std::chrono::steady_clock::now();
    work(turn);
    times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
  }
  std::sort(times.begin() + 2, times.end());  // the first two warm up
  return times[7];
}

/// What a pass took: alone, its plan, and the call of both until the results are there.
struct timing {
  double pass_us = 0, plan_us = 0, call_us = 0;
};

struct bench_run {
  specattn::context<device>& ctx;
  bench::device_clock& clock;
  double copy;
  bool smoke;
  int problems = 0, passes_won = 0, calls_won = 0;
};

timing time_ours(bench_run& b, const pass& p, const std::vector<layer>& layers) {
  const auto run = [&](int i) {
    specattn::attend(b.ctx, p.args(layers[static_cast<std::size_t>(i) % layers.size()]));
  };
  const auto call = [&](int i) {
    run(i);
    bench::check(cudaStreamSynchronize(b.ctx.stream()));
  };
  return {b.clock.net_us(run, std::max(static_cast<int>(layers.size()), 8)), 0, host_us(call)};
}

/// A caller whose counts a selection on the device has made must bring them to the host before it can plan.
timing time_peer(bench_run& b, bench::attend_peer& peer, const pass& p, const std::vector<layer>& layers) {
  const auto run = [&](int i) {
    const layer& l = layers[static_cast<std::size_t>(i) % layers.size()];
    peer.run(l.keys.data(), l.values.data(), b.ctx.stream());
  };
  std::vector<std::int32_t> counts(p.counts().size());
  const auto call = [&](int i) {
    if (!counts.empty()) {
      bench::check(cudaMemcpyAsync(counts.data(), p.counts().data(), p.counts().bytes(), cudaMemcpyDeviceToHost,
                                   b.ctx.stream()));
      bench::check(cudaStreamSynchronize(b.ctx.stream()));
    }
    peer.plan(b.ctx.stream());
    run(i);
    bench::check(cudaStreamSynchronize(b.ctx.stream()));
  };
  return {b.clock.net_us(run, std::max(static_cast<int>(layers.size()), 8)),
          host_us([&](int) { peer.plan(b.ctx.stream()); }), host_us(call)};
}

/// Runs a peer once on the first layer and ends the program if its results are not attend()'s. bf16 results of bf16
/// weights differ by less than 1/64 of the largest; where lists are short, as in --smoke, one position too many or too
/// few makes more than that.
double validated(bench_run& b, bench::attend_peer& peer, const pass& p, const layer& l, const row& r) {
  peer.prepare(p.problem());
  peer.plan(b.ctx.stream());
  peer.run(l.keys.data(), l.values.data(), b.ctx.stream());
  bench::check(cudaStreamSynchronize(b.ctx.stream()));
  const double off = p.off(peer);
  if (b.smoke) std::printf("%s, %d slots, %s: off by %.1e\n", r.name, p.problem().slots, peer.name().c_str(), off);
  if (off > 1.0 / 64) {
    std::fprintf(stderr, "%s, %d slots, %s, %d sequences: off by %g of the largest result\n", r.name,
                 p.problem().slots, peer.name().c_str(), p.problem().batch(), off);
    std::exit(1);
  }
  return off;
}

void measure_row(bench_run& b, const cell& c, const row& r, const bench::attend_problem& shape,
                 const std::vector<layer>& layers) {
  const pass p(shape, r);
  bench::check(cudaDeviceSynchronize());
  timing ours, best{1e30, 0, 1e30};
  if (!b.smoke) ours = time_ours(b, p, layers);
  specattn::attend(b.ctx, p.args(layers[0]));
  std::string cells;
  double off = 0;
  for (const auto& peer : bench::linked_peers()) {
    if (!peer->takes(p.problem())) {
      cells += " - |";
      continue;
    }
    off = std::max(off, validated(b, *peer, p, layers[0], r));
    if (b.smoke) continue;
    const timing theirs = time_peer(b, *peer, p, layers);
    best.pass_us = std::min(best.pass_us, theirs.pass_us);
    best.call_us = std::min(best.call_us, theirs.call_us);
    char text[64];
    std::snprintf(text, sizeof text, " %.1f, %.1f, %.1f |", theirs.pass_us, theirs.plan_us, theirs.call_us);
    cells += text;
  }
  if (b.smoke) return;
  const double gb_s = p.bytes() * 1e-3 / ours.pass_us;
  std::printf("| %d | %d | %d | %s | %.1f | %.1f, %.1f | %.0f | %.0f %% |%s %.2f | %.2f | %.0e |\n", c.batch,
              c.kv_len, shape.slots, r.name, p.bytes() * 1e-6, ours.pass_us, ours.call_us, gb_s, 100 * gb_s / b.copy,
              cells.c_str(), best.pass_us / ours.pass_us, best.call_us / ours.call_us, off);
  std::fflush(stdout);
  ++b.problems;
  b.passes_won += ours.pass_us < best.pass_us;
  b.calls_won += ours.call_us < best.call_us;
}

void measure(bench_run& b, const cell& c) {
  bench::attend_problem shape;
  const std::ptrdiff_t positions = (c.kv_len + 6 + 15) / 16 * 16;
  shape.position_stride = bench::head_dim;
  shape.head_stride = positions * bench::head_dim;
  shape.sequence_stride = shape.head_stride * bench::kv_heads;
  for (std::int32_t s = 0; s < c.batch; ++s) shape.kv_lens.push_back(b.smoke ? c.kv_len - 37 * s : c.kv_len);
  const double layer_bytes = 4.0 * c.batch * bench::kv_heads * c.kv_len * bench::head_dim;
  const int sets = b.smoke ? 1 : static_cast<int>(std::clamp(1e9 / layer_bytes, 2.0, 24.0));
  std::vector<layer> layers;
  for (int i = 0; i < sets; ++i)
    layers.emplace_back(static_cast<std::size_t>(c.batch * shape.sequence_stride), 7u + static_cast<unsigned>(i));
  b.ctx.reserve_workspace(specattn::attend_workspace_bytes(
      b.ctx, {c.batch, c.batch * 6, bench::q_heads, bench::kv_heads, bench::head_dim, c.kv_len + 6}));
  for (const std::int32_t slots : {6, 1}) {
    shape.slots = slots;
    for (const row& r : rows) measure_row(b, c, r, shape, layers);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (bench::no_device()) return bench::skipped;
  const bool smoke = argc > 1 && std::strcmp(argv[1], "--smoke") == 0;
  cudaStream_t stream;
  bench::check(cudaStreamCreate(&stream));
  specattn::context<device> ctx(stream);
  bench::device_clock clock(stream);
  bench::print_device();
  bench_run b{ctx, clock, smoke ? 1 : bench::copy_bandwidth(clock, stream), smoke};
  if (smoke) {
    measure(b, {3, 700});
    return 0;
  }
  std::printf(
      "copy: %.0f GB/s; passes are graph replays less an empty node of %.2f us; %d query heads, %d kv heads, "
      "head_dim "
      "%d, bf16\n| batch | kv_len | slots | reads | MB | attend() | GB/s | of copy |",
      b.copy, clock.empty_us(), bench::q_heads, bench::kv_heads, bench::head_dim);
  std::string rule = "\n|---|---|---|---|---|---|---|---|";
  for (const auto& peer : bench::linked_peers()) {
    std::printf(" %s |", peer->name().c_str());
    rule += "---|";
  }
  std::printf(" pass, best peer / ours | call | off by |%s---|---|---|\n", rule.c_str());
  for (const cell& c : table)
    if (argc < 3 || (c.batch == std::atoi(argv[1]) && c.kv_len == std::atoi(argv[2]))) measure(b, c);
  std::printf("\nattend() is ahead of every peer in %d of %d passes and in %d of %d calls.\n", b.passes_won,
              b.problems, b.calls_won, b.problems);
  return 0;
}
