// The rows that selections are timed on: kinds of weights, each row scaled to unit mass.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "cuda_harness.cuh"
#include "specattn/scalar.hpp"

namespace bench {

enum class row_kind {
  softmax,    ///< exponentials of N(0, 2.5) logits, four sinks, a recent window: as attention has them
  uniform,    ///< evenly spread over (0, 1)
  one_hot,    ///< one position holds everything
  all_equal,  ///< one weight
  heavy_tie,  ///< eight weights, each half the one before
  flat,       ///< the mean of exponentials of N(0, 1) logits of 32 heads: as mixtures have them,
  flat_16,    ///< of 16,
  flat_128,   ///< and of 32 heads in four draft steps
  real,       ///< attention rows from a file
};
inline const char* name_of(row_kind kind) {
  constexpr const char* names[] = {"softmax", "uniform",  "one-hot",   "all equal", "heavy ties",
                                   "flat",    "flat, 16", "flat, 128", "real"};
  return names[static_cast<int>(kind)];
}

/// Rows of a file: int64 rows, int64 length, then rows × length float32, all little-endian. draft_rows writes such.
struct file_rows {
  std::int64_t rows = 0, length = 0;
  std::vector<float> weights;
};

inline file_rows read_rows(const std::string& path) {
  file_rows read;
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(&read.rows), sizeof read.rows);
  file.read(reinterpret_cast<char*>(&read.length), sizeof read.length);
  if (file && read.rows > 0 && read.length > 0 && read.rows * read.length < (std::int64_t{1} << 28)) {
    read.weights.resize(static_cast<std::size_t>(read.rows * read.length));
    file.read(reinterpret_cast<char*>(read.weights.data()),
              static_cast<std::streamsize>(read.weights.size() * sizeof(float)));
  }
  if (!file || read.weights.empty()) {
    std::fprintf(stderr, "%s: not a file of rows\n", path.c_str());
    std::exit(1);
  }
  return read;
}

__device__ inline float unscaled_weight(row_kind kind, std::uint64_t i, std::int32_t length, std::uint32_t seed) {
  const auto position = static_cast<std::int32_t>(i % static_cast<std::uint64_t>(length));
  if (kind == row_kind::flat || kind == row_kind::flat_16 || kind == row_kind::flat_128) {
    const int heads = kind == row_kind::flat ? 32 : kind == row_kind::flat_16 ? 16 : 128;
    float sum = 0.0f;
    for (int head = 0; head < heads; ++head)
      sum += expf(normal(i * static_cast<unsigned>(heads) + static_cast<unsigned>(head), seed));
    return sum;
  }
  const std::uint64_t x = random_bits(i, seed);
  if (kind == row_kind::uniform) return (static_cast<float>(x >> 40) + 0.5f) * 0x1p-24f;
  if (kind == row_kind::one_hot) return position == length / 3 ? 1.0f : 0.0f;
  if (kind == row_kind::all_equal) return 1.0f;
  if (kind == row_kind::heavy_tie) return exp2f(-static_cast<float>(x & 7u));
  float logit = 2.5f * normal(i, seed);
  if (position < 4) logit += 6.0f;
  if (position >= length - 64) logit += 2.0f;
  return expf(logit);
}

/// A CTA of 256 for each row. `from`: what row_kind::real takes its rows from, in steps of 97 so that few
/// of them are of many layers and heads.
template <specattn::storage T>
__global__ void fill_rows(T* rows, std::int32_t length, row_kind kind, std::uint32_t seed, const float* from,
                          std::int64_t from_rows) {
  __shared__ double sums[256];
  const std::int64_t first = blockIdx.x * std::int64_t{length};
  const auto weight = [&](std::int32_t j) {
    return kind == row_kind::real ? from[blockIdx.x * std::int64_t{97} % from_rows * length + j]
                                  : unscaled_weight(kind, static_cast<std::uint64_t>(first + j), length, seed);
  };
  double sum = 0;
  for (std::int32_t j = static_cast<std::int32_t>(threadIdx.x); j < length; j += 256) sum += weight(j);
  sums[threadIdx.x] = sum;
  for (int half = 128; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  for (std::int32_t j = static_cast<std::int32_t>(threadIdx.x); j < length; j += 256)
    rows[first + j] = specattn::from_float<T>(static_cast<float>(weight(j) / sums[0]));
}

}  // namespace bench
