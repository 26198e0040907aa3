// Keys and values of earlier positions as kernels see them: one layout for contiguous and paged caches.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend.hpp"
#include "scalar.hpp"
#include "view.hpp"

namespace specattn::inline SPECATTN_CODE {

/// One layer's keys and values, non-owning. Position i of cache row s, kv head h is head_dim adjacent elements at
///   keys + block_table(s, i >> page_shift) * page_stride + (i & (page_size - 1)) * position_stride + h * head_stride
/// and the same for values. A contiguous cache is one page a sequence: page_shift 31, block_table(s, 0) = s.
template <storage T, backend B = cpu>
struct kv_view {
  T* keys = nullptr;
  T* values = nullptr;
  std::ptrdiff_t page_stride = 0;
  std::ptrdiff_t position_stride = 0;
  std::ptrdiff_t head_stride = 0;
  std::int32_t page_shift = 31;                ///< log2 of the page size; 31: one page holds everything
  view<const std::int32_t, 2, B> block_table;  ///< [cache rows, pages a sequence]
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;
  view<const float, 1, B>
      key_scales;  ///< [kv_heads] of fp8_e4m3: what a head's stored keys are multiples of; empty: 1
  view<const float, 1, B> value_scales;  ///< the same of its values

  SPECATTN_HD std::ptrdiff_t offset(std::int32_t row, std::int32_t position, std::int32_t kv_head) const {
    const std::int32_t page = page_shift >= 31 ? 0 : position >> page_shift;
    const std::int32_t inside = page_shift >= 31 ? position : position & ((1 << page_shift) - 1);
    return block_table(row, page) * page_stride + inside * position_stride + kv_head * head_stride;
  }
  SPECATTN_HD T* key(std::int32_t row, std::int32_t position, std::int32_t kv_head) const {
    return keys + offset(row, position, kv_head);
  }
  SPECATTN_HD T* value(std::int32_t row, std::int32_t position, std::int32_t kv_head) const {
    return values + offset(row, position, kv_head);
  }
  SPECATTN_HD float key_scale(std::int32_t kv_head) const { return scale(key_scales, kv_head); }
  SPECATTN_HD float value_scale(std::int32_t kv_head) const { return scale(value_scales, kv_head); }

 private:
  SPECATTN_HD static float scale(const view<const float, 1, B>& scales, std::int32_t kv_head) {
    if constexpr (scaled_storage<T>) return scales.empty() ? 1.0f : scales[kv_head];
    return 1.0f;
  }
};

namespace detail {
/// A number as a cache holds it, `inverse_scale` being 1 / its head's scale.
template <storage T>
SPECATTN_HD T stored(float x, float inverse_scale) {
  if constexpr (scaled_storage<T>) x *= inverse_scale;
  return from_float<T>(x);
}
}  // namespace detail

/// Which slots of a pass belong to which sequence. A sequence may have no slots; it is then left alone.
template <backend B = cpu>
struct pass_layout {
  view<const std::int32_t, 1, B> slot_offsets;  ///< [sequences + 1]
  view<const std::int32_t, 1, B> kv_lens;       ///< [sequences] prefix lengths
  view<const std::int32_t, 1, B> cache_rows;    ///< [sequences]
  SPECATTN_HD std::int32_t sequences() const { return static_cast<std::int32_t>(kv_lens.extent(0)); }
};

}  // namespace specattn::inline SPECATTN_CODE
