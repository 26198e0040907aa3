// Counter-based random numbers: a pure function of (seed, position, use), the same on host and device.
#pragma once

#include <cstdint>

#include "config.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// Four 32-bit words: a counter of Philox, or what it makes of one.
struct philox_words {
  std::uint32_t word[4];
};

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). `key0` and `key1` are the
/// key's low and high word.
SPECATTN_HD constexpr philox_words philox(philox_words counter, std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter.word[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<std::uint32_t>(b >> 32) ^ counter.word[1] ^ key0, static_cast<std::uint32_t>(b),
                static_cast<std::uint32_t>(a >> 32) ^ counter.word[3] ^ key1, static_cast<std::uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

/// What a number is drawn for. Each use has a sequence of its own, so that a draft that was thrown away or a round
/// that drafted more never shifts the numbers of another use.
enum class random_use : std::uint32_t { draft = 0, accept = 1, emit = 2 };

/// Uniform on [0, 1), 53 bits: 24 would leave the tail of a large vocabulary on a grid as coarse as its own
/// probabilities. `position` is the text position the number decides about.
SPECATTN_HD constexpr double uniform(std::uint64_t seed, std::uint64_t position, random_use use) {
  const philox_words random =
      philox({{static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32),
               static_cast<std::uint32_t>(use), 0u}},
             static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
  const std::uint64_t bits = (std::uint64_t{random.word[0]} << 32) | random.word[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
