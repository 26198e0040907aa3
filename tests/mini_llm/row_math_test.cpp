// Norm, activation and rotary embedding beside double precision.
#include "model/row_math.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <vector>

namespace {

constexpr double pi = 3.14159265358979323846;

/// Llama 3's rule as its authors write it, by wavelengths.
double llama3_frequency(double frequency, const mini_llm::rope_config& rope) {
  const double length = static_cast<double>(rope.original_max_context);
  const double wavelength = 2.0 * pi / frequency;
  if (wavelength < length / rope.high_freq_factor) return frequency;
  if (wavelength > length / rope.low_freq_factor) return frequency / rope.factor;
  const double smooth = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0 - smooth) * frequency / rope.factor + smooth * frequency;
}

}  // namespace

TEST_CASE("rope_frequencies: plain, linear and Llama 3 scaling equal their definitions") {
  mini_llm::rope_config rope;
  rope.theta = 500000.0;
  constexpr int head_dim = 128;
  const auto plain = mini_llm::rope_frequencies(rope, head_dim);
  rope.scaling = mini_llm::rope_scaling::linear;
  rope.factor = 4.0;
  const auto linear = mini_llm::rope_frequencies(rope, head_dim);
  rope.scaling = mini_llm::rope_scaling::llama3;
  rope.factor = 32.0;
  rope.original_max_context = 8192;
  const auto llama3 = mini_llm::rope_frequencies(rope, head_dim);
  REQUIRE(plain.size() == 64);
  int kept = 0;
  int slowed = 0;
  for (int i = 0; i < 64; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const double expected = 1.0 / std::pow(500000.0, 2.0 * i / head_dim);
    CHECK(plain[at] == doctest::Approx(expected).epsilon(1e-13));
    CHECK(linear[at] == doctest::Approx(expected / 4.0).epsilon(1e-13));
    const double scaled = llama3_frequency(expected, rope);
    CHECK(llama3[at] == doctest::Approx(scaled).epsilon(1e-12));
    kept += scaled == expected ? 1 : 0;
    slowed += scaled == expected / 32.0 ? 1 : 0;
  }
  CHECK(kept > 10);  // each of the three branches was met
  CHECK(slowed > 10);
  CHECK(kept + slowed < 64);
}

TEST_CASE("rope_angles: exact to float over the whole context") {
  mini_llm::rope_config rope;
  rope.theta = 100000.0;
  const auto frequencies = mini_llm::rope_frequencies(rope, 64);
  std::vector<float> cosines(32);
  std::vector<float> sines(32);
  for (const std::int32_t position : {0, 1, 4095, 131071}) {
    mini_llm::rope_angles(frequencies, position, cosines.data(), sines.data());
    for (int i = 0; i < 32; ++i) {
      const double angle = position * std::pow(100000.0, -i / 32.0);
      CHECK(std::abs(static_cast<double>(cosines[static_cast<std::size_t>(i)]) - std::cos(angle)) < 1e-7);
      CHECK(std::abs(static_cast<double>(sines[static_cast<std::size_t>(i)]) - std::sin(angle)) < 1e-7);
    }
  }
}

TEST_CASE("rotate_head: turns the pairs (i, i + half)") {
  std::vector<float> x = {1, 2, 3, 4};
  const std::vector<float> cosines = {0, 0.6F};
  const std::vector<float> sines = {1, 0.8F};
  mini_llm::rotate_head(x.data(), cosines.data(), sines.data(), 2);
  CHECK(x[0] == doctest::Approx(-3));
  CHECK(x[1] == doctest::Approx(2 * 0.6 - 4 * 0.8));
  CHECK(x[2] == doctest::Approx(1));
  CHECK(x[3] == doctest::Approx(4 * 0.6 + 2 * 0.8));
}

TEST_CASE("rms_norm: equals double precision, sizes that fill no vector included") {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const int size : {1, 15, 16, 17, 256, 1000}) {
    const auto count = static_cast<std::size_t>(size);
    std::vector<float> x(count);
    std::vector<float> gain(count);
    std::vector<float> out(count);
    for (float& v : x) v = normal(random);
    for (float& v : gain) v = normal(random);
    mini_llm::rms_norm(x.data(), gain.data(), 1e-5, size, out.data());
    double sum = 0.0;
    for (const float v : x) sum += static_cast<double>(v) * static_cast<double>(v);
    const double scale = 1.0 / std::sqrt(sum / size + 1e-5);
    for (std::size_t i = 0; i < count; ++i) {
      const double expected = static_cast<double>(x[i]) * scale * static_cast<double>(gain[i]);
      CHECK(static_cast<double>(out[i]) == doctest::Approx(expected).epsilon(1e-6));
    }
  }
}

TEST_CASE("silu_multiply: within a few units in the last place, from -200 to 200") {
  constexpr int size = 8016;  // a multiple of 16 that is not one of 32
  std::vector<float> gate(size);
  std::vector<float> up(size, 3.0F);
  std::vector<float> out(size);
  for (int i = 0; i < size; ++i) gate[static_cast<std::size_t>(i)] = static_cast<float>(i - size / 2) * 0.05F;
  mini_llm::silu_multiply(gate.data(), up.data(), size, out.data());
  for (std::size_t i = 0; i < gate.size(); ++i) {
    const double g = static_cast<double>(gate[i]);
    const double expected = 3.0 * g / (1.0 + std::exp(-g));
    CHECK(std::abs(static_cast<double>(out[i]) - expected) <= 6e-7 * std::abs(expected) + 1e-35);
  }
}
