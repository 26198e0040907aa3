// Normalising rows of weights on the device, their divergences, and a reading of a mixture's samples. Sums are taken in
// one fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cub/block/block_reduce.cuh>

#include "../../mixture_search.hpp"
#include "../../view.hpp"
#include "../context.cuh"
#include "../device/launch.cuh"
#include "../device/warp.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int alignment_threads = 256;
inline constexpr int alignment_warps = alignment_threads / 32;
inline constexpr int divergence_tile = 16;                // rows of either side that a CTA compares
inline constexpr int divergence_stretch = 64;             // positions in shared memory at a time
inline constexpr std::ptrdiff_t divergence_split = 2048;  // positions a CTA compares over
inline constexpr int mixture_each = 4;                    // positions a thread mixes at a time
inline constexpr std::ptrdiff_t mixture_split = 4096;     // positions a CTA mixes

enum class row_status : std::int32_t { sound, broken, massless };
enum class row_form { plain, target, logarithm };

/// Rows (a, b) of `from`, number a * extent(1) + b.
struct normalise_launch {
  view<const float, 3, cuda> from;
  float* to;           // [rows, length]
  row_status* status;  // [rows]
  double* entropies;   // [rows] of targets: the sum of p log p
};

/// Scales a row to unit mass, one CTA a row; a row without mass becomes zeros. Of a logarithm, what log makes of that.
template <row_form Form>
__global__ void __launch_bounds__(alignment_threads) normalise_kernel(const __grid_constant__ normalise_launch args) {
  using block_sum = cub::BlockReduce<double, alignment_threads>;
  __shared__ typename block_sum::TempStorage scratch;
  __shared__ double whole;
  const std::ptrdiff_t row = blockIdx.x, length = args.from.extent(2);
  const view<const float, 1, cuda> from = args.from[row / args.from.extent(1)][row % args.from.extent(1)];
  double mass = 0.0;
  bool broken = false;
  for (std::ptrdiff_t i = threadIdx.x; i < length; i += alignment_threads) {
    mass += static_cast<double>(from[i]);
    broken = broken || !(from[i] >= 0.0f);
  }
  broken = __syncthreads_or(broken ? 1 : 0) != 0;
  mass = block_sum(scratch).Sum(mass);
  if (threadIdx.x == 0) {
    whole = mass;
    args.status[row] = broken || !isfinite(mass) ? row_status::broken
                       : mass > 0.0              ? row_status::sound
                                                 : row_status::massless;
  }
  __syncthreads();
  mass = whole;
  double entropy = 0.0;
  for (std::ptrdiff_t i = threadIdx.x; i < length; i += alignment_threads) {
    float p = mass > 0.0 ? static_cast<float>(static_cast<double>(from[i]) / mass) : 0.0f;
    if (Form == row_form::logarithm) p = logf(fmaxf(p, divergence_floor));
    if (Form == row_form::target && p > 0.0f) entropy += static_cast<double>(p) * static_cast<double>(logf(p));
    args.to[row * length + i] = p;
  }
  if constexpr (Form == row_form::target) {
    entropy = block_sum(scratch).Sum(entropy);
    if (threadIdx.x == 0) args.entropies[row] = entropy;
  }
}

/// Queues normalise_kernel for every row.
template <row_form Form>
void normalise(context<cuda>& ctx, const normalise_launch& rows) {
  const std::ptrdiff_t count = rows.from.extent(0) * rows.from.extent(1);
  start_kernel(ctx, normalise_kernel<Form>, dim3(blocks_of(count, 1)), alignment_threads, rows, "alignment");
}

/// [rows, length] as [rows, 1, length].
inline view<const float, 3, cuda> one_each(view<const float, 2, cuda> rows) {
  return {rows.data(), {rows.extent(0), 1, rows.extent(1)}, {rows.stride(0), 0, rows.stride(1)}};
}

/// What a divergence_accumulator keeps on the device besides its sums.
struct divergence_state {
  std::int64_t samples;
  std::int32_t broken_row;  // of the first sample that was refused, plus one
  row_status broken_status;
};

struct divergence_launch {
  std::ptrdiff_t targets, drafts, length, splits;
  const float *p, *log_q;    // [targets, length], [drafts, length]
  const double* entropies;   // [targets]
  const row_status* status;  // [targets + drafts]
  double* parts;             // [splits, targets, drafts]
  double* sums;              // [targets, drafts]
  divergence_state* state;
};

/// Products of a tile of targets and a tile of drafts, a thread a pair.
static __global__ void __launch_bounds__(alignment_threads)
    divergence_kernel(const __grid_constant__ divergence_launch args) {
  __shared__ float p[divergence_tile][divergence_stretch + 1], log_q[divergence_tile][divergence_stretch + 1];
  const int x = static_cast<int>(threadIdx.x) % divergence_tile, y = static_cast<int>(threadIdx.x) / divergence_tile;
  const std::ptrdiff_t target = std::ptrdiff_t{blockIdx.y} * divergence_tile,
                       draft = std::ptrdiff_t{blockIdx.x} * divergence_tile;
  const std::ptrdiff_t first = std::ptrdiff_t{blockIdx.z} * divergence_split;
  const std::ptrdiff_t end = first + divergence_split < args.length ? first + divergence_split : args.length;
  double sum = 0.0;
  for (std::ptrdiff_t begin = first; begin < end; begin += divergence_stretch) {
    for (int i = static_cast<int>(threadIdx.x); i < divergence_tile * divergence_stretch; i += alignment_threads) {
      const int row = i / divergence_stretch, k = i % divergence_stretch;
      const bool inside = begin + k < end;
      p[row][k] = inside && target + row < args.targets ? args.p[(target + row) * args.length + begin + k] : 0.0f;
      log_q[row][k] =
          inside && draft + row < args.drafts ? args.log_q[(draft + row) * args.length + begin + k] : 0.0f;
    }
    __syncthreads();
    float part = 0.0f;
#pragma unroll 16
    for (int k = 0; k < divergence_stretch; ++k) part += p[y][k] * log_q[x][k];
    sum += static_cast<double>(part);
    __syncthreads();
  }
  if (target + y < args.targets && draft + x < args.drafts)
    args.parts[(blockIdx.z * args.targets + target + y) * args.drafts + draft + x] = sum;
}

/// Adds the sample's divergences, unless one of its rows is broken.
static __global__ void __launch_bounds__(alignment_threads)
    accumulate_kernel(const __grid_constant__ divergence_launch args) {
  const auto refused = [&](std::ptrdiff_t row) {
    return args.status[row] == row_status::broken || (row < args.targets && args.status[row] == row_status::massless);
  };
  bool broken = false;
  for (std::ptrdiff_t row = threadIdx.x; row < args.targets + args.drafts; row += alignment_threads)
    broken = broken || refused(row);
  broken = __syncthreads_or(broken ? 1 : 0) != 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (!broken) {
      ++args.state->samples;
    } else if (args.state->broken_row == 0) {
      std::int32_t row = 0;
      while (!refused(row)) ++row;
      args.state->broken_row = row + 1;
      args.state->broken_status = args.status[row];
    }
  }
  const std::ptrdiff_t pair = std::ptrdiff_t{blockIdx.x} * alignment_threads + threadIdx.x;
  if (broken || pair >= args.targets * args.drafts) return;
  double sum = args.entropies[pair / args.drafts];
  for (std::ptrdiff_t z = 0; z < args.splits; ++z) sum -= args.parts[z * args.targets * args.drafts + pair];
  args.sums[pair] += sum;
}

struct mixture_launch {
  const float* rows;  // of one sample, as mixture_fit holds it: [groups + shared + groups * own, length]
  std::ptrdiff_t length, groups, shared, own;
  const float* coefficients;   // [groups, signals]
  const std::int32_t* active;  // [groups]
  double* parts;               // [groups, splits, signals + 1] gains and divergence, added to
};

/// The divergence and the gains of one group's mixture over a part of a sample.
static __global__ void __launch_bounds__(alignment_threads)
    mixture_kernel(const __grid_constant__ mixture_launch args) {
  using block_sum = cub::BlockReduce<double, alignment_threads>;
  __shared__ typename block_sum::TempStorage scratch;
  __shared__ float sums[32][alignment_warps];
  constexpr std::ptrdiff_t chunk = alignment_threads * mixture_each;
  const std::ptrdiff_t group = blockIdx.y, signals = args.shared + args.own;
  if (args.active[group] == 0) return;
  const float* const goal = args.rows + group * args.length;
  const float* const coefficients = args.coefficients + group * signals;
  const auto signal = [&](std::ptrdiff_t i) {
    return args.rows +
           args.length *
               (i < args.shared ? args.groups + i : args.groups + args.shared + group * args.own + i - args.shared);
  };
  double* const parts = args.parts + (group * gridDim.x + blockIdx.x) * (signals + 1);
  const std::ptrdiff_t first = std::ptrdiff_t{blockIdx.x} * mixture_split;
  const std::ptrdiff_t end = first + mixture_split < args.length ? first + mixture_split : args.length;
  double divergence = 0.0;
  for (std::ptrdiff_t begin = first; begin < end; begin += chunk) {
    float mixed[mixture_each] = {}, ratio[mixture_each] = {};
    const auto here = [&](int j) { return begin + j * alignment_threads + threadIdx.x; };
    for (std::ptrdiff_t i = 0; i < signals; ++i) {
      const float* const row = signal(i);
#pragma unroll
      for (int j = 0; j < mixture_each; ++j) mixed[j] += here(j) < end ? coefficients[i] * row[here(j)] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < mixture_each; ++j) {
      const float p = here(j) < end ? goal[here(j)] : 0.0f;
      ratio[j] = p / (mixed[j] > divergence_floor ? mixed[j] : divergence_floor);
      if (ratio[j] > 0.0f) divergence += static_cast<double>(p) * static_cast<double>(logarithm(ratio[j]));
    }
    for (std::ptrdiff_t batch = 0; batch < signals; batch += 32) {
      for (int i = 0; i < 32 && batch + i < signals; ++i) {
        const float* const row = signal(batch + i);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < mixture_each; ++j) sum += here(j) < end ? ratio[j] * row[here(j)] : 0.0f;
        sum = sum_over_warp(sum);
        if (threadIdx.x % 32 == 0) sums[i][threadIdx.x / 32] = sum;
      }
      __syncthreads();
      if (threadIdx.x < 32 && batch + threadIdx.x < signals) {
        double sum = 0.0;
        for (int w = 0; w < alignment_warps; ++w) sum += static_cast<double>(sums[threadIdx.x][w]);
        parts[batch + threadIdx.x] += sum;
      }
      __syncthreads();
    }
  }
  divergence = block_sum(scratch).Sum(divergence);
  if (threadIdx.x == 0) parts[signals] += divergence;
}

/// readings [groups, values] = the sums over `splits` of parts [groups, splits, values].
static __global__ void __launch_bounds__(alignment_threads)
    gather_parts_kernel(const double* parts, std::ptrdiff_t values, std::ptrdiff_t splits, double* readings) {
  for (std::ptrdiff_t i = threadIdx.x; i < values; i += alignment_threads) {
    double sum = 0.0;
    for (std::ptrdiff_t z = 0; z < splits; ++z) sum += parts[(blockIdx.x * splits + z) * values + i];
    readings[blockIdx.x * values + i] = sum;
  }
}

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
