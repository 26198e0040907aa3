// Sets of items as words of 64 bits, for the CPU's select(): built by comparison, walked and unpacked in order.
// AVX-512 does a word in four registers; the plain loops beside it give the same results.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../select_math.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SPECATTN_SELECT_AVX512 1
#include <immintrin.h>
#else
#define SPECATTN_SELECT_AVX512 0
#endif

namespace specattn::inline SPECATTN_CODE::detail {

/// A monotone 32-bit image of an item, for binning only: which one is used does not change the result.
inline std::uint32_t coarse_key(std::uint32_t key) { return key; }
inline std::uint32_t coarse_key(std::uint64_t score) {
  return std::bit_cast<std::uint32_t>(static_cast<float>(static_cast<std::int64_t>(score)));
}

inline constexpr std::int32_t items_per_word = 64;
inline std::int32_t words_for(std::int32_t items) { return (items + items_per_word - 1) / items_per_word; }

/// Sets bits [begin, end).
inline void set_bits(std::uint64_t* words, std::int32_t begin, std::int32_t end) {
  while (begin < end) {
    const std::int32_t bit = begin % items_per_word;
    const std::int32_t run = (std::min)(items_per_word - bit, end - begin);
    const std::uint64_t ones = run == items_per_word ? ~std::uint64_t{0} : (std::uint64_t{1} << run) - 1;
    words[begin / items_per_word] |= ones << bit;
    begin += run;
  }
}

inline std::int32_t count_bits(const std::uint64_t* words, std::int32_t word_count) {
  std::int32_t count = 0;
  for (std::int32_t w = 0; w < word_count; ++w) count += std::popcount(words[w]);
  return count;
}

/// Calls visit(i) for every set bit, ascending.
template <class Visit>
void for_each_bit(const std::uint64_t* words, std::int32_t word_count, Visit visit) {
  for (std::int32_t w = 0; w < word_count; ++w) {
    for (std::uint64_t bits = words[w]; bits != 0; bits &= bits - 1)
      visit(w * items_per_word + std::countr_zero(bits));
  }
}

/// The lowest `count` set bits.
inline std::uint64_t lowest_bits(std::uint64_t bits, std::uint64_t count) {
  std::uint64_t rest = bits;
  for (; count > 0 && rest != 0; --count) rest &= rest - 1;
  return bits ^ rest;
}

// ---- comparing ----------------------------------------------------------------------------------------------

struct compared_word {
  std::uint64_t above;  ///< bit i: items[i] > key
  std::uint64_t equal;  ///< bit i: items[i] == key
};

#if SPECATTN_SELECT_AVX512

inline compared_word compare_word(const std::uint32_t* items, std::uint32_t key) {
  const __m512i keys = _mm512_set1_epi32(static_cast<int>(key));
  compared_word word{0, 0};
  for (int quarter = 3; quarter >= 0; --quarter) {
    const __m512i sixteen = _mm512_loadu_si512(items + 16 * quarter);
    word.above = word.above << 16 | _mm512_cmpgt_epu32_mask(sixteen, keys);
    word.equal = word.equal << 16 | _mm512_cmpeq_epu32_mask(sixteen, keys);
  }
  return word;
}

inline compared_word compare_word(const std::uint64_t* items, std::uint64_t key) {
  const __m512i keys = _mm512_set1_epi64(static_cast<long long>(key));
  compared_word word{0, 0};
  for (int eighth = 7; eighth >= 0; --eighth) {
    const __m512i eight = _mm512_loadu_si512(items + 8 * eighth);
    word.above = word.above << 8 | _mm512_cmpgt_epu64_mask(eight, keys);
    word.equal = word.equal << 8 | _mm512_cmpeq_epu64_mask(eight, keys);
  }
  return word;
}

#else

/// Bit i: flags[i], each 0 or 1.
inline std::uint64_t pack_flags(const std::uint8_t* flags) {
  std::uint64_t word = 0;
  if constexpr (std::endian::native == std::endian::little) {
    for (int i = 0; i < items_per_word; i += 8) {
      std::uint64_t eight = 0;
      std::memcpy(&eight, flags + i, sizeof eight);
      word |= (eight * 0x0102040810204080u >> 56) << i;  // gathers the lowest bit of each byte in the top byte
    }
  } else {
    for (int i = 0; i < items_per_word; ++i) word |= std::uint64_t{flags[i]} << i;
  }
  return word;
}

template <class Key>
compared_word compare_word(const Key* items, Key key) {
  std::uint8_t above[items_per_word];
  std::uint8_t equal[items_per_word];
  for (int i = 0; i < items_per_word; ++i) {
    above[i] = items[i] > key ? 1 : 0;
    equal[i] = items[i] == key ? 1 : 0;
  }
  return {pack_flags(above), pack_flags(equal)};
}

#endif

/// Sets the bits of `kept` that the threshold keeps among the `allowed` items. `items` is padded to whole words.
template <class Key>
void mark(const Key* items, std::int32_t word_count, threshold<Key> least, const std::uint64_t* allowed,
          std::uint64_t* kept) {
  std::uint64_t ties = least.ties;
  for (std::int32_t w = 0; w < word_count; ++w) {
    const compared_word word = compare_word(items + std::ptrdiff_t{w} * items_per_word, least.key);
    std::uint64_t equal = word.equal & allowed[w];
    if (equal != 0) {
      equal = lowest_bits(equal, ties);
      ties -= static_cast<std::uint64_t>(std::popcount(equal));
    }
    kept[w] |= (word.above & allowed[w]) | equal;
  }
}

// ---- unpacking ----------------------------------------------------------------------------------------------

/// Writes those of items [begin, end) whose coarse key lies in [low, high] to `found`, in order; returns how many.
/// Writes up to 16 entries at a time, but never past found + (end - begin).
template <class Key>
std::int32_t collect(const Key* items, std::int32_t begin, std::int32_t end, std::uint32_t low, std::uint32_t high,
                     Key* found) {
  std::int32_t count = 0;
  std::int32_t i = begin;
#if SPECATTN_SELECT_AVX512
  if constexpr (sizeof(Key) == 4) {
    const __m512i lowest = _mm512_set1_epi32(static_cast<int>(low));
    const __m512i width = _mm512_set1_epi32(static_cast<int>(high - low));
    for (; i + 16 <= end; i += 16) {
      const __m512i sixteen = _mm512_loadu_si512(items + i);
      const __mmask16 inside = _mm512_cmple_epu32_mask(_mm512_sub_epi32(sixteen, lowest), width);
      _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(inside, sixteen));
      count += std::popcount(static_cast<unsigned>(inside));
    }
  }
#endif
  for (; i < end; ++i) {
    found[count] = items[i];
    count += coarse_key(items[i]) - low <= high - low ? 1 : 0;
  }
  return count;
}

/// Writes the numbers of the set bits, ascending, to the `count` entries of `list`: exactly as many bits are set.
inline void unpack(const std::uint64_t* words, std::int32_t count, std::int32_t* list) {
  std::int32_t written = 0;
  std::int32_t w = 0;
#if SPECATTN_SELECT_AVX512
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; written + items_per_word <= count; ++w) {  // a whole word fits, whatever it holds: no store needs a mask
    std::uint64_t bits = words[w];
    for (int quarter = 0; quarter < 4; ++quarter, bits >>= 16) {
      const __m512i numbers = _mm512_add_epi32(first, _mm512_set1_epi32(w * items_per_word + 16 * quarter));
      const auto some = static_cast<__mmask16>(bits);
      _mm512_storeu_si512(list + written, _mm512_maskz_compress_epi32(some, numbers));
      written += std::popcount(static_cast<unsigned>(some));
    }
  }
#endif
  for (; written < count; ++w) {
    for (std::uint64_t bits = words[w]; bits != 0; bits &= bits - 1)
      list[written++] = w * items_per_word + std::countr_zero(bits);
  }
}

}  // namespace specattn::inline SPECATTN_CODE::detail

#undef SPECATTN_SELECT_AVX512
