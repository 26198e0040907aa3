// attend() on the device over the verify table: 32 query heads, 8 kv heads, head_dim 128, bf16, contiguous cache. Dense,
// over a list of everything, over random and clustered lists, single slots and recording; then the larger cells over
// fp8_e4m3 with a scale for each head. Every point is compared with a double-precision reference before it is timed;
// gathers are judged by a bare one of the same rows in the same run.
//   attend_bench_cuda [--smoke | BATCH KV_LEN [ROW]]
#include "specattn/cuda/attend.cuh"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cuda_harness.cuh"

namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's
using specattn::bf16;
using specattn::fp8_e4m3;

constexpr std::int32_t q_heads = 32, kv_heads = 8, head_dim = 128;

struct cell {
  std::int32_t batch, kv_len;
  double dense_goal_us, sparse_goal_us;
};
constexpr cell fp8_table[] = {{8, 8192, 0, 0}, {8, 32768, 0, 0}, {16, 32768, 0, 0}};
constexpr cell table[] = {{1, 8192, 22, 12},  {1, 32768, 60, 20},   {1, 131072, 215, 55},
                          {8, 8192, 115, 32}, {8, 32768, 420, 100}, {16, 32768, 830, 190}};

constexpr float fp8_scale = 0.01f;  // of keys and values of variance one

/// What is asked of a cell.
struct row {
  const char* name;
  std::int32_t slots;
  double share;      // kept; 1: all listed, above: no list
  std::int32_t run;  // positions that are kept or left together
  bool record;
  bool masked = false;  // each slot attends to half of the list
};
constexpr row rows[] = {{"dense", 6, 2, 1, false},
                        {"dense, recording", 6, 2, 1, true},
                        {"everything listed", 6, 1, 1, false},
                        {"22 % random", 6, 0.22, 1, false},
                        {"22 %, recording", 6, 0.22, 1, true},
                        {"22 % in runs of 16", 6, 0.22, 16, false},
                        {"22 %, masked", 6, 0.22, 1, false, true},
                        {"10 % random", 6, 0.10, 1, false},
                        {"10 % in runs of 16", 6, 0.10, 16, false},
                        {"dense, one slot", 1, 2, 1, false}};
constexpr row fp8_rows[] = {{"dense, fp8", 6, 2, 1, false}, {"22 % random, fp8", 6, 0.22, 1, false}};

__device__ float normal(std::uint64_t i, std::uint32_t seed) {
  std::uint64_t x = (i + 1) * 0x9e3779b97f4a7c15u + seed * 0xd1342543de82ef95u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  const float u = (static_cast<float>(x >> 40) + 0.5f) * 0x1p-24f;
  return sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * static_cast<float>(x & 0xffffffu) * 0x1p-24f);
}
template <specattn::storage T>
__global__ void fill_rows(T* to, std::size_t count, std::uint32_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x)
    to[i] = specattn::detail::stored<T>(normal(i, seed), 1.0f / fp8_scale);
}
__global__ void fill(float* to, std::size_t count, std::uint32_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x)
    to[i] = 2.0f * normal(i, seed);
}

/// One layer's cache.
template <specattn::storage T>
struct layer {
  specattn::buffer<T, device> keys, values;
  layer(std::int32_t batch, std::int32_t positions, std::uint32_t seed, cudaStream_t stream)
      : keys(static_cast<std::size_t>(batch) * kv_heads * static_cast<std::size_t>(positions) * head_dim),
        values(keys.size()) {
    fill_rows<<<2048, 256, 0, stream>>>(keys.data(), keys.size(), 2 * seed);
    fill_rows<<<2048, 256, 0, stream>>>(values.data(), values.size(), 2 * seed + 1);
  }
};

template <class T>
specattn::buffer<T, device> upload(const std::vector<T>& host) {
  specattn::buffer<T, device> copy(host.size());
  if (!host.empty()) bench::check(cudaMemcpy(copy.data(), host.data(), copy.bytes(), cudaMemcpyHostToDevice));
  return copy;
}
std::vector<std::int32_t> counting(std::int32_t count, std::int32_t step, std::int32_t first = 0) {
  std::vector<std::int32_t> numbers;
  for (std::int32_t i = 0; i < count; ++i) numbers.push_back(first + i * step);
  return numbers;
}

/// One pass of a row of a cell, over any of the layers.
template <specattn::storage T>
class pass {
 public:
  pass(const cell& c, const row& r)
      : c_(c),
        r_(r),
        q_(static_cast<std::size_t>(c.batch * r.slots) * q_heads * head_dim),
        out_(q_.size()),
        offsets_(upload(counting(c.batch + 1, r.slots))),
        kv_lens_(upload(std::vector<std::int32_t>(static_cast<std::size_t>(c.batch), c.kv_len))),
        table_(upload(counting(c.batch, 1))),
        scales_(upload(std::vector<float>(kv_heads, fp8_scale))) {
    fill<<<256, 256>>>(q_.data(), q_.size(), 99);
    const std::size_t groups = static_cast<std::size_t>(c.batch) * kv_heads;
    if (r.share <= 1) keep(groups);
    if (r.record) weights_ = specattn::buffer<float, device>(static_cast<std::size_t>(c.batch) * q_heads * length());
  }

  std::size_t length() const { return static_cast<std::size_t>(c_.kv_len + r_.slots); }
  /// Key and value rows that the pass must read.
  double rows_read() const {
    const double kept = r_.share <= 1 ? static_cast<double>(row_numbers_.size())
                                      : static_cast<double>(c_.batch) * kv_heads * c_.kv_len;
    return kept + static_cast<double>(c_.batch) * kv_heads * r_.slots;
  }
  double bytes() const {
    return rows_read() * (2.0 * sizeof(T) * head_dim + (r_.share <= 1 ? 4 : 0) + (r_.masked ? 4 : 0)) +
           2.0 * 4 * static_cast<double>(q_.size());
  }
  const specattn::buffer<std::int32_t, device>& row_numbers() const { return row_numbers_; }

  specattn::attend_args<T, device> args(const layer<T>& l) const {
    specattn::attend_args<T, device> a;
    a.q = q_.shaped({c_.batch * r_.slots, q_heads, head_dim});
    a.out = out_.shaped({c_.batch * r_.slots, q_heads, head_dim});
    a.kv.keys = l.keys.data();
    a.kv.values = l.values.data();
    a.kv.position_stride = head_dim;
    a.kv.head_stride = positions() * head_dim;
    a.kv.page_stride = a.kv.head_stride * kv_heads;
    a.kv.block_table = table_.shaped({c_.batch, 1});
    a.kv.kv_heads = kv_heads;
    a.kv.head_dim = head_dim;
    if constexpr (specattn::scaled_storage<T>) a.kv.key_scales = a.kv.value_scales = scales_.shaped({kv_heads});
    a.slot_offsets = offsets_.shaped({c_.batch + 1});
    a.kv_lens = kv_lens_.shaped({c_.batch});
    if (r_.share <= 1) {
      a.kept.positions = lists_.shaped({c_.batch * kv_heads, c_.kv_len});
      a.kept.counts = counts_.shaped({c_.batch * kv_heads});
      a.kept_sequence_stride = kv_heads;
      if (r_.masked) a.slot_masks = masks_.shaped({c_.batch * kv_heads, c_.kv_len});
    }
    if (r_.record) a.recording.weights = weights_.shaped({c_.batch, q_heads, static_cast<std::ptrdiff_t>(length())});
    return a;
  }
  /// Positions that the caches have room for, the same for all rows of a cell.
  std::ptrdiff_t positions() const { return c_.kv_len + 6; }

 private:
  void keep(std::size_t groups) {
    std::mt19937 engine(5);
    std::vector<std::int32_t> lists(groups * static_cast<std::size_t>(c_.kv_len), -1), counts, numbers;
    const auto threshold = static_cast<std::uint64_t>(r_.share * 0x1p32);
    for (std::size_t g = 0; g < groups; ++g) {
      std::int32_t count = 0;
      for (std::int32_t first = 0; first < c_.kv_len; first += r_.run) {
        if (engine() >= threshold) continue;
        for (std::int32_t p = first; p < std::min(first + r_.run, c_.kv_len); ++p) {
          lists[g * static_cast<std::size_t>(c_.kv_len) + static_cast<std::size_t>(count++)] = p;
          numbers.push_back(static_cast<std::int32_t>(g * static_cast<std::size_t>(positions())) + p);
        }
      }
      counts.push_back(count);
    }
    if (r_.masked) {
      std::vector<std::uint32_t> masks(lists.size());
      for (std::uint32_t& word : masks) word = engine();
      masks_ = upload(masks);
    }
    lists_ = upload(lists);
    counts_ = upload(counts);
    row_numbers_ = upload(numbers);
  }

  cell c_;
  row r_;
  specattn::buffer<float, device> q_, out_, weights_;
  specattn::buffer<std::int32_t, device> offsets_, kv_lens_, table_, lists_, counts_, row_numbers_;
  specattn::buffer<float, device> scales_;
  specattn::buffer<std::uint32_t, device> masks_;
};

/// One row of q in double precision, a CTA each: the slots of the first and of the last sequence.
template <specattn::storage T>
__global__ void __launch_bounds__(256)
    reference_kernel(specattn::attend_args<T, device> a, double* scratch, std::ptrdiff_t capacity, float* worst) {
  __shared__ double shared[256];
  const auto slots = static_cast<std::int32_t>(a.q.extent(0) / a.kv_lens.extent(0));
  const std::int32_t head = blockIdx.x % q_heads, slot = blockIdx.x / q_heads % slots;
  const auto s = blockIdx.y == 0 ? 0 : static_cast<std::int32_t>(a.kv_lens.extent(0)) - 1;
  const std::int32_t kv_head = head / (q_heads / kv_heads), kv_len = a.kv_lens[s], t = threadIdx.x;
  const bool listed = !a.kept.counts.empty();
  const std::int32_t kept = listed ? a.kept.counts[s * kv_heads + kv_head] : kv_len, all = kept + slot + 1;
  double* weights = scratch + (blockIdx.y * gridDim.x + blockIdx.x) * capacity;
  const auto position = [&](std::int32_t i) {
    return i >= kept ? kv_len + i - kept : listed ? a.kept.positions(s * kv_heads + kv_head, i) : i;
  };
  const auto reduce = [&](double x, auto op) {
    __syncthreads();
    shared[t] = x;
    for (int half = 128; half > 0; half /= 2) {
      __syncthreads();
      if (t < half) shared[t] = op(shared[t], shared[t + half]);
    }
    __syncthreads();
    return shared[0];
  };
  double top = -1e300, sum = 0, out = 0;
  for (std::int32_t i = t; i < all; i += 256) {
    double score = 0;
    const T* key = a.kv.key(s, position(i), kv_head);
    for (int d = 0; d < head_dim; ++d)
      score += double{a.q(s * slots + slot, head, d)} * double{specattn::to_float(key[d])};
    weights[i] = score * double{a.kv.key_scale(kv_head)} / sqrt(double{head_dim});
    if (!a.slot_masks.empty() && i < kept && (a.slot_masks(s * kv_heads + kv_head, i) >> slot & 1u) == 0)
      weights[i] = -1e300;
    top = fmax(top, weights[i]);
  }
  top = reduce(top, [](double x, double y) { return fmax(x, y); });
  for (std::int32_t i = t; i < all; i += 256) sum += weights[i] = exp(weights[i] - top);
  sum = reduce(sum, [](double x, double y) { return x + y; });
  for (std::int32_t i = t / head_dim; i < all; i += 256 / head_dim)
    out += weights[i] * double{specattn::to_float(a.kv.value(s, position(i), kv_head)[t % head_dim])};
  __syncthreads();
  shared[t] = out * double{a.kv.value_scale(kv_head)};
  __syncthreads();
  float off = 0;
  if (t < head_dim)
    off = static_cast<float>(fabs((shared[t] + shared[t + head_dim]) / sum - a.out(s * slots + slot, head, t)));
  if (!a.recording.weights.empty() && slot == slots - 1) {
    for (std::int32_t i = t; i < all; i += 256)
      off = fmaxf(off, static_cast<float>(fabs(weights[i] / sum - a.recording.weights(s, head, i))));
  }
  if (!(off <= 1e30f)) off = 1e30f;  // NaN
  atomicMax(reinterpret_cast<int*>(worst), __float_as_int(off));
}

/// The largest difference from the reference; ends the program when it is too large.
template <specattn::storage T>
float validated(const specattn::attend_args<T, device>& a, const cell& c, const row& r, cudaStream_t stream) {
  const std::ptrdiff_t capacity = c.kv_len + r.slots;
  const dim3 grid(static_cast<unsigned>(r.slots * q_heads), c.batch > 1 ? 2 : 1);
  const specattn::buffer<double, device> scratch(grid.x * grid.y * static_cast<std::size_t>(capacity));
  const specattn::buffer<float, device> worst(1);
  reference_kernel<<<grid, 256, 0, stream>>>(a, scratch.data(), capacity, worst.data());
  bench::check(cudaStreamSynchronize(stream));
  float off = 0;
  bench::check(cudaMemcpy(&off, worst.data(), sizeof off, cudaMemcpyDeviceToHost));
  if (off > 1e-4f) {
    std::fprintf(stderr, "%s, batch %d, kv_len %d: off by %g\n", r.name, c.batch, c.kv_len, double{off});
    std::exit(1);
  }
  return off;
}

/// Reads the rows that a list names, keys and values, and nothing else: two rows of 256 bytes or four of 128 a warp's load,
/// eight loads at once.
template <int Chunks>
__global__ void __launch_bounds__(256) gather_kernel(const uint4* keys, const uint4* values,
                                                     const std::int32_t* numbers, std::int32_t count, uint4* sink) {
  const std::int32_t lane = threadIdx.x % Chunks, team = (blockIdx.x * 256 + threadIdx.x) / Chunks;
  const std::int32_t teams = gridDim.x * 256 / Chunks;
  uint4 sum{};
  for (std::int32_t first = team; first < count; first += 4 * teams) {
    uint4 parts[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int32_t at = first + i * teams;
      const std::ptrdiff_t from = std::ptrdiff_t{numbers[at < count ? at : count - 1]} * Chunks + lane;
      parts[i] = __ldg(keys + from);
      parts[4 + i] = __ldg(values + from);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum.x ^= parts[i].x ^ parts[i].y ^ parts[i].z ^ parts[i].w;
  }
  if (sum.x == 0x12345678u) *sink = sum;  // never, but the compiler cannot know
}

template <specattn::storage T>
void measure(const cell& c, std::span<const row> rows, specattn::context<device>& ctx, bench::device_clock& clock,
             double copy, bool smoke, const char* only = "") {
  const double layer_bytes = 2.0 * sizeof(T) * c.batch * kv_heads * c.kv_len * head_dim;
  const int sets = smoke ? 1 : static_cast<int>(std::clamp(1e9 / layer_bytes, 2.0, 24.0));
  std::vector<std::unique_ptr<layer<T>>> layers;
  for (int i = 0; i < sets; ++i)
    layers.push_back(std::make_unique<layer<T>>(c.batch, c.kv_len + 6, 7u + static_cast<unsigned>(i), ctx.stream()));
  const specattn::buffer<uint4, device> sink(1);
  for (const row& r : rows) {
    if (std::strstr(r.name, only) == nullptr) continue;
    const pass<T> p(c, r);
    bench::check(cudaDeviceSynchronize());
    ctx.reserve_workspace(specattn::attend_workspace_bytes(
        ctx, {c.batch, c.batch * r.slots, q_heads, kv_heads, head_dim, c.kv_len + r.slots}));
    specattn::attend(ctx, p.args(*layers[0]));
    const float off = validated(p.args(*layers[0]), c, r, ctx.stream());
    if (smoke) {
      std::printf("%s: largest difference %.1e\n", r.name, double{off});
      continue;
    }
    const int nodes = std::max(sets, 8);
    const auto at = [&](int i) -> const layer<T>& { return *layers[static_cast<std::size_t>(i % sets)]; };
    const double us = clock.net_us([&](int i) { specattn::attend(ctx, p.args(at(i))); }, nodes);
    std::string gather = "-";
    if (r.share <= 1 && !r.record) {
      const double bare = clock.net_us(
          [&](int i) {
            gather_kernel<head_dim * sizeof(T) / 16><<<132 * 8, 256, 0, ctx.stream()>>>(
                reinterpret_cast<const uint4*>(at(i).keys.data()),
                reinterpret_cast<const uint4*>(at(i).values.data()), p.row_numbers().data(),
                static_cast<std::int32_t>(p.row_numbers().size()), sink.data());
          },
          nodes);
      char text[40];
      std::snprintf(text, sizeof text, "%.1f (%.2fx)", bare, us / bare);
      gather = text;
    }
    const double goal = r.record || r.masked || r.run > 1 || r.slots == 1 ? 0
                        : r.share > 1                                     ? c.dense_goal_us
                        : r.share > 0.2 && r.share < 1                    ? c.sparse_goal_us
                                                                          : 0;
    std::printf("| %d | %d | %s | %.1f | %s | %s | %.1f | %.0f | %.0f %% | %.0e |\n", c.batch, c.kv_len, r.name, us,
                goal > 0 ? std::to_string(static_cast<int>(goal)).c_str() : "-", gather.c_str(), p.bytes() * 1e-6,
                p.bytes() * 1e-3 / us, 100 * p.bytes() * 1e-3 / us / copy, double{off});
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
  if (smoke) {
    measure<bf16>({2, 700, 0, 0}, rows, ctx, clock, 1, true);
    measure<fp8_e4m3>({2, 700, 0, 0}, fp8_rows, ctx, clock, 1, true);
    return 0;
  }
  const double copy = bench::copy_bandwidth(clock, stream);
  std::printf(
      "copy: %.0f GB/s; times are graph replays less an empty node of %.2f us; %d query heads, %d kv heads, "
      "head_dim %d, bf16 but where it says fp8, 6 slots but where it says one\n",
      copy, clock.empty_us(), q_heads, kv_heads, head_dim);
  std::printf(
      "| batch | kv_len | | us | goal us | bare gather us | MB | GB/s | of copy | off by |\n"
      "|---|---|---|---|---|---|---|---|---|---|\n");
  const auto wanted = [&](const cell& c) {
    return argc < 3 || (c.batch == std::atoi(argv[1]) && c.kv_len == std::atoi(argv[2]));
  };
  const char* only = argc > 3 ? argv[3] : "";
  for (const cell& c : table)
    if (wanted(c)) measure<bf16>(c, rows, ctx, clock, copy, false, only);
  for (const cell& c : fp8_table)
    if (wanted(c)) measure<fp8_e4m3>(c, fp8_rows, ctx, clock, copy, false, only);
  return 0;
}
