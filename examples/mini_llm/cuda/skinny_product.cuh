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
  device_norm norm{};                  // of `wide`, if there is a gain
  device_view<const specattn::bf16, 2> rounded{};
};

/// Where it goes, one of the two. Rows of adjacent elements.
struct skinny_result {
  device_view<float, 2> sums{};             // [rows, outputs]
  bool add = false;                         // to what `sums` holds
  device_view<specattn::bf16, 2> active{};  // [rows, outputs / 2] silu(first half) * second half
};

/// Whether so many rows and inputs are few enough: at most 16 rows, which fit into a multiprocessor's shared memory,
/// inputs in multiples of 64 (of 128 where rows are normed).
bool is_skinny(const specattn::context<specattn::cuda>& ctx, std::ptrdiff_t rows, std::ptrdiff_t inputs, bool normed);

/// One launch. Weights are brought in from its first moment on: on Hopper it starts while the kernel before still runs,
/// and waits for that before it reads the rows. A row's sums do not depend on the others.
/// \pre  is_skinny(); outputs are a multiple of 16 for `active`; 16-byte aligned rows
/// \cost reads the weights once, the rows once for each multiprocessor
void skinny_product(specattn::context<specattn::cuda>& ctx, const skinny_rows& x, const device_matrix& weights,
                    const skinny_result& y);

}  // namespace mini_llm
