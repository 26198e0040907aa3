// Counter-based random numbers: a pure function of (seed, stream, counter), the same on host and device.
#pragma once

#include <array>
#include <cstdint>

#include "config.hpp"

namespace specattn::inline v0_1 {

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
SPECATTN_HD inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                                       std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

/// What a number is drawn for. Each use has a sequence of its own, so that a draft that was thrown away or a round
/// that drafted more never shifts the numbers of another use.
enum class random_use : std::uint32_t { draft = 0, accept = 1, emit = 2 };

/// Uniform on [0, 1), 24 bits. `position` is the text position the number decides about.
SPECATTN_HD inline float uniform(std::uint64_t seed, std::uint64_t position, random_use use) {
  const auto words = philox({static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32),
                             static_cast<std::uint32_t>(use), 0u},
                            {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
  return static_cast<float>(words[0] >> 8) * 0x1p-24f;
}

}  // namespace specattn::inline v0_1
