// The weights of draft steps again, from the queries they asked with: a recording that reads keys and no values, once
// for all steps, whatever the steps themselves attended to.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "backend.hpp"
#include "error.hpp"
#include "kv_view.hpp"
#include "scalar.hpp"
#include "view.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// What recorded weights are stored as. On cuda, where they go through memory, half of the bytes are half of the time.
template <backend B>
using recorded_weight = std::conditional_t<std::same_as<B, cuda>, fp16, float>;

/// Recorded weights are stored in multiples of this: fp16 keeps its 11 bits of a weight down to 2^-29.
template <backend B>
inline constexpr float recorded_unit = std::same_as<B, cuda> ? 0x1p-15f : 1.0f;

/// What a pass's slots asked: the queries of every layer, and the log-sum-exp each found among what it attended to.
template <backend B = cpu>
struct query_log {
  view<float, 4, B> q;    ///< [layers, slots or more, q_heads, head_dim], rotated; empty: nothing is kept
  view<float, 3, B> lse;  ///< [layers, slots or more, q_heads] natural log

  bool empty() const { return q.empty(); }
};

/// Queries of several steps, the keys of the positions they are to be weighed over, and where the weights go.
template <storage T, backend B = cpu>
struct key_recording_args {
  view<const float, 5, B> q;                  ///< [steps, layers, slots, q_heads, head_dim], rotated
  view<const float, 4, B> lse;                ///< [steps, layers, slots, q_heads] natural log
  view<const std::int32_t, 2, B> slot_of;     ///< [steps, sequences] who asks for each; negative: nobody
  kv_view<T, B> kv;                           ///< the first layer's keys; its values and scales are not used
  std::ptrdiff_t layer_stride = 0;            ///< elements from one layer's keys to the next's
  view<const float, 2, B> key_scales;         ///< [layers, kv_heads] of fp8_e4m3; empty: 1
  view<const std::int32_t, 1, B> kv_lens;     ///< [sequences] positions that are weighed
  view<const std::int32_t, 1, B> cache_rows;  ///< [sequences] rows of the block table; empty: 0, 1, …
  float scale = 0.0f;                         ///< of the scores; 0: 1 / sqrt(head_dim)
  /// [1 or steps, layers, sequences, q_heads, capacity] in multiples of recorded_unit<B>: the steps' mean, or each.
  view<recorded_weight<B>, 5, B> weights;
  view<float, 4, B> masses;  ///< [1 or steps, layers, sequences, q_heads] what a row's stored numbers sum to
};

namespace detail {

/// The backend's implementation.  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
///   workspace_bytes(ctx, rows, kv_len), run(ctx, args), keep_queries(ctx, q, to)
template <backend B>
struct key_recording_impl;

template <storage T, backend B>
void check_key_recording(const key_recording_args<T, B>& a) {
  const auto steps = a.q.extent(0), layers = a.q.extent(1), slots = a.q.extent(2), q_heads = a.q.extent(3);
  const auto sequences = a.kv_lens.extent(0);
  expects(a.kv.kv_heads > 0 && q_heads % a.kv.kv_heads == 0, "record_keys: ", q_heads, " q_heads over ",
          a.kv.kv_heads, " kv_heads: the first must be a multiple of the second");
  expects(a.q.extent(4) == a.kv.head_dim && a.q.stride(4) == 1, "record_keys: q has head_dim ", a.q.extent(4),
          " of stride ", a.q.stride(4), ", the cache ", a.kv.head_dim, "; its elements must be adjacent");
  expects(a.slot_of.extent(0) == steps && a.slot_of.extent(1) == sequences &&
              (a.cache_rows.empty() || a.cache_rows.extent(0) == sequences),
          "record_keys: slot_of [", a.slot_of.extent(0), ", ", a.slot_of.extent(1), "] and ", a.cache_rows.extent(0),
          " cache_rows for ", steps, " steps of ", sequences, " sequences");
  expects(a.key_scales.empty() ||
              (scaled_storage<T> && a.key_scales.extent(0) == layers && a.key_scales.extent(1) == a.kv.kv_heads),
          "record_keys: key_scales [", a.key_scales.extent(0), ", ", a.key_scales.extent(1), "] for ", layers,
          " layers of ", a.kv.kv_heads, " kv_heads", scaled_storage<T> ? "" : ", whose storage has none");
  const auto rows = a.weights.extent(0);
  const auto is_per_row = [&](const auto& of) {
    return of.extent(0) == rows && of.extent(1) == layers && of.extent(2) == sequences && of.extent(3) == q_heads;
  };
  expects(
      a.lse.extent(0) == steps && a.lse.extent(1) == layers && a.lse.extent(2) == slots && a.lse.extent(3) == q_heads,
      "record_keys: lse is [", a.lse.extent(0), ", ", a.lse.extent(1), ", ", a.lse.extent(2), ", ", a.lse.extent(3),
      "], needed [", steps, ", ", layers, ", ", slots, ", ", q_heads, "]");
  expects((rows == 1 || rows == steps) && is_per_row(a.weights) && is_per_row(a.masses) && a.weights.stride(4) == 1,
          "record_keys: weights are [", rows, ", ", a.weights.extent(1), ", ", a.weights.extent(2), ", ",
          a.weights.extent(3), ", …] of stride ", a.weights.stride(4), " with masses [", a.masses.extent(0), ", ",
          a.masses.extent(1), ", ", a.masses.extent(2), ", ", a.masses.extent(3), "], needed [1 or ", steps, ", ",
          layers, ", ", sequences, ", ", q_heads, ", …] of stride 1, and as many masses");
}

}  // namespace detail

/// Bytes of workspace that record_keys() takes from the context for `rows` rows (1 or steps × layers × sequences ×
/// q_heads) of `kv_len` positions or anything smaller.
template <backend B>
std::size_t key_recording_workspace_bytes(const context<B>& ctx, std::ptrdiff_t rows, std::ptrdiff_t kv_len) {
  return detail::key_recording_impl<B>::workspace_bytes(ctx, rows, kv_len);
}

/// Leaves the weights exp(scale * q · k - lse) of every position below kv_lens, their mean over the steps or each
/// step's, and what they sum to.
///
/// A log-sum-exp of dense attention makes them that attention's weights, and a row's mass the share of the prefix. One
/// of sparse attention, which knows nothing of what was left out, makes them too large by one factor for a step and
/// head, the inverse of the mass that was kept: row by row the mass tells it, but in a mean of steps it weighs each by
/// its own. A weight too large for a float (a score more than 88.72 above its log-sum-exp) is +inf on the cpu, as
/// recompute() leaves it, and so is its row's mass: select() counts it as zero and says selection_invalid_weight. On cuda a
/// stored weight is at most 2.
///
/// \pre    keys of all those positions are in the cache. On cuda nothing checks lengths, which are read when the work
///         runs (a captured graph follows them), but that they are cut to the recording's capacity
/// \throws contract_error (shapes; on the cpu also lengths and rows out of range)
/// \cost   2 * steps * q_heads * kv_len * head_dim flop a layer and sequence; reads kv_heads * kv_len * head_dim
///         elements once
/// \sync   cpu: done on return. cuda: queued on the context's stream
template <storage T, backend B>
void record_keys(context<B>& ctx, const key_recording_args<T, B>& args) {
  detail::check_key_recording(args);
  detail::key_recording_impl<B>::run(ctx, args);  // incomplete? include <specattn/specattn.hpp> (cpu)
}

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
