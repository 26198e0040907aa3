// recompute() on the device: 32 query heads, 8 kv heads, head_dim 128, bf16, 6 slots of which the newest is recorded; a
// prefix and a list of 22 % of it. A double-precision reference gives the log-sum-exp and judges the weights before
// anything is timed. Bytes are those of the keys read and of the weights written.
//   recompute_bench_cuda [--smoke]
#include "specattn/cuda/recompute.cuh"

#include <memory>
#include <random>
#include <vector>

#include "cuda_harness.cuh"

namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's
using specattn::bf16;

constexpr std::int32_t q_heads = 32, kv_heads = 8, head_dim = 128, slots = 6;

template <class T>
__global__ void fill(T* to, std::size_t count, std::uint32_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x)
    to[i] = specattn::from_float<T>(bench::normal(i, seed));
}

template <class T>
specattn::buffer<T, device> upload(const std::vector<T>& host) {
  specattn::buffer<T, device> copy(host.size());
  bench::check(cudaMemcpy(copy.data(), host.data(), copy.bytes(), cudaMemcpyHostToDevice));
  return copy;
}

__device__ double score(const specattn::recompute_args<bf16, device>& a, std::int32_t s, std::int32_t head,
                        std::int32_t at) {
  const std::int32_t kv_head = head / (q_heads / kv_heads), kv_len = a.kv_lens[s];
  const std::ptrdiff_t g = s * kv_heads + kv_head;
  const bool listed = !a.kept.counts.empty();
  const std::int32_t kept = listed ? a.kept.counts[g] : kv_len;
  const std::int32_t position = at >= kept ? kv_len + at - kept : listed ? a.kept.positions(g, at) : at;
  double sum = 0;
  for (int d = 0; d < head_dim; ++d)
    sum +=
        double{a.q(s * slots + slots - 1, head, d)} * double{specattn::to_float(a.kv.key(s, position, kv_head)[d])};
  return sum / sqrt(double{head_dim});
}
/// A CTA for each sequence and query head: the log-sum-exp of its newest slot, or the largest error of its weights.
__global__ void __launch_bounds__(256)
    reference_kernel(specattn::recompute_args<bf16, device> a, float* lse, float* worst) {
  __shared__ double sums[256];
  const auto head = static_cast<std::int32_t>(blockIdx.x), s = static_cast<std::int32_t>(blockIdx.y);
  const std::int32_t kept =
      a.kept.counts.empty() ? a.kv_lens[s] : a.kept.counts[s * kv_heads + head / (q_heads / kv_heads)];
  double sum = 0;
  for (auto at = static_cast<std::int32_t>(threadIdx.x); at < kept + slots; at += 256)
    sum += exp(score(a, s, head, at));
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = 128; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (worst == nullptr) {
    if (threadIdx.x == 0) lse[(s * slots + slots - 1) * q_heads + head] = static_cast<float>(log(sums[0]));
    return;
  }
  for (auto at = static_cast<std::int32_t>(threadIdx.x); at < kept + slots; at += 256) {
    float off = static_cast<float>(fabs(exp(score(a, s, head, at)) / sums[0] - a.recording.weights(s, head, at)));
    if (!(off <= 1e30f)) off = 1e30f;  // NaN
    atomicMax(reinterpret_cast<int*>(worst), __float_as_int(off));
  }
}

/// One cell: keys of several layers, one set of everything else.
class cell {
 public:
  cell(std::int32_t batch, std::int32_t kv_len, double share, cudaStream_t stream)
      : batch_(batch), kv_len_(kv_len), positions_(kv_len + slots), listed_(share < 1) {
    const std::size_t elements = count(batch) * kv_heads * count(positions_) * head_dim;
    const int layers = static_cast<int>(std::clamp(5e8 / (2.0 * static_cast<double>(elements)), 2.0, 24.0));
    for (int i = 0; i < layers; ++i) {
      keys_.emplace_back(elements);
      fill<<<2048, 256, 0, stream>>>(keys_.back().data(), elements, static_cast<std::uint32_t>(i + 1));
    }
    q_ = floats(count(batch) * slots * q_heads * head_dim);
    lse_ = floats(count(batch) * slots * q_heads);
    weights_ = floats(count(batch) * q_heads * count(positions_));
    fill<<<256, 256, 0, stream>>>(q_.data(), q_.size(), 99);
    std::vector<std::int32_t> offsets, table;
    for (std::int32_t s = 0; s <= batch; ++s) offsets.push_back(s * slots), table.push_back(s);
    slot_offsets_ = upload(offsets);
    block_table_ = upload(table);
    kv_lens_ = upload(std::vector<std::int32_t>(count(batch), kv_len));
    keep(share);
  }

  int layers() const { return static_cast<int>(keys_.size()); }
  double key_bytes() const { return rows_ * sizeof(bf16) * head_dim; }
  double bytes() const { return key_bytes() + rows_ * sizeof(float) * (q_heads / kv_heads); }
  float* lse() const { return lse_.data(); }
  dim3 reference_grid() const { return {q_heads, static_cast<unsigned>(batch_)}; }

  specattn::recompute_args<bf16, device> args(int i) const {
    specattn::recompute_args<bf16, device> a;
    a.q = q_.shaped({batch_ * slots, q_heads, head_dim});
    a.kv.keys = keys_[static_cast<std::size_t>(i % layers())].data();
    a.kv.position_stride = head_dim;
    a.kv.head_stride = std::ptrdiff_t{positions_} * head_dim;
    a.kv.page_stride = a.kv.head_stride * kv_heads;
    a.kv.block_table = block_table_.shaped({batch_, 1});
    a.kv.kv_heads = kv_heads;
    a.kv.head_dim = head_dim;
    a.slot_offsets = slot_offsets_.shaped({batch_ + 1});
    a.kv_lens = kv_lens_.shaped({batch_});
    if (listed_) {
      a.kept.positions = lists_.shaped({batch_ * kv_heads, kv_len_});
      a.kept.counts = counts_.shaped({batch_ * kv_heads});
      a.kept_sequence_stride = kv_heads;
    }
    a.lse = lse_.shaped({batch_ * slots, q_heads});
    a.recording.weights = weights_.shaped({batch_, q_heads, positions_});
    return a;
  }

 private:
  using floats = specattn::buffer<float, device>;
  using integers = specattn::buffer<std::int32_t, device>;
  static std::size_t count(std::int32_t n) { return static_cast<std::size_t>(n); }

  void keep(double share) {
    std::vector<std::int32_t> lists, counts;
    std::mt19937 engine(5);
    for (std::int32_t g = 0; g < batch_ * kv_heads; ++g) {
      const std::size_t begin = lists.size();
      for (std::int32_t p = 0; p < kv_len_; ++p)
        if (engine() * 0x1p-32 < share) lists.push_back(p);
      counts.push_back(static_cast<std::int32_t>(lists.size() - begin));
      rows_ += slots + counts.back();
      lists.resize(begin + count(kv_len_), -1);
    }
    lists_ = upload(lists);
    counts_ = upload(counts);
  }

  std::int32_t batch_, kv_len_, positions_;
  bool listed_;
  double rows_ = 0;  ///< of keys, tails included
  std::vector<specattn::buffer<bf16, device>> keys_;
  floats q_, lse_, weights_;
  integers slot_offsets_, block_table_, kv_lens_, lists_, counts_;
};

void measure(std::int32_t batch, std::int32_t kv_len, double share, specattn::context<device>& ctx,
             bench::device_clock& clock, double copy) {
  const cell c(batch, kv_len, share, ctx.stream());
  bench::check(cudaDeviceSynchronize());
  const specattn::buffer<float, device> worst(1);
  reference_kernel<<<c.reference_grid(), 256, 0, ctx.stream()>>>(c.args(0), c.lse(), nullptr);
  specattn::recompute(ctx, c.args(0));
  reference_kernel<<<c.reference_grid(), 256, 0, ctx.stream()>>>(c.args(0), c.lse(), worst.data());
  bench::check(cudaStreamSynchronize(ctx.stream()));
  float off = 0;
  bench::check(cudaMemcpy(&off, worst.data(), sizeof off, cudaMemcpyDeviceToHost));
  if (off > 2e-5f) {
    std::fprintf(stderr, "batch %d, kv_len %d: off by %g\n", batch, kv_len, double{off});
    std::exit(1);
  }
  const double us = clock.net_us([&](int i) { specattn::recompute(ctx, c.args(i)); }, (std::max)(c.layers(), 8));
  std::printf("| %d | %d | %.0f %% | %.1f | %.1f | %.0f | %.0f | %.0f %% | %.0e |\n", batch, kv_len, 100 * share, us,
              c.key_bytes() * 1e-6, c.key_bytes() * 1e-3 / us, c.bytes() * 1e-3 / us,
              100 * c.bytes() * 1e-3 / us / copy, double{off});
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (bench::no_device()) return bench::skipped;
  bench::opened_device opened(argc, argv);
  std::printf("copy: %.0f GB/s; times are graph replays less an empty node of %.2f us\n", opened.copy_gb_s,
              opened.clock.empty_us());
  std::printf("| batch | kv_len | kept | us | key MB | key GB/s | GB/s | of copy | off by |\n");
  std::printf("|---|---|---|---|---|---|---|---|---|\n");
  for (const double share : {1.0, 0.22}) {
    if (opened.smoke) {
      measure(2, 700, share, opened.ctx, opened.clock, opened.copy_gb_s);
      continue;
    }
    measure(1, 8192, share, opened.ctx, opened.clock, opened.copy_gb_s);
    measure(1, 32768, share, opened.ctx, opened.clock, opened.copy_gb_s);
    measure(8, 32768, share, opened.ctx, opened.clock, opened.copy_gb_s);
  }
  return 0;
}
