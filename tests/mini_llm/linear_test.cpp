// Packed weights and their product, beside a product in double precision.
#include "model/linear.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "specattn/buffer.hpp"
#include "specattn/scalar.hpp"

namespace {

using mini_llm::dtype;
using mini_llm::packed_matrix;
using specattn::context;
using specattn::cpu;

/// A number as a file of that element type holds it.
std::vector<std::byte> stored(float value, dtype type) {
  std::vector<std::byte> bytes(mini_llm::size_bytes(type));
  if (type == dtype::bf16) {
    const auto bits = specattn::from_float<specattn::bf16>(value);
    std::memcpy(bytes.data(), &bits, sizeof bits);
  } else if (type == dtype::f16) {
    const auto bits = specattn::from_float<specattn::fp16>(value);
    std::memcpy(bytes.data(), &bits, sizeof bits);
  } else {
    std::memcpy(bytes.data(), &value, sizeof value);
  }
  return bytes;
}

/// What that element type holds of a number.
float rounded(float value, dtype type) {
  if (type == dtype::bf16) return specattn::to_float(specattn::from_float<specattn::bf16>(value));
  if (type == dtype::f16) return specattn::to_float(specattn::from_float<specattn::fp16>(value));
  return value;
}

struct problem {
  packed_matrix matrix;
  specattn::buffer<std::byte> memory;
  std::vector<float> weights;  // [outputs, inputs] as stored
  std::vector<float> x;        // [rows, stride]
  std::ptrdiff_t stride = 0;
  std::int64_t rows = 0;

  problem(std::int64_t outputs, std::int64_t inputs, std::int64_t row_count, dtype type)
      : stride(inputs + 3), rows(row_count) {
    std::mt19937 random(static_cast<unsigned>(outputs * 1000 + inputs));
    std::normal_distribution<float> normal;
    matrix.type = type;
    matrix.outputs = outputs;
    matrix.inputs = inputs;
    memory = specattn::buffer<std::byte>(matrix.bytes());
    matrix.data = memory.data();
    for (std::int64_t o = 0; o < outputs; ++o) {
      std::vector<std::byte> row;
      for (std::int64_t i = 0; i < inputs; ++i) {
        const float weight = normal(random);
        weights.push_back(rounded(weight, type));
        const auto bytes = stored(weight, type);
        row.insert(row.end(), bytes.begin(), bytes.end());
      }
      matrix.set_row(o, row.data());
    }
    x.resize(static_cast<std::size_t>(rows * stride));
    for (float& value : x) value = normal(random);
  }

  /// [rows, panels * 64]
  std::vector<float> run(context<cpu>& ctx, std::int64_t first = 0, std::int64_t count = -1) const {
    const std::int64_t width = matrix.panels() * packed_matrix::panel_outputs;
    const std::int64_t used = count < 0 ? rows : count;
    std::vector<float> y(static_cast<std::size_t>(used * width), -1.0F);
    mini_llm::product(ctx, matrix, {x.data() + first * stride, stride, used},
                      [&](std::int64_t row, std::int64_t panel, const float* values) {
                        std::memcpy(y.data() + row * width + panel * packed_matrix::panel_outputs, values,
                                    packed_matrix::panel_outputs * sizeof(float));
                      });
    return y;
  }
};

constexpr dtype types[] = {dtype::bf16, dtype::f16, dtype::f32};

}  // namespace

TEST_CASE("product: equals double precision for every element type, odd sizes included") {
  context<cpu> ctx(2);
  for (const dtype type : types) {
    for (const std::int64_t outputs : {1, 63, 64, 65, 200}) {
      for (const std::int64_t inputs : {1, 2, 7, 64, 131}) {
        for (const std::int64_t rows : {1, 4, 7, 50}) {
          const problem p(outputs, inputs, rows, type);
          const auto y = p.run(ctx);
          const std::int64_t width = p.matrix.panels() * packed_matrix::panel_outputs;
          double worst = 0.0;
          for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t o = 0; o < width; ++o) {
              double sum = 0.0;
              double size = 1.0;
              for (std::int64_t i = 0; o < outputs && i < inputs; ++i) {
                const double term = static_cast<double>(p.x[static_cast<std::size_t>(r * p.stride + i)]) *
                                    static_cast<double>(p.weights[static_cast<std::size_t>(o * inputs + i)]);
                sum += term;
                size += std::abs(term);
              }
              const double got = static_cast<double>(y[static_cast<std::size_t>(r * width + o)]);
              worst = std::max(worst, std::abs(got - sum) / size);
            }
          }
          CAPTURE(outputs);
          CAPTURE(inputs);
          CAPTURE(rows);
          CHECK(worst < 4e-6);
        }
      }
    }
  }
}

TEST_CASE("product: a row's bits do not depend on its neighbours or the threads") {
  for (const dtype type : types) {
    const problem p(200, 131, 64, type);
    context<cpu> alone(1);
    const auto all = p.run(alone);
    const std::size_t width = static_cast<std::size_t>(p.matrix.panels() * packed_matrix::panel_outputs);
    for (const int threads : {1, 2, 5}) {
      context<cpu> ctx(threads);
      for (const std::int64_t count : {1, 2, 3, 4, 5, 6, 7, 9, 13, 64}) {
        for (std::int64_t first = 0; first + count <= p.rows; first += count) {
          const auto some = p.run(ctx, first, count);
          CHECK(std::memcmp(some.data(), all.data() + static_cast<std::size_t>(first) * width,
                            some.size() * sizeof(float)) == 0);
        }
      }
    }
  }
}

TEST_CASE("packed_matrix: rows come back as they were stored") {
  for (const dtype type : types) {
    const problem p(70, 33, 1, type);
    std::vector<float> row(33);
    for (std::int64_t o = 0; o < p.matrix.outputs; ++o) {
      p.matrix.read_row(o, row.data());
      CHECK(std::memcmp(row.data(), p.weights.data() + o * 33, 33 * sizeof(float)) == 0);
    }
  }
}

TEST_CASE("cut_product: every panel and every row is in exactly one task") {
  for (const std::int64_t panels : {1, 2, 4, 11, 22, 64}) {
    for (const std::int64_t rows : {1, 5, 6, 7, 47, 48, 256, 1000}) {
      for (const int threads : {1, 2, 3, 16}) {
        const mini_llm::product_tasks cut = mini_llm::cut_product(panels, rows, threads);
        CHECK(cut.column_tasks >= 1);
        CHECK(cut.column_tasks <= panels);
        CHECK(cut.row_tasks >= 1);
        CHECK(cut.row_tasks <= cut.row_blocks);
        for (std::int64_t block = 0; block < cut.row_blocks; ++block) {
          const std::int64_t count = (block + 1) * rows / cut.row_blocks - block * rows / cut.row_blocks;
          CHECK(count >= 1);
          CHECK(count <= mini_llm::max_block_rows);
        }
      }
    }
  }
}
