// What kv_cache needs done in host memory: writing converted rows, and compaction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../kv_cache.hpp"
#include "context.hpp"
#include "lanes.hpp"

namespace specattn::inline v0_1::detail {

/// `count` floats, `stride` apart, into adjacent elements of storage.
template <storage T>
void convert_row(const float* from, std::ptrdiff_t stride, T* to, std::int32_t count) {
  std::int32_t d = 0;
  if (stride == 1) {
    for (; d + lanes::width <= count; d += lanes::width) lanes::load(from + d).store(to + d);
  }
  for (; d < count; ++d) to[d] = from_float<T>(from[d * stride]);
}

template <>
struct kv_cache_impl<cpu> {
  template <storage T>
  static void write(context<cpu>& ctx, const kv_view<T, cpu>& layer, std::int32_t row, std::int32_t first,
                    view<const float, 3, cpu> k, view<const float, 3, cpu> v) {
    const auto one = [&](std::ptrdiff_t i, int) {
      for (std::int32_t head = 0; head < layer.kv_heads; ++head) {
        const std::ptrdiff_t to = layer.offset(row, first + static_cast<std::int32_t>(i), head);
        convert_row(&k(i, head, 0), k.stride(2), layer.keys + to, layer.head_dim);
        convert_row(&v(i, head, 0), v.stride(2), layer.values + to, layer.head_dim);
      }
    };
    constexpr std::ptrdiff_t worth_a_team = 1 << 16;  // elements: below, waking the others costs more
    if (k.size() >= worth_a_team) {
      ctx.parallel_for(k.extent(0), one);
    } else {
      for (std::ptrdiff_t i = 0; i < k.extent(0); ++i) one(i, 0);
    }
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
};

}  // namespace specattn::inline v0_1::detail
