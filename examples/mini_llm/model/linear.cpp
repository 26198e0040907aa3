#include "linear.hpp"

#include <array>
#include <cstring>
#include <utility>

#include "specattn/cpu/lanes.hpp"
#include "specattn/scalar.hpp"

namespace mini_llm {
namespace {

using specattn::detail::lanes;

constexpr int lane_count = lanes::width;
constexpr std::int64_t panel_outputs = packed_matrix::panel_outputs;

/// Where a panel keeps the weight of (output, input), in elements, and how two adjacent inputs are read.
struct bf16_panel {
  using element = specattn::bf16;
  static constexpr std::int64_t offset(std::int64_t output, std::int64_t input) {
    return ((input / 2) * panel_outputs + output) * 2 + input % 2;
  }
  /// Both inputs of a pair for lane_count outputs: the halves of one word each, so one operation a vector.
  [[gnu::always_inline]] static void load_pair(const element* panel, std::int64_t input, std::int64_t output,
                                               lanes& even, lanes& odd) {
    typedef std::uint32_t word_lanes __attribute__((vector_size(sizeof(lanes))));
    word_lanes words;
    std::memcpy(&words, panel + offset(output, input), sizeof words);
    const word_lanes even_words = words << 16;
    const word_lanes odd_words = words & 0xffff0000U;
    std::memcpy(&even, &even_words, sizeof even);
    std::memcpy(&odd, &odd_words, sizeof odd);
  }
};

/// fp16 or float, input by input.
template <class Element>
struct plain_panel {
  using element = Element;
  static constexpr std::int64_t offset(std::int64_t output, std::int64_t input) {
    return input * panel_outputs + output;
  }
  [[gnu::always_inline]] static void load_pair(const element* panel, std::int64_t input, std::int64_t output,
                                               lanes& even, lanes& odd) {
    even = lanes::load(panel + offset(output, input));
    odd = lanes::load(panel + offset(output, input + 1));
  }
};

/// Calls `use` with the panel format of an element type.
template <class Use>
decltype(auto) with_format(dtype type, Use&& use) {
  switch (type) {
    case dtype::bf16:
      return use(bf16_panel{});
    case dtype::f16:
      return use(plain_panel<specattn::fp16>{});
    default:
      return use(plain_panel<float>{});
  }
}

/// `Rows` rows times `Vectors` adjacent lane groups of a panel, all sums in registers.
template <class Format, int Rows, int Vectors>
void multiply_tile(const typename Format::element* panel, std::int64_t inputs, std::int64_t first_output,
                   const float* x, std::ptrdiff_t x_stride, float* out) {
  lanes sums[Rows][Vectors];
  for (auto& row : sums) {
    for (lanes& sum : row) sum = lanes::zero();
  }
  lanes even[Vectors];
  lanes odd[Vectors];
  // Panels hold an even number of inputs; the one behind an odd last is zero and is not multiplied.
  for (std::int64_t input = 0; input + 1 < inputs; input += 2) {
    for (int v = 0; v < Vectors; ++v) {
      Format::load_pair(panel, input, first_output + v * lane_count, even[v], odd[v]);
    }
    for (int r = 0; r < Rows; ++r) {
      const lanes value = lanes::broadcast(x[r * x_stride + input]);
      for (int v = 0; v < Vectors; ++v) sums[r][v] = fmadd(value, even[v], sums[r][v]);
    }
    for (int r = 0; r < Rows; ++r) {
      const lanes value = lanes::broadcast(x[r * x_stride + input + 1]);
      for (int v = 0; v < Vectors; ++v) sums[r][v] = fmadd(value, odd[v], sums[r][v]);
    }
  }
  if (inputs % 2 != 0) {
    for (int v = 0; v < Vectors; ++v) {
      Format::load_pair(panel, inputs - 1, first_output + v * lane_count, even[v], odd[v]);
      for (int r = 0; r < Rows; ++r) {
        sums[r][v] = fmadd(lanes::broadcast(x[r * x_stride + inputs - 1]), even[v], sums[r][v]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v].store(out + r * panel_outputs + first_output + v * lane_count);
  }
}

/// Lane groups a tile holds: as many as leave registers for the weights, enough to hide a multiply-add's latency.
template <int Rows>
constexpr int tile_vectors() {
  if constexpr (lanes::many_registers) return 4;
  if constexpr (Rows == 1) return 8;
  return Rows <= 3 ? 4 : 2;
}

template <class Format, int Rows>
void multiply_rows(const typename Format::element* panel, std::int64_t inputs, const float* x,
                   std::ptrdiff_t x_stride, float* out) {
  constexpr int vectors = tile_vectors<Rows>();
  for (std::int64_t output = 0; output < panel_outputs; output += vectors * lane_count) {
    multiply_tile<Format, Rows, vectors>(panel, inputs, output, x, x_stride, out);
  }
}

template <class Format>
using multiply_function = void (*)(const typename Format::element*, std::int64_t, const float*, std::ptrdiff_t,
                                   float*);

template <class Format, std::size_t... Rows>
constexpr std::array<multiply_function<Format>, sizeof...(Rows)> multiply_table(std::index_sequence<Rows...>) {
  return {multiply_rows<Format, static_cast<int>(Rows) + 1>...};
}

std::size_t padded_inputs(std::int64_t inputs) { return static_cast<std::size_t>(inputs + inputs % 2); }

}  // namespace

std::size_t packed_matrix::panel_bytes() const {
  return padded_inputs(inputs) * static_cast<std::size_t>(panel_outputs) * size_bytes(type);
}

void packed_matrix::set_row(std::int64_t output, const std::byte* row) {
  std::byte* const panel = data + static_cast<std::size_t>(output / panel_outputs) * panel_bytes();
  const std::size_t size = size_bytes(type);
  with_format(type, [&](auto format) {
    for (std::int64_t input = 0; input < inputs; ++input) {
      const auto offset = static_cast<std::size_t>(format.offset(output % panel_outputs, input));
      std::memcpy(panel + offset * size, row + static_cast<std::size_t>(input) * size, size);
    }
  });
}

void packed_matrix::read_row(std::int64_t output, float* out) const {
  const std::byte* const panel = data + static_cast<std::size_t>(output / panel_outputs) * panel_bytes();
  with_format(type, [&](auto format) {
    using element = typename decltype(format)::element;
    for (std::int64_t input = 0; input < inputs; ++input) {
      const auto offset = static_cast<std::size_t>(format.offset(output % panel_outputs, input));
      element stored;
      std::memcpy(&stored, panel + offset * sizeof stored, sizeof stored);
      out[input] = specattn::to_float(stored);
    }
  });
}

void multiply_panel(const packed_matrix& weights, std::int64_t panel, const float* x, std::ptrdiff_t x_stride,
                    std::int64_t rows, float* out) {
  const std::byte* const data = weights.data + static_cast<std::size_t>(panel) * weights.panel_bytes();
  with_format(weights.type, [&](auto format) {
    using panel_format = decltype(format);
    static constexpr auto table =
        multiply_table<panel_format>(std::make_index_sequence<static_cast<std::size_t>(max_block_rows)>{});
    const auto* const elements = reinterpret_cast<const typename panel_format::element*>(data);
    table[static_cast<std::size_t>(rows - 1)](elements, weights.inputs, x, x_stride, out);
  });
}

product_tasks cut_product(std::int64_t panels, std::int64_t rows, int threads) {
  product_tasks cut;
  cut.row_blocks = (rows + max_block_rows - 1) / max_block_rows;
  if (threads == 1) return cut;
  const std::int64_t wanted = std::int64_t{4} * threads;
  cut.column_tasks = std::min(panels, wanted);
  if (cut.column_tasks < wanted && cut.row_blocks >= 8) {
    cut.row_tasks = std::min(cut.row_blocks / 4, (wanted + cut.column_tasks - 1) / cut.column_tasks);
  }
  return cut;
}

}  // namespace mini_llm
