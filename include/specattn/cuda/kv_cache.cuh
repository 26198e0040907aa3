// What kv_cache needs done in device memory. Host numbers (block table, kept lists) travel as kernel arguments: a launch
// copies them, so nothing waits, nothing on the host must stay alive, and a graph captures them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../kv_cache.hpp"
#include "context.cuh"
#include "device/launch.cuh"
#include "device/overlap.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr int kv_threads = 256;

// ---- write --------------------------------------------------------------------------------------------------

template <storage T>
struct kv_write {
  kv_view<T, cuda> layer;
  view<const float, 3, cuda> k, v;  // [slots, kv_heads, head_dim]
  pass_layout<cuda> layout{};       // empty: all slots go to `row`, from `first` on
  std::int32_t row = 0;
  std::int32_t first = 0;
  bool wide = false;  // four elements at a time
};

/// Where a slot goes. row < 0: the slot is of no sequence.
struct kv_place {
  std::int32_t row, position;
};

/// Whole warps call: a lane reads all about a sequence at once, so that nothing waits for whose the slot is.
__device__ inline kv_place place_behind(const pass_layout<cuda>& layout, std::ptrdiff_t slot) {
  kv_place mine{-1, 0};
  for (std::int32_t s = static_cast<std::int32_t>(threadIdx.x) % 32; s < layout.sequences(); s += 32) {
    const std::ptrdiff_t begin = layout.slot_offsets[s], end = layout.slot_offsets[s + 1];
    const kv_place at{layout.cache_rows[s], layout.kv_lens[s] + static_cast<std::int32_t>(slot - begin)};
    if (begin <= slot && slot < end) mine = at;
  }
  const int owner = __ffs(static_cast<int>(__ballot_sync(~0u, mine.row >= 0))) - 1;
  return {__shfl_sync(~0u, mine.row, owner),
          __shfl_sync(~0u, mine.position, owner)};  // owner -1: of lane 31, {-1, 0}
}

/// A warp takes one head of one slot; blockIdx.y says whether its key or its value.
template <storage T>
__global__ void __launch_bounds__(kv_threads) kv_write_kernel(const __grid_constant__ kv_write<T> args) {
  struct alignas(4 * sizeof(T)) four {
    T part[4];
  };
  wait_for_previous_kernel();
  launch_dependents();
  const kv_view<T, cuda>& layer = args.layer;
  const std::ptrdiff_t item = std::ptrdiff_t{blockIdx.x} * (kv_threads / 32) + threadIdx.x / 32;
  const std::ptrdiff_t slot = item / layer.kv_heads;
  const auto head = static_cast<std::int32_t>(item % layer.kv_heads);
  const view<const float, 3, cuda>& from = blockIdx.y == 0 ? args.k : args.v;
  if (slot >= from.extent(0)) return;
  kv_place at{args.row, args.first + static_cast<std::int32_t>(slot)};
  if (!args.layout.slot_offsets.empty()) at = place_behind(args.layout, slot);
  if (at.row < 0) return;
  T* to = (blockIdx.y == 0 ? layer.keys : layer.values) + layer.offset(at.row, at.position, head);
  const float* in = &from(slot, head, 0);
  const float inverse_scale = 1.0f / (blockIdx.y == 0 ? layer.key_scale(head) : layer.value_scale(head));
  const auto lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  if (args.wide) {
    for (std::int32_t d = lane * 4; d < layer.head_dim; d += 128) {
      const float4 x = *reinterpret_cast<const float4*>(in + d);
      *reinterpret_cast<four*>(to + d) = {stored<T>(x.x, inverse_scale), stored<T>(x.y, inverse_scale),
                                          stored<T>(x.z, inverse_scale), stored<T>(x.w, inverse_scale)};
    }
  } else {
    for (std::int32_t d = lane; d < layer.head_dim; d += 32) to[d] = stored<T>(in[d * from.stride(2)], inverse_scale);
  }
}

// ---- write rotated ------------------------------------------------------------------------------------------

inline constexpr int kv_rotate_threads = 128;  ///< few: CTAs of the attention that follows are placed beside them

template <storage T>
struct kv_write_rotated {
  kv_view<T, cuda> layer;
  pass_layout<cuda> layout;
  view<float, 3, cuda> q;           // [slots, q_heads, head_dim], rotated in place
  view<const float, 3, cuda> k, v;  // [slots, kv_heads, head_dim]
  rotary_view<cuda> rotary;
  view<float, 3, cuda> kept_q;  // [slots or more, q_heads, head_dim]; empty: nowhere else
};

/// blockIdx.x is the slot; a warp takes one head of it: the queries' heads, then the keys', then the values'. What it
/// reads is under way before anything is made of it.
template <storage T>
__global__ void __launch_bounds__(kv_rotate_threads)
    kv_write_rotated_kernel(const __grid_constant__ kv_write_rotated<T> args) {
  constexpr int batch = 4;  // pairs a lane has under way
  const kv_view<T, cuda>& layer = args.layer;
  const auto q_heads = static_cast<std::int32_t>(args.q.extent(1)), half = layer.head_dim / 2;
  const auto lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  const std::ptrdiff_t slot = blockIdx.x;
  std::int32_t head =
      static_cast<std::int32_t>(blockIdx.y) * (kv_rotate_threads / 32) + static_cast<std::int32_t>(threadIdx.x) / 32;
  const bool is_query = head < q_heads, is_value = head >= q_heads + layer.kv_heads;
  if (!is_query) head -= is_value ? q_heads + layer.kv_heads : q_heads;
  wait_for_previous_kernel();
  launch_dependents();
  if (head >= (is_query ? q_heads : layer.kv_heads)) return;
  const float* const from = is_query   ? &args.q(slot, head, 0)
                            : is_value ? &args.v(slot, head, 0)
                                       : &args.k(slot, head, 0);
  const std::ptrdiff_t stride = is_query ? args.q.stride(2) : is_value ? args.v.stride(2) : args.k.stride(2);
  const std::int32_t position = is_value ? 0 : args.rotary.positions[slot];
  float first[batch], second[batch], frequency[batch];
  const auto each = [&](std::int32_t begin, auto&& act) {
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (begin + 32 * i < half) act(begin + 32 * i, i);
    }
  };
  kv_place at{0, 0};
  for (std::int32_t base = 0; base < half; base += 32 * batch) {
    const std::int32_t begin = base + lane;
    each(begin, [&](std::int32_t d, int i) {
      first[i] = from[d * stride];
      second[i] = from[(half + d) * stride];
      if (!is_value) frequency[i] = args.rotary.inverse_frequencies[d];
    });
    if (!is_query && base == 0) at = place_behind(args.layout, slot);
    if (at.row < 0) return;
    each(begin, [&](std::int32_t, int i) {
      if (!is_value) rotate(rotation_at(position, frequency[i]), first[i], second[i]);
    });
    if (is_query) {
      each(begin, [&](std::int32_t d, int i) {
        args.q(slot, head, d) = first[i];
        args.q(slot, head, half + d) = second[i];
        if (args.kept_q.empty()) return;
        args.kept_q(slot, head, d) = first[i];
        args.kept_q(slot, head, half + d) = second[i];
      });
      continue;
    }
    T* const to = (is_value ? layer.values : layer.keys) + layer.offset(at.row, at.position, head);
    const float inverse_scale = 1.0f / (is_value ? layer.value_scale(head) : layer.key_scale(head));
    each(begin, [&](std::int32_t d, int i) {
      to[d] = stored<T>(first[i], inverse_scale);
      to[half + d] = stored<T>(second[i], inverse_scale);
    });
  }
}

// ---- block table --------------------------------------------------------------------------------------------

struct table_entries {
  static constexpr std::ptrdiff_t capacity = 1000;  // 4 KB of arguments: what every driver takes
  std::int32_t* to;
  std::int32_t count;
  std::int32_t entry[capacity];
};

static __global__ void kv_publish_kernel(const __grid_constant__ table_entries entries) {
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < entries.count; i += kv_threads)
    entries.to[i] = entries.entry[i];
}

// ---- compact ------------------------------------------------------------------------------------------------

/// The kept positions number first … first + count - 1 of some lists.
template <storage T>
struct kv_compaction {
  static constexpr std::ptrdiff_t capacity = 8000;  // 32 KB of arguments: what CUDA 12.1 and later take
  kv_view<T, cuda> first_layer;
  std::ptrdiff_t layer_stride = 0;
  std::int32_t row = 0;
  std::int32_t first_list = 0;   // layer * kv_heads + head, of block 0
  std::int32_t list_stride = 0;  // 0: one list for all
  std::int32_t first = 0, count = 0;
  std::int32_t position[capacity] = {};
};

/// One CTA a list for the keys, one for the values. They read some rows into registers, then write them: a row never
/// moves up, so what is written lies before everything that is still to be read.
template <class Unit, storage T>
__global__ void __launch_bounds__(kv_threads) kv_compact_kernel(const __grid_constant__ kv_compaction<T> args) {
  constexpr int ahead = 8;  // loads in flight
  const std::int32_t list = args.first_list + static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t head = list % args.first_layer.kv_heads;
  T* const base = (blockIdx.y == 0 ? args.first_layer.keys : args.first_layer.values) +
                  list / args.first_layer.kv_heads * args.layer_stride;
  const std::int32_t* const positions = args.position + blockIdx.x * args.list_stride;
  const auto row_units = static_cast<std::int32_t>(args.first_layer.head_dim * sizeof(T) / sizeof(Unit));
  const std::int64_t units = std::int64_t{args.count} * row_units;
  const auto place = [&](std::int32_t position, std::int64_t unit) {
    return reinterpret_cast<Unit*>(base + args.first_layer.offset(args.row, position, head)) + unit % row_units;
  };
  for (std::int64_t begin = threadIdx.x; begin - threadIdx.x < units; begin += ahead * kv_threads) {
    Unit moved[ahead];
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const std::int64_t unit = begin + j * kv_threads;
      if (unit < units) moved[j] = *place(positions[unit / row_units], unit);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const std::int64_t unit = begin + j * kv_threads;
      if (unit < units) *place(args.first + static_cast<std::int32_t>(unit / row_units), unit) = moved[j];
    }
  }
}

template <>
struct kv_cache_impl<cuda> {
  template <storage T>
  static void write(context<cuda>& ctx, const kv_view<T, cuda>& layer, std::int32_t row, std::int32_t first,
                    view<const float, 3, cuda> k, view<const float, 3, cuda> v) {
    start(ctx, kv_write<T>{.layer = layer, .k = k, .v = v, .row = row, .first = first});
  }
  template <storage T>
  static void write(context<cuda>& ctx, const kv_view<T, cuda>& layer, const pass_layout<cuda>& layout,
                    view<const float, 3, cuda> k, view<const float, 3, cuda> v) {
    start(ctx, kv_write<T>{.layer = layer, .k = k, .v = v, .layout = layout});
  }

  template <storage T>
  static void write_rotated(context<cuda>& ctx, const kv_view<T, cuda>& layer, const pass_layout<cuda>& layout,
                            view<float, 3, cuda> q, view<const float, 3, cuda> k, view<const float, 3, cuda> v,
                            const rotary_view<cuda>& rotary, view<float, 3, cuda> kept_q) {
    if (q.extent(0) == 0) return;
    const std::ptrdiff_t heads = q.extent(1) + 2 * layer.kv_heads;
    const dim3 grid(static_cast<unsigned>(q.extent(0)), blocks_of(heads, kv_rotate_threads / 32));
    start_kernel_early(ctx, kv_write_rotated_kernel<T>, grid, kv_rotate_threads,
                       kv_write_rotated<T>{layer, layout, q, k, v, rotary, kept_q}, "kv_cache");
  }

  static void publish(context<cuda>& ctx, const std::int32_t* entries, std::ptrdiff_t count, std::int32_t* table) {
    for (std::ptrdiff_t done = 0; done < count; done += table_entries::capacity) {
      table_entries part;
      part.to = table + done;
      part.count = static_cast<std::int32_t>((std::min)(count - done, table_entries::capacity));
      std::copy_n(entries + done, part.count, part.entry);
      start_kernel(ctx, kv_publish_kernel, dim3(1), kv_threads, part, "kv_cache");
    }
  }

  template <storage T>
  static void compact(context<cuda>& ctx, const kv_view<T, cuda>& first_layer, std::ptrdiff_t layer_stride,
                      std::int32_t layers, std::int32_t row, view<const std::int32_t, 2, cpu> positions) {
    const bool shared = positions.stride(0) == 0;
    const std::ptrdiff_t lists = std::ptrdiff_t{layers} * first_layer.kv_heads, kept = positions.extent(1);
    const auto capacity = kv_compaction<T>::capacity;
    const std::ptrdiff_t lists_a_launch = shared ? lists : (std::min)(lists, capacity);
    const std::ptrdiff_t share = shared ? capacity : capacity / lists_a_launch;
    kv_compaction<T> part{.first_layer = first_layer, .layer_stride = layer_stride, .row = row};
    for (std::ptrdiff_t list = 0; list < lists; list += lists_a_launch) {
      const std::ptrdiff_t here = (std::min)(lists_a_launch, lists - list);
      for (std::ptrdiff_t first = 0; first < kept; first += share) {
        part.first_list = static_cast<std::int32_t>(list);
        part.first = static_cast<std::int32_t>(first);
        part.count = static_cast<std::int32_t>((std::min)(share, kept - first));
        part.list_stride = shared ? 0 : part.count;
        for (std::ptrdiff_t i = 0; i < (shared ? 1 : here); ++i) {
          for (std::int32_t j = 0; j < part.count; ++j)
            part.position[i * part.list_stride + j] = positions(list + i, first + j);
        }
        const dim3 grid(static_cast<unsigned>(here), 2);
        if (first_layer.head_dim * sizeof(T) % sizeof(uint4) == 0) {
          start_kernel(ctx, kv_compact_kernel<uint4, T>, grid, kv_threads, part, "kv_cache");
        } else {
          start_kernel(ctx, kv_compact_kernel<T, T>, grid, kv_threads, part, "kv_cache");
        }
      }
    }
  }

 private:
  template <storage T>
  static void start(context<cuda>& ctx, kv_write<T> args) {
    const std::ptrdiff_t items = args.k.extent(0) * args.layer.kv_heads;
    if (items == 0) return;
    args.wide = fours(args.k) && fours(args.v);
    start_kernel_early(ctx, kv_write_kernel<T>, dim3(blocks_of(items, kv_threads / 32), 2), kv_threads, args,
                       "kv_cache");
  }

  /// Whether every row can be read four floats at a time. (The cache's own rows then can be written so.)
  static bool fours(const view<const float, 3, cuda>& rows) {
    return rows.stride(2) == 1 && (rows.extent(2) | rows.stride(0) | rows.stride(1)) % 4 == 0 &&
           reinterpret_cast<std::uintptr_t>(rows.data()) % sizeof(float4) == 0;
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail
