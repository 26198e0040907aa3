// What kv_cache needs done in host memory: rotating rows, writing them converted, and compaction.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../kv_cache.hpp"
#include "context.hpp"
#include "lanes.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// `count` floats, `stride` apart, into adjacent elements of a head whose scale is 1 / inverse_scale.
template <storage T>
void convert_row(const float* from, std::ptrdiff_t stride, float inverse_scale, T* to, std::int32_t count) {
  std::int32_t d = 0;
  if constexpr (!scaled_storage<T>) {
    for (; stride == 1 && d + lanes::width <= count; d += lanes::width) lanes::load(from + d).store(to + d);
  }
  for (; d < count; ++d) to[d] = stored<T>(from[d * stride], inverse_scale);
}

/// The angles of some adjacent pairs of elements of one slot.
struct slot_rotation {
  static constexpr std::int32_t most = 64;
  float cosines[most], sines[most];
  std::int32_t count;

  slot_rotation(const rotary_view<cpu>& rotary, std::ptrdiff_t slot, std::int32_t first, std::int32_t half)
      : count((std::min)(half - first, most)) {
    for (std::int32_t d = 0; d < count; ++d) {
      const rotation by = rotation_at(rotary.positions[slot], rotary.inverse_frequencies[first + d]);
      cosines[d] = by.cosine;
      sines[d] = by.sine;
    }
  }

  /// `first` and `second` [count] = the pairs of `low` and `high`, whose elements are `stride` apart, rotated.
  void apply(const float* low, const float* high, std::ptrdiff_t stride, float* first, float* second) const {
    for (std::int32_t d = 0; d < count; ++d) {
      first[d] = low[d * stride];
      second[d] = high[d * stride];
      rotate({cosines[d], sines[d]}, first[d], second[d]);
    }
  }
};

template <>
struct kv_cache_impl<cpu> {
  template <storage T>
  static void write(context<cpu>& ctx, const kv_view<T, cpu>& layer, std::int32_t row, std::int32_t first,
                    view<const float, 3, cpu> k, view<const float, 3, cpu> v) {
    for_slots(ctx, k, [&](std::ptrdiff_t i) {
      for (std::int32_t head = 0; head < layer.kv_heads; ++head) {
        const std::ptrdiff_t to = layer.offset(row, first + static_cast<std::int32_t>(i), head);
        convert_row(&k(i, head, 0), k.stride(2), 1.0f / layer.key_scale(head), layer.keys + to, layer.head_dim);
        convert_row(&v(i, head, 0), v.stride(2), 1.0f / layer.value_scale(head), layer.values + to, layer.head_dim);
      }
    });
  }

  template <storage T>
  static void write_rotated(context<cpu>& ctx, const kv_view<T, cpu>& layer, std::int32_t row, std::int32_t first,
                            view<const float, 3, cpu> k, view<const float, 3, cpu> v,
                            const rotary_view<cpu>& rotary) {
    for_slots(ctx, k, [&](std::ptrdiff_t i) {
      const auto place = [&](std::int32_t head) {
        return layer.offset(row, first + static_cast<std::int32_t>(i), head);
      };
      for (std::int32_t head = 0; head < layer.kv_heads; ++head)
        convert_row(&v(i, head, 0), v.stride(2), 1.0f / layer.value_scale(head), layer.values + place(head),
                    layer.head_dim);
      const std::int32_t half = layer.head_dim / 2;
      for (std::int32_t d = 0; d < half; d += slot_rotation::most) {
        const slot_rotation by(rotary, i, d, half);
        for (std::int32_t head = 0; head < layer.kv_heads; ++head) {
          float low[slot_rotation::most], high[slot_rotation::most];
          by.apply(&k(i, head, d), &k(i, head, half + d), k.stride(2), low, high);
          convert_row(low, 1, 1.0f / layer.key_scale(head), layer.keys + place(head) + d, by.count);
          convert_row(high, 1, 1.0f / layer.key_scale(head), layer.keys + place(head) + half + d, by.count);
        }
      }
    });
  }

  static void rotate(context<cpu>& ctx, view<float, 3, cpu> q, const rotary_view<cpu>& rotary,
                     view<float, 3, cpu> kept_q) {
    for_slots(ctx, q, [&](std::ptrdiff_t i) {
      const auto half = static_cast<std::int32_t>(q.extent(2) / 2);
      for (std::int32_t d = 0; d < half; d += slot_rotation::most) {
        const slot_rotation by(rotary, i, d, half);
        for (std::ptrdiff_t head = 0; head < q.extent(1); ++head) {
          float low[slot_rotation::most], high[slot_rotation::most];
          by.apply(&q(i, head, d), &q(i, head, half + d), q.stride(2), low, high);
          for (std::int32_t j = 0; j < by.count; ++j) {
            q(i, head, d + j) = low[j];
            q(i, head, half + d + j) = high[j];
            if (kept_q.empty()) continue;
            kept_q(i, head, d + j) = low[j];
            kept_q(i, head, half + d + j) = high[j];
          }
        }
      }
    });
  }

  /// Positions ascend, so each row moves forward over rows that have moved already.
  template <storage T>
  static void compact(context<cpu>& ctx, const kv_view<T, cpu>& first_layer, std::ptrdiff_t layer_stride,
                      std::int32_t layers, std::int32_t row, view<const std::int32_t, 2, cpu> positions) {
    const std::size_t row_bytes = static_cast<std::size_t>(first_layer.head_dim) * sizeof(T);
    ctx.parallel_for(std::ptrdiff_t{layers} * first_layer.kv_heads, [&](std::ptrdiff_t list, int) {
      const std::int32_t head = static_cast<std::int32_t>(list % first_layer.kv_heads);
      const std::ptrdiff_t base = list / first_layer.kv_heads * layer_stride;
      for (std::int32_t i = 0; i < static_cast<std::int32_t>(positions.extent(1)); ++i) {
        if (positions(list, i) == i) continue;
        const std::ptrdiff_t from = base + first_layer.offset(row, positions(list, i), head);
        const std::ptrdiff_t to = base + first_layer.offset(row, i, head);
        std::memcpy(first_layer.keys + to, first_layer.keys + from, row_bytes);
        std::memcpy(first_layer.values + to, first_layer.values + from, row_bytes);
      }
    });
  }

 private:
  /// one(slot) for all slots of `rows`, by the team where they are many.
  template <class T, class One>
  static void for_slots(context<cpu>& ctx, const view<T, 3, cpu>& rows, One one) {
    constexpr std::ptrdiff_t worth_a_team = 1 << 16;  // elements: below, waking the others costs more
    if (rows.size() >= worth_a_team) {
      ctx.parallel_for(rows.extent(0), [&](std::ptrdiff_t i, int) { one(i); });
    } else {
      for (std::ptrdiff_t i = 0; i < rows.extent(0); ++i) one(i);
    }
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail
