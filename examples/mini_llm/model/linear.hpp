// Y = X W^T over packed weights: the same bits for a row whoever computes it and whatever stands beside it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "safetensors.hpp"
#include "specattn/cpu/context.hpp"

namespace mini_llm {

/// Weights W [outputs, inputs], packed in panels of 64 outputs that are read front to back. A panel holds, input by
/// input, the weights of its 64 outputs; bf16 inputs go in pairs, so that one 32-bit word holds both weights of one
/// output. Outputs behind the last are zero.
///
/// Each output is one chain of fused multiply-adds over ascending inputs, in float. So an element's bits depend on its
/// row and its weights alone: not on the number of rows, on the threads or on the place of the row.
struct packed_matrix {
  static constexpr std::int64_t panel_outputs = 64;

  dtype type = dtype::bf16;  ///< f32, f16 or bf16
  std::int64_t outputs = 0;
  std::int64_t inputs = 0;
  std::byte* data = nullptr;  ///< 64-byte aligned; owned by whoever packed it

  std::int64_t panels() const { return (outputs + panel_outputs - 1) / panel_outputs; }
  std::size_t panel_bytes() const;
  std::size_t bytes() const { return static_cast<std::size_t>(panels()) * panel_bytes(); }

  /// Writes the weights of one output. \param row [inputs] elements of `type`, of any alignment
  void set_row(std::int64_t output, const std::byte* row);
  /// Row `output` as floats. \param out [inputs]
  void read_row(std::int64_t output, float* out) const;
};

/// Rows of floats, `stride` apart.
struct rows_in {
  const float* data = nullptr;
  std::ptrdiff_t stride = 0;
  std::int64_t count = 0;
};

/// The products of up to max_block_rows rows with one panel.
/// \param out [rows, 64], overwritten
void multiply_panel(const packed_matrix& weights, std::int64_t panel, const float* x, std::ptrdiff_t x_stride,
                    std::int64_t rows, float* out);
inline constexpr std::int64_t max_block_rows = 6;

/// How a product is cut into tasks: enough of them to even out, few enough to be cheap.
struct product_tasks {
  std::int64_t column_tasks = 1;  ///< ranges of panels
  std::int64_t row_tasks = 1;     ///< ranges of row blocks
  std::int64_t row_blocks = 1;    ///< blocks of at most max_block_rows rows, as even as can be
};
product_tasks cut_product(std::int64_t panels, std::int64_t rows, int threads);

/// Multiplies every row with the weights and hands each 64 outputs of a row to `epilogue(row, panel, values)` once,
/// on some thread of the team.
/// \cost rows * outputs * inputs multiply-adds; reads the weights once for each block of rows
template <class Epilogue>
void product(specattn::context<specattn::cpu>& ctx, const packed_matrix& weights, rows_in x,
             const Epilogue& epilogue) {
  if (x.count == 0) return;
  const std::int64_t panels = weights.panels();
  const product_tasks cut = cut_product(panels, x.count, ctx.threads());
  ctx.parallel_for(cut.column_tasks * cut.row_tasks, [&](std::ptrdiff_t task, int) {
    alignas(64) float values[max_block_rows * packed_matrix::panel_outputs];
    const std::int64_t column_task = task % cut.column_tasks;
    const std::int64_t row_task = task / cut.column_tasks;
    const std::int64_t first_block = row_task * cut.row_blocks / cut.row_tasks;
    const std::int64_t last_block = (row_task + 1) * cut.row_blocks / cut.row_tasks;
    const std::int64_t last_panel = (column_task + 1) * panels / cut.column_tasks;
    for (std::int64_t panel = column_task * panels / cut.column_tasks; panel < last_panel; ++panel) {
      for (std::int64_t block = first_block; block < last_block; ++block) {
        const std::int64_t first_row = block * x.count / cut.row_blocks;
        const std::int64_t rows = (block + 1) * x.count / cut.row_blocks - first_row;
        multiply_panel(weights, panel, x.data + first_row * x.stride, x.stride, rows, values);
        for (std::int64_t r = 0; r < rows; ++r) {
          epilogue(first_row + r, panel, values + r * packed_matrix::panel_outputs);
        }
      }
    }
  });
}

}  // namespace mini_llm
