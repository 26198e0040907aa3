// What a Llama model does to one row outside its products. Each result depends on its own row alone.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model_config.hpp"

namespace mini_llm {

/// out = x / sqrt(mean(x²) + eps) * gain. `out` may be `x`; other overlaps are not allowed.
void rms_norm(const float* x, const float* gain, double eps, std::int64_t size, float* out);

/// out = silu(gate) * up, silu(g) = g / (1 + exp(-g)). exp is within 2 units in the last place.
/// \param size a multiple of 16
void silu_multiply(const float* gate, const float* up, std::int64_t size, float* out);

/// Turns the pairs (x[i], x[i + half]) of one head by the angles whose cosines and sines are given.
void rotate_head(float* x, const float* cosines, const float* sines, std::int64_t half);

/// Radians a position turns each pair, [head_dim / 2].
std::vector<double> rope_frequencies(const rope_config& rope, std::int64_t head_dim);

/// `factor` times the cosines and sines of one position's angles, each [frequencies.size()].
void rope_angles(std::span<const double> frequencies, std::int32_t position, float* cosines, float* sines,
                 double factor = 1.0);

}  // namespace mini_llm
