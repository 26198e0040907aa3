// The block formats of GGUF's tensors: what 32 or 256 weights that share a scale are in memory, and their values.
// Layouts and arithmetic: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h and gguf-py/gguf/quants.py in
// https://github.com/ggml-org/llama.cpp. Every product here is exact or rounded once, so that a fused multiply-add
// changes no bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "specattn/scalar.hpp"

namespace mini_llm::gguf_blocks {

inline constexpr int small_block = 32;  // elements
inline constexpr int large_block = 256;

inline std::uint8_t byte_at(const std::byte* from, int at) { return std::to_integer<std::uint8_t>(from[at]); }

inline std::int8_t signed_at(const std::byte* from, int at) { return static_cast<std::int8_t>(byte_at(from, at)); }

/// A number of 16 bits, which may lie at an odd address.
template <class T>
float number_at(const std::byte* from) {
  T number;
  std::memcpy(&number, from, sizeof number);
  return specattn::to_float(number);
}

inline float half_at(const std::byte* from) { return number_at<specattn::fp16>(from); }

// Each reads one block (or one element) and writes its values.

inline void read_f32(const std::byte* from, float* out) { std::memcpy(out, from, sizeof *out); }

inline void read_f16(const std::byte* from, float* out) { *out = half_at(from); }

inline void read_bf16(const std::byte* from, float* out) { *out = number_at<specattn::bf16>(from); }

/// scale (f16), 32 signed bytes
inline void read_q8_0(const std::byte* from, float* out) {
  const float scale = half_at(from);
  for (int i = 0; i < small_block; ++i) out[i] = scale * static_cast<float>(signed_at(from, 2 + i));
}

/// 16 bytes: element i in the low half of byte i, element i + 16 in the high half.
inline void split_halves(const std::byte* from, std::uint8_t* out) {
  for (int i = 0; i < small_block / 2; ++i) {
    out[i] = byte_at(from, i) & 15U;
    out[i + small_block / 2] = byte_at(from, i) >> 4;
  }
}

/// The same with the fifth bits in front, 32 of them in 4 bytes.
inline void split_fives(const std::byte* from, std::uint8_t* out) {
  std::uint32_t high;
  std::memcpy(&high, from, sizeof high);
  split_halves(from + sizeof high, out);
  for (int i = 0; i < small_block; ++i) out[i] = static_cast<std::uint8_t>(out[i] | ((high >> i & 1U) << 4));
}

/// scale (f16), 32 numbers of 4 bits; 8 stands for zero
inline void read_q4_0(const std::byte* from, float* out) {
  std::uint8_t q[small_block];
  split_halves(from + 2, q);
  const float scale = half_at(from);
  for (int i = 0; i < small_block; ++i) out[i] = scale * static_cast<float>(q[i] - 8);
}

/// scale (f16), least value (f16), 32 numbers of 4 bits
inline void read_q4_1(const std::byte* from, float* out) {
  std::uint8_t q[small_block];
  split_halves(from + 4, q);
  const float scale = half_at(from);
  const float least = half_at(from + 2);
  for (int i = 0; i < small_block; ++i) out[i] = scale * static_cast<float>(q[i]) + least;
}

/// scale (f16), 32 numbers of 5 bits; 16 stands for zero
inline void read_q5_0(const std::byte* from, float* out) {
  std::uint8_t q[small_block];
  split_fives(from + 2, q);
  const float scale = half_at(from);
  for (int i = 0; i < small_block; ++i) out[i] = scale * static_cast<float>(q[i] - 16);
}

/// scale (f16), least value (f16), 32 numbers of 5 bits
inline void read_q5_1(const std::byte* from, float* out) {
  std::uint8_t q[small_block];
  split_fives(from + 4, q);
  const float scale = half_at(from);
  const float least = half_at(from + 2);
  for (int i = 0; i < small_block; ++i) out[i] = scale * static_cast<float>(q[i]) + least;
}

/// Scale and offset of each 32 elements of a block of 256: two f16 factors for all, and eight pairs of 6 bits in 12 bytes.
/// Bytes 0 to 3 begin with the scales of the first four, bytes 4 to 7 with their offsets; bytes 8 to 11 have the low
/// halves of the other four pairs, whose upper two bits are those left over in bytes 0 to 7.
struct sub_scales {
  float scale[8];
  float offset[8];

  explicit sub_scales(const std::byte* from) {
    const float of_scales = half_at(from);
    const float of_offsets = half_at(from + 2);
    const std::byte* const packed = from + 4;
    for (int i = 0; i < 4; ++i) {
      const int a = byte_at(packed, i);
      const int b = byte_at(packed, i + 4);
      const int c = byte_at(packed, i + 8);
      scale[i] = of_scales * static_cast<float>(a & 63);
      offset[i] = of_offsets * static_cast<float>(b & 63);
      scale[i + 4] = of_scales * static_cast<float>((c & 15) | (a >> 6 << 4));
      offset[i + 4] = of_offsets * static_cast<float>((c >> 4) | (b >> 6 << 4));
    }
  }
};

/// sub_scales, 256 numbers of 4 bits: of each 64 the first 32 in the low halves of 32 bytes
inline void read_q4_k(const std::byte* from, float* out) {
  const sub_scales sub(from);
  const std::byte* const low = from + 16;
  for (int part = 0; part < 8; ++part) {
    for (int i = 0; i < 32; ++i) {
      const int q = byte_at(low, part / 2 * 32 + i) >> part % 2 * 4 & 15;
      out[part * 32 + i] = sub.scale[part] * static_cast<float>(q) - sub.offset[part];
    }
  }
}

/// sub_scales, 32 bytes of fifth bits (bit p of byte i: element i of part p), 256 numbers of 4 bits as in Q4_K
inline void read_q5_k(const std::byte* from, float* out) {
  const sub_scales sub(from);
  const std::byte* const high = from + 16;
  const std::byte* const low = from + 48;
  for (int part = 0; part < 8; ++part) {
    for (int i = 0; i < 32; ++i) {
      const int q = (byte_at(low, part / 2 * 32 + i) >> part % 2 * 4 & 15) | ((byte_at(high, i) >> part & 1) << 4);
      out[part * 32 + i] = sub.scale[part] * static_cast<float>(q) - sub.offset[part];
    }
  }
}

/// 128 bytes of low halves, 64 of upper two bits, 16 signed scales of 16 elements each, scale of those (f16); 32 stands
/// for zero. Either half of the block has 64 bytes of low halves (elements 0 to 63 low, 64 to 127 high) and 32 bytes of
/// upper bits, two for each 32 elements.
inline void read_q6_k(const std::byte* from, float* out) {
  const std::byte* const scales = from + 192;
  const float of_scales = half_at(from + 208);
  for (int group = 0; group < 16; ++group) {
    const float scale = of_scales * static_cast<float>(signed_at(scales, group));
    const int half = group / 8;
    const int part = group % 8 / 2;  // 32 elements of the half
    for (int j = 0; j < 16; ++j) {
      const int i = group % 2 * 16 + j;  // in the part
      const int low = byte_at(from, half * 64 + part % 2 * 32 + i) >> part / 2 * 4 & 15;
      const int high = byte_at(from + 128, half * 32 + i) >> part * 2 & 3;
      out[group * 16 + j] = scale * static_cast<float>((low | (high << 4)) - 32);
    }
  }
}

template <void (*read)(const std::byte*, float*)>
void read_each(const std::byte* from, std::size_t block_bytes, std::size_t block_elements, std::size_t blocks,
               float* out) {
  for (std::size_t b = 0; b < blocks; ++b) read(from + b * block_bytes, out + b * block_elements);
}

/// Values of `blocks` adjacent blocks.
using read_function = void (*)(const std::byte* from, std::size_t block_bytes, std::size_t block_elements,
                               std::size_t blocks, float* out);

/// How blocks of a type are read, by the format's number; nullptr for a type that is not.
inline read_function reader_of(std::uint32_t type) {
  switch (type) {
    case 0:
      return read_each<read_f32>;
    case 1:
      return read_each<read_f16>;
    case 2:
      return read_each<read_q4_0>;
    case 3:
      return read_each<read_q4_1>;
    case 6:
      return read_each<read_q5_0>;
    case 7:
      return read_each<read_q5_1>;
    case 8:
      return read_each<read_q8_0>;
    case 12:
      return read_each<read_q4_k>;
    case 13:
      return read_each<read_q5_k>;
    case 14:
      return read_each<read_q6_k>;
    case 30:
      return read_each<read_bf16>;
    default:
      return nullptr;
  }
}

}  // namespace mini_llm::gguf_blocks
