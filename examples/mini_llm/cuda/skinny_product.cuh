// Y = X W^T for few rows, where reading the weights is all the cost: the arithmetic before and after the product happens
// on the way, so that a layer is four of these and its attention.
#pragma once

#include <cstdint>

#include "device_weights.cuh"
#include "row_kernels.cuh"
#include "specattn/cuda/context.cuh"
#include "specattn/scalar.hpp"

namespace mini_llm {

/// The rows of a product, one of the two. Rows of adjacent elements.
struct skinny_rows {
  device_view<const float, 2> wide{};  // rounded to bf16 on the way
  device_view<const specattn::bf16, 2> rounded{};
  device_view<const float, 2>
      squares{};     // [rows, parts] with `rounded`: what is to be divided by the root of the mean
  float eps = 0.0f;  // of the squares, and eps
};

/// What sums are to the product behind them: rounded = sums * gain and, a part for each eight of them, the sums of their
/// squares. With those a product norms its rows without reading them twice.
struct skinny_next {
  const float* gain = nullptr;
  device_view<specattn::bf16, 2> rounded{};  // [rows, outputs]
  device_view<float, 2> squares{};           // [rows, outputs / 8]
};

/// Where it goes, one of the two. Rows of adjacent elements.
struct skinny_result {
  device_view<float, 2> sums{};             // [rows, outputs]
  bool add = false;                         // to what `sums` holds
  skinny_next next{};                       // beside `sums`
  device_view<specattn::bf16, 2> active{};  // [rows, outputs / 2] silu(first half) * second half
};

inline constexpr std::ptrdiff_t skinny_part = 8;  // sums to a part of the squares

/// Whether so many rows and inputs are few enough: at most 16 rows, which fit into a multiprocessor's shared memory,
/// inputs in multiples of 64.
bool is_skinny(const specattn::context<specattn::cuda>& ctx, std::ptrdiff_t rows, std::ptrdiff_t inputs);

/// One launch. Weights are brought in from its first moment on: on Hopper it starts while the kernel before still runs,
/// and waits for that before it reads the rows. A row's sums do not depend on the others.
/// \pre  is_skinny(); outputs are a multiple of 16 for `active`, of 8 for `next`; 16-byte aligned rows
/// \cost reads the weights once, the rows once for each multiprocessor
void skinny_product(specattn::context<specattn::cuda>& ctx, const skinny_rows& x, const device_matrix& weights,
                    const skinny_result& y);

}  // namespace mini_llm
