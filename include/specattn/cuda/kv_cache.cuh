// What kv_cache needs done in device memory. Host numbers (block table, kept lists) travel as kernel arguments: a launch
// copies them, so nothing waits, nothing on the host must stay alive, and a graph captures them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../kv_cache.hpp"
#include "context.cuh"
#include "mma.cuh"
#include "slots.cuh"

namespace specattn::inline v0_1::detail {

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

__device__ inline kv_place place_behind(const pass_layout<cuda>& layout, std::ptrdiff_t slot) {
  const std::int32_t s = sequence_of(layout.slot_offsets, slot);
  if (s == layout.sequences()) return {-1, 0};
  return {layout.cache_rows[s], layout.kv_lens[s] + static_cast<std::int32_t>(slot - layout.slot_offsets[s])};
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

template <storage T>
struct kv_write_rotated {
  kv_view<T, cuda> layer;
  pass_layout<cuda> layout;
  view<float, 3, cuda> q;           // [slots, q_heads, head_dim], rotated in place
  view<const float, 3, cuda> k, v;  // [slots, kv_heads, head_dim]
  rotary_view<cuda> rotary;
};

/// blockIdx.x is the slot; a warp takes one head of it: the queries' heads, then the keys', then the values'.
template <storage T>
__global__ void __launch_bounds__(kv_threads)
    kv_write_rotated_kernel(const __grid_constant__ kv_write_rotated<T> args) {
  wait_for_previous_kernel();
  launch_dependents();
  const kv_view<T, cuda>& layer = args.layer;
  const auto q_heads = static_cast<std::int32_t>(args.q.extent(1)), half = layer.head_dim / 2;
  const auto lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  const std::ptrdiff_t slot = blockIdx.x;
  std::int32_t head =
      static_cast<std::int32_t>(blockIdx.y) * (kv_threads / 32) + static_cast<std::int32_t>(threadIdx.x) / 32;
  if (head >= q_heads + 2 * layer.kv_heads) return;
  const auto turn = [&](std::int32_t d, float& first, float& second) {
    rotate(rotation_at(args.rotary.positions[slot], args.rotary.inverse_frequencies[d]), first, second);
  };
  if (head < q_heads) {
    for (std::int32_t d = lane; d < half; d += 32) turn(d, args.q(slot, head, d), args.q(slot, head, half + d));
    return;
  }
  const kv_place at = place_behind(args.layout, slot);
  if (at.row < 0) return;
  head -= q_heads;
  const bool is_key = head < layer.kv_heads;
  if (!is_key) head -= layer.kv_heads;
  T* const to = (is_key ? layer.keys : layer.values) + layer.offset(at.row, at.position, head);
  const float inverse_scale = 1.0f / (is_key ? layer.key_scale(head) : layer.value_scale(head));
  for (std::int32_t d = lane; d < half; d += 32) {
    const view<const float, 3, cuda>& from = is_key ? args.k : args.v;
    float first = from(slot, head, d), second = from(slot, head, half + d);
    if (is_key) turn(d, first, second);
    to[d] = stored<T>(first, inverse_scale);
    to[half + d] = stored<T>(second, inverse_scale);
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
                            const rotary_view<cuda>& rotary) {
    if (q.extent(0) == 0) return;
    const std::ptrdiff_t heads = q.extent(1) + 2 * layer.kv_heads;
    const dim3 grid(static_cast<unsigned>(q.extent(0)), static_cast<unsigned>((heads - 1) / (kv_threads / 32) + 1));
    launch(ctx, kv_write_rotated_kernel<T>, grid, kv_write_rotated<T>{layer, layout, q, k, v, rotary}, true);
  }

  static void publish(context<cuda>& ctx, const std::int32_t* entries, std::ptrdiff_t count, std::int32_t* table) {
    for (std::ptrdiff_t done = 0; done < count; done += table_entries::capacity) {
      table_entries part;
      part.to = table + done;
      part.count = static_cast<std::int32_t>((std::min)(count - done, table_entries::capacity));
      std::copy_n(entries + done, part.count, part.entry);
      launch(ctx, kv_publish_kernel, dim3(1), part);
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
          launch(ctx, kv_compact_kernel<uint4, T>, grid, part);
        } else {
          launch(ctx, kv_compact_kernel<T, T>, grid, part);
        }
      }
    }
  }

 private:
  /// \param waits the kernel's CTAs may be placed while the one before it still runs: each waits for it
  template <class Arguments>
  static void launch(context<cuda>& ctx, void (*kernel)(Arguments), dim3 grid, const Arguments& arguments,
                     bool waits = false) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(kv_threads);
    config.stream = ctx.stream();
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early;
    config.numAttrs = waits && ctx.code_major() >= 9 ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments), "kv_cache");
  }

  template <storage T>
  static void start(context<cuda>& ctx, kv_write<T> args) {
    const std::ptrdiff_t items = args.k.extent(0) * args.layer.kv_heads;
    if (items == 0) return;
    args.wide = fours(args.k) && fours(args.v);
    launch(ctx, kv_write_kernel<T>, dim3(static_cast<unsigned>((items - 1) / (kv_threads / 32) + 1), 2), args, true);
  }

  /// Whether every row can be read four floats at a time. (The cache's own rows then can be written so.)
  static bool fours(const view<const float, 3, cuda>& rows) {
    return rows.stride(2) == 1 && (rows.extent(2) | rows.stride(0) | rows.stride(1)) % 4 == 0 &&
           reinterpret_cast<std::uintptr_t>(rows.data()) % sizeof(float4) == 0;
  }
};

}  // namespace specattn::inline v0_1::detail
