#include "row_kernels.cuh"

#include <cuda_bf16.h>

#include <algorithm>
#include <cstddef>
#include <utility>

#include "specattn/cuda/device/launch.cuh"
#include "specattn/cuda/device/overlap.cuh"

namespace mini_llm {
namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's
using specattn::bf16;
using specattn::context;
using specattn::detail::launch_dependents;
using specattn::detail::wait_for_previous_kernel;

constexpr unsigned most_threads = 1024;
constexpr std::ptrdiff_t unit = 4;  // elements a thread takes at a time

struct alignas(8) bf16_unit {
  __nv_bfloat162 low, high;
};

__device__ void store(bf16* to, float4 x) {
  *reinterpret_cast<bf16_unit*>(to) = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
}
__device__ float4 load(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ float4 load(const bf16* from) {
  const bf16_unit x = *reinterpret_cast<const bf16_unit*>(from);
  const float2 low = __bfloat1622float2(x.low), high = __bfloat1622float2(x.high);
  return {low.x, low.y, high.x, high.y};
}

/// The sum over the CTA, in every thread. All threads call it, once a kernel.
__device__ float sum_of_block(float x) {
  __shared__ float warps[most_threads / 32];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += warps[w];
  return sum;
}

/// One CTA a row. `x` is the row, which the caller's threads have written or can see.
template <class Row>
__device__ void norm_row(const Row& row, std::ptrdiff_t hidden, device_norm norm, bf16* normed) {
  const std::ptrdiff_t step = blockDim.x * unit;
  float squares = 0.0f;
  for (std::ptrdiff_t i = threadIdx.x * unit; i < hidden; i += step) {
    const float4 x = row(i);
    squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
  }
  const float scale = 1.0f / sqrtf(sum_of_block(squares) / static_cast<float>(hidden) + norm.eps);
  for (std::ptrdiff_t i = threadIdx.x * unit; i < hidden; i += step) {
    const float4 x = row(i), gain = load(norm.gain + i);
    store(normed + i, {x.x * scale * gain.x, x.y * scale * gain.y, x.z * scale * gain.z, x.w * scale * gain.w});
  }
}

struct embed_arguments {
  device_view<const std::int32_t, 1> tokens;
  device_view<const bf16, 2> embedding;
  device_norm norm;
  device_view<float, 2> residual;
  device_view<bf16, 2> normed;
};

/// One CTA a row.
__global__ void embed_kernel(const __grid_constant__ embed_arguments a) {
  wait_for_previous_kernel();
  launch_dependents();
  const std::ptrdiff_t hidden = a.embedding.extent(1);
  const bf16* const row = &a.embedding(a.tokens[blockIdx.x], 0);
  float* const residual = &a.residual(blockIdx.x, 0);
  for (std::ptrdiff_t i = threadIdx.x * unit; i < hidden; i += blockDim.x * unit)
    *reinterpret_cast<float4*>(residual + i) = load(row + i);
  norm_row([&](std::ptrdiff_t i) { return load(row + i); }, hidden, a.norm, &a.normed(blockIdx.x, 0));
}

struct norm_arguments {
  device_view<const float, 2> x;
  device_norm norm;
  device_view<bf16, 2> normed;
};

__global__ void norm_kernel(const __grid_constant__ norm_arguments a) {
  wait_for_previous_kernel();
  launch_dependents();
  const float* const row = &a.x(blockIdx.x, 0);
  norm_row([&](std::ptrdiff_t i) { return load(row + i); }, a.x.extent(1), a.norm, &a.normed(blockIdx.x, 0));
}

struct round_arguments {
  device_view<const std::int32_t, 1> rows{};  // empty: all, in order
  device_view<const float, 2> x, residual{};
  device_view<bf16, 2> out;
  device_view<float, 2> kept{};
};

/// blockIdx.y is the row of `out`.
__global__ void round_kernel(const __grid_constant__ round_arguments a) {
  wait_for_previous_kernel();
  launch_dependents();
  const std::ptrdiff_t to = blockIdx.y;
  const std::ptrdiff_t i = (std::ptrdiff_t{blockIdx.x} * blockDim.x + threadIdx.x) * unit;
  if (a.rows.empty()) {
    if (i < a.x.extent(1)) store(&a.out(to, i), load(&a.x(to, i)));
    return;
  }
  const std::ptrdiff_t from = a.rows[to];
  if (i < a.x.extent(1)) store(&a.out(to, i), load(&a.x(from, i)));
  if (i < a.kept.extent(1)) *reinterpret_cast<float4*>(&a.kept(to, i)) = load(&a.residual(from, i));
}

struct silu_arguments {
  device_view<const float, 2> gate_up;
  device_view<bf16, 2> active;
};

__device__ float silu_times(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

/// blockIdx.y is the row.
__global__ void silu_kernel(const __grid_constant__ silu_arguments a) {
  wait_for_previous_kernel();
  launch_dependents();
  const std::ptrdiff_t row = blockIdx.y, ffn = a.active.extent(1);
  const std::ptrdiff_t i = (std::ptrdiff_t{blockIdx.x} * blockDim.x + threadIdx.x) * unit;
  if (i >= ffn) return;
  const float4 gate = load(&a.gate_up(row, i)), up = load(&a.gate_up(row, ffn + i));
  store(&a.active(row, i),
        {silu_times(gate.x, up.x), silu_times(gate.y, up.y), silu_times(gate.z, up.z), silu_times(gate.w, up.w)});
}

template <class Arguments>
void launch(const context<device>& ctx, void (*kernel)(Arguments), dim3 grid, unsigned threads,
            const Arguments& arguments) {
  specattn::detail::start_kernel_early(ctx, kernel, grid, static_cast<int>(threads), arguments, "device_llama");
}

/// Whole warps for `items` of one row, as many as a CTA holds.
unsigned threads_for(std::ptrdiff_t items) {
  return static_cast<unsigned>((std::min<std::ptrdiff_t>)((items + 31) / 32 * 32, most_threads));
}

/// CTAs of 256 threads over `items` of each of `rows` rows.
constexpr unsigned flat_threads = 256;
dim3 flat_grid(std::ptrdiff_t items, std::ptrdiff_t rows) {
  return dim3(static_cast<unsigned>((items + flat_threads - 1) / flat_threads), static_cast<unsigned>(rows));
}

}  // namespace

void embed(context<device>& ctx, device_view<const std::int32_t, 1> tokens, device_view<const bf16, 2> embedding,
           device_norm norm, device_view<float, 2> residual, device_view<bf16, 2> normed) {
  launch(ctx, embed_kernel, dim3(static_cast<unsigned>(tokens.extent(0))), threads_for(embedding.extent(1) / unit),
         embed_arguments{tokens, embedding, norm, residual, normed});
}

void rms_norm(context<device>& ctx, device_view<const float, 2> x, device_norm norm, device_view<bf16, 2> normed) {
  launch(ctx, norm_kernel, dim3(static_cast<unsigned>(x.extent(0))), threads_for(x.extent(1) / unit),
         norm_arguments{x, norm, normed});
}

void round_rows(context<device>& ctx, device_view<const float, 2> x, device_view<bf16, 2> out) {
  launch(ctx, round_kernel, flat_grid(x.extent(1) / unit, out.extent(0)), flat_threads,
         round_arguments{.x = x, .out = out});
}

void gather_rows(context<device>& ctx, device_view<const std::int32_t, 1> rows, device_view<const float, 2> x,
                 device_view<const float, 2> residual, device_view<bf16, 2> out, device_view<float, 2> kept) {
  launch(ctx, round_kernel, flat_grid((std::max)(x.extent(1), residual.extent(1)) / unit, rows.extent(0)),
         flat_threads, round_arguments{rows, x, residual, out, kept});
}

void silu_multiply(context<device>& ctx, device_view<const float, 2> gate_up, device_view<bf16, 2> active) {
  launch(ctx, silu_kernel, flat_grid(active.extent(1) / unit, active.extent(0)), flat_threads,
         silu_arguments{gate_up, active});
}

}  // namespace mini_llm
