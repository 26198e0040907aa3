// What attend_bench.cu times: passes over caches that hold more than the L2 together, a double-precision reference that
// judges each before it is timed, and a bare gather of the same rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_harness.cuh"
#include "select_rows.cuh"
#include "specattn/cuda/attend.cuh"

namespace bench {

using device = specattn::cuda;  // ::cuda is the toolkit's

constexpr float fp8_scale = 0.01f;  // of keys and values of variance one

/// The cache and the heads.
struct attend_cell {
  std::int32_t batch, kv_len;
  double dense_goal_us = 0, sparse_goal_us = 0;
  std::int32_t group = 4, kv_heads = 8, head_dim = 128;
  std::int32_t most_slots = 6;
  std::int32_t q_heads() const { return group * kv_heads; }
  std::int32_t groups() const { return batch * kv_heads; }
  std::int32_t positions() const { return kv_len + most_slots; }  ///< that the caches have room for
};

/// What is asked of a cell.
struct attend_row {
  const char* name;
  std::int32_t slots;
  double share;      // kept; 1: all listed, above: no list
  std::int32_t run;  // positions that are kept or left together; real: lists are those of real rows
  bool record = false;
  bool masked = false;  // each slot attends to half of the list
  static constexpr std::int32_t real = 0;
  bool listed() const { return share <= 1; }
};

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
  layer(const attend_cell& c, std::uint32_t seed, cudaStream_t stream)
      : keys(static_cast<std::size_t>(c.groups()) * static_cast<std::size_t>(c.positions()) *
             static_cast<std::size_t>(c.head_dim)),
        values(keys.size()) {
    fill_rows<<<2048, 256, 0, stream>>>(keys.data(), keys.size(), 2 * seed);
    fill_rows<<<2048, 256, 0, stream>>>(values.data(), values.size(), 2 * seed + 1);
  }
};

template <class T>
specattn::buffer<T, device> upload(const std::vector<T>& host) {
  specattn::buffer<T, device> copy(host.size());
  if (!host.empty()) check(cudaMemcpy(copy.data(), host.data(), copy.bytes(), cudaMemcpyHostToDevice));
  return copy;
}
std::vector<std::int32_t> counting(std::int32_t count, std::int32_t step, std::int32_t first = 0) {
  std::vector<std::int32_t> numbers;
  for (std::int32_t i = 0; i < count; ++i) numbers.push_back(first + i * step);
  return numbers;
}

/// One pass over a cell, any of the layers.
template <specattn::storage T>
class pass {
 public:
  pass(const attend_cell& c, const attend_row& r, const file_rows& real)
      : c_(c),
        r_(r),
        q_(static_cast<std::size_t>(c.batch * r.slots) * static_cast<std::size_t>(c.q_heads() * c.head_dim)),
        out_(q_.size()),
        offsets_(upload(counting(c.batch + 1, r.slots))),
        kv_lens_(upload(std::vector<std::int32_t>(static_cast<std::size_t>(c.batch), c.kv_len))),
        table_(upload(counting(c.batch, 1))),
        scales_(upload(std::vector<float>(static_cast<std::size_t>(c.kv_heads), fp8_scale))) {
    fill<<<256, 256>>>(q_.data(), q_.size(), 99);
    if (r.listed()) keep(real);
    if (r.record)
      weights_ = specattn::buffer<float, device>(static_cast<std::size_t>(c.batch * c.q_heads() * recorded()));
  }

  /// Key and value rows that the pass must read.
  double rows_read() const {
    const double kept =
        r_.listed() ? static_cast<double>(row_numbers_.size()) : static_cast<double>(c_.groups()) * c_.kv_len;
    return kept + static_cast<double>(c_.groups()) * r_.slots;
  }
  /// Of the rows read, lists, queries and results.
  double bytes() const {
    return rows_read() * (2.0 * sizeof(T) * c_.head_dim + (r_.listed() ? 4 : 0) + (r_.masked ? 4 : 0)) +
           2.0 * 4 * static_cast<double>(q_.size());
  }
  /// Share of the prefix.
  double kept() const { return rows_read() / (static_cast<double>(c_.groups()) * (c_.kv_len + r_.slots)); }
  const specattn::buffer<std::int32_t, device>& row_numbers() const { return row_numbers_; }

  specattn::attend_args<T, device> args(const layer<T>& l) const {
    specattn::attend_args<T, device> a;
    a.q = q_.shaped({c_.batch * r_.slots, c_.q_heads(), c_.head_dim});
    a.out = out_.shaped({c_.batch * r_.slots, c_.q_heads(), c_.head_dim});
    a.kv.keys = l.keys.data();
    a.kv.values = l.values.data();
    a.kv.position_stride = c_.head_dim;
    a.kv.head_stride = std::ptrdiff_t{c_.positions()} * c_.head_dim;
    a.kv.page_stride = a.kv.head_stride * c_.kv_heads;
    a.kv.block_table = table_.shaped({c_.batch, 1});
    a.kv.kv_heads = c_.kv_heads;
    a.kv.head_dim = c_.head_dim;
    if constexpr (specattn::scaled_storage<T>) a.kv.key_scales = a.kv.value_scales = scales_.shaped({c_.kv_heads});
    a.slot_offsets = offsets_.shaped({c_.batch + 1});
    a.kv_lens = kv_lens_.shaped({c_.batch});
    if (r_.listed()) {
      a.kept.positions = lists_.shaped({c_.groups(), c_.kv_len});
      a.kept.counts = counts_.shaped({c_.groups()});
      a.kept_sequence_stride = c_.kv_heads;
      if (r_.masked) a.slot_masks = masks_.shaped({c_.groups(), c_.kv_len});
    }
    if (r_.record) a.recording.weights = weights_.shaped({c_.batch, c_.q_heads(), recorded()});
    return a;
  }

 private:
  /// Entries of a recorded row: up to whole cache lines, as the decoding loop has them.
  std::int32_t recorded() const { return (c_.kv_len + r_.slots + 63) / 64 * 64; }
  /// Whether each position of a group is listed.
  std::vector<bool> chosen(std::int32_t group, std::mt19937& engine, const file_rows& real) const {
    std::vector<bool> is(static_cast<std::size_t>(c_.kv_len));
    if (r_.run == attend_row::real) return heaviest(real, group, is.size());
    const auto threshold = static_cast<std::uint64_t>(r_.share * 0x1p32);
    for (std::int32_t first = 0; first < c_.kv_len; first += r_.run) {
      const bool listed = engine() < threshold;
      for (std::int32_t p = first; p < std::min(first + r_.run, c_.kv_len); ++p)
        is[static_cast<std::size_t>(p)] = listed;
    }
    return is;
  }
  /// The positions that hold 95 % of a real row.
  static std::vector<bool> heaviest(const file_rows& real, std::int32_t group, std::size_t length) {
    const float* row = real.weights.data() + group % real.rows * real.length;
    std::vector<std::size_t> order(length);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return row[a] > row[b]; });
    std::vector<bool> is(length);
    double mass = 0;
    for (std::size_t i = 0; i < length && mass < 0.95; mass += row[order[i++]]) is[order[i]] = true;
    return is;
  }
  void keep(const file_rows& real) {
    std::mt19937 engine(5);
    const auto length = static_cast<std::size_t>(c_.kv_len);
    std::vector<std::int32_t> lists, counts, numbers;
    for (std::int32_t g = 0; g < c_.groups(); ++g) {
      const std::size_t begin = lists.size();
      const std::vector<bool> is = chosen(g, engine, real);
      for (std::int32_t p = 0; p < c_.kv_len; ++p) {
        if (!is[static_cast<std::size_t>(p)]) continue;
        lists.push_back(p);
        numbers.push_back(g * c_.positions() + p);
      }
      counts.push_back(static_cast<std::int32_t>(lists.size() - begin));
      lists.resize(begin + length, -1);
    }
    if (r_.masked) {
      std::vector<std::uint32_t> masks(lists.size());
      for (std::uint32_t& word : masks) word = static_cast<std::uint32_t>(engine());
      masks_ = upload(masks);
    }
    lists_ = upload(lists);
    counts_ = upload(counts);
    row_numbers_ = upload(numbers);
  }

  attend_cell c_;
  attend_row r_;
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
  const auto q_heads = static_cast<std::int32_t>(a.q.extent(1));
  const std::int32_t kv_heads = a.kv.kv_heads, head_dim = a.kv.head_dim;
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
    weights[i] = score * double{a.kv.key_scale(kv_head)} / sqrt(static_cast<double>(head_dim));
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
  if (t < head_dim) {
    for (int other = t + head_dim; other < 256; other += head_dim) shared[t] += shared[other];
    off = static_cast<float>(fabs(shared[t] / sum - a.out(s * slots + slot, head, t)));
  }
  if (!a.recording.weights.empty() && slot == slots - 1) {
    for (std::int32_t i = t; i < all; i += 256)
      off = fmaxf(off, static_cast<float>(fabs(weights[i] / sum - a.recording.weights(s, head, i))));
  }
  if (!(off <= 1e30f)) off = 1e30f;  // NaN
  atomicMax(reinterpret_cast<int*>(worst), __float_as_int(off));
}

/// The largest difference from the reference; ends the program when it is too large.
template <specattn::storage T>
float validated(const specattn::attend_args<T, device>& a, const attend_cell& c, const attend_row& r,
                cudaStream_t stream) {
  const std::ptrdiff_t capacity = c.kv_len + r.slots;
  const dim3 grid(static_cast<unsigned>(r.slots * c.q_heads()), c.batch > 1 ? 2 : 1);
  const specattn::buffer<double, device> scratch(grid.x * grid.y * static_cast<std::size_t>(capacity));
  const specattn::buffer<float, device> worst(1);
  reference_kernel<<<grid, 256, 0, stream>>>(a, scratch.data(), capacity, worst.data());
  check(cudaStreamSynchronize(stream));
  float off = 0;
  check(cudaMemcpy(&off, worst.data(), sizeof off, cudaMemcpyDeviceToHost));
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

/// One row of a cell, measured.
struct attend_result {
  double us = 0, gather_us = 0;  ///< 0: not asked for
  double bytes = 0, kept = 0;
  float off = 0;
};

/// All layers of a cell, and its rows' times.
template <specattn::storage T>
class attend_timer {
 public:
  attend_timer(const attend_cell& c, const file_rows& real, specattn::context<device>& ctx, device_clock* clock)
      : c_(c), real_(real), ctx_(ctx), clock_(clock) {
    const double bytes = 2.0 * sizeof(T) * c.groups() * c.kv_len * c.head_dim;
    const int sets = clock == nullptr ? 1 : static_cast<int>(std::clamp(1e9 / bytes, 2.0, 24.0));
    for (int i = 0; i < sets; ++i)
      layers_.push_back(std::make_unique<layer<T>>(c, 7u + static_cast<unsigned>(i), ctx.stream()));
  }

  /// Compares, and times where there is a clock. The gather is timed for lists that nothing is recorded over.
  attend_result measure(const attend_row& r) {
    const pass<T> p(c_, r, real_);
    check(cudaDeviceSynchronize());
    ctx_.reserve_workspace(specattn::attend_workspace_bytes(
        ctx_, {c_.batch, c_.batch * r.slots, c_.q_heads(), c_.kv_heads, c_.head_dim, c_.kv_len + r.slots}));
    specattn::attend(ctx_, p.args(*layers_[0]));
    attend_result result{0, 0, p.bytes(), p.kept(), validated(p.args(*layers_[0]), c_, r, ctx_.stream())};
    if (clock_ == nullptr) return result;
    const int sets = static_cast<int>(layers_.size()), nodes = std::max(sets, 8);
    const auto at = [&](int i) -> const layer<T>& { return *layers_[static_cast<std::size_t>(i % sets)]; };
    result.us = clock_->net_us([&](int i) { specattn::attend(ctx_, p.args(at(i))); }, nodes);
    if (!r.listed() || r.record) return result;
    const auto chunks = static_cast<int>(static_cast<std::size_t>(c_.head_dim) * sizeof(T) / 16);
    const auto kernel = chunks == 32 ? gather_kernel<32> : chunks == 16 ? gather_kernel<16> : gather_kernel<8>;
    const auto& numbers = p.row_numbers();
    result.gather_us = clock_->net_us(
        [&](int i) {
          kernel<<<132 * 8, 256, 0, ctx_.stream()>>>(
              reinterpret_cast<const uint4*>(at(i).keys.data()), reinterpret_cast<const uint4*>(at(i).values.data()),
              numbers.data(), static_cast<std::int32_t>(numbers.size()), sink_.data());
        },
        nodes);
    return result;
  }

 private:
  attend_cell c_;
  const file_rows& real_;
  specattn::context<device>& ctx_;
  device_clock* clock_;
  std::vector<std::unique_ptr<layer<T>>> layers_;
  specattn::buffer<uint4, device> sink_{1};
};

}  // namespace bench
