// Softmax weights again, from queries, keys and log-sum-exps. recompute(): of one layer's pass that another engine ran.
// recompute_steps(): of several draft steps and every layer at once, whatever the steps themselves attended to.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "attend.hpp"
#include "backend.hpp"
#include "error.hpp"
#include "kv_cache.hpp"
#include "kv_view.hpp"
#include "scalar.hpp"
#include "selection.hpp"
#include "view.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// What a pass of attention was asked for, as attend_args says it, and the log-sum-exp it returned. Values are not
/// needed.
template <storage T, backend B = cpu>
struct recompute_args {
  view<const float, 3, B> q;                    ///< [slots, q_heads, head_dim], rotated
  kv_view<T, B> kv;                             ///< keys; values may be absent
  view<const std::int32_t, 1, B> slot_offsets;  ///< [sequences + 1]
  view<const std::int32_t, 1, B> kv_lens;       ///< [sequences] prefix lengths, the slots not counted
  view<const std::int32_t, 1, B> cache_rows;    ///< [sequences] rows of the block table; empty: 0, 1, …
  float scale = 0.0f;                           ///< of the scores; 0: 1 / sqrt(head_dim)
  selection_view<B> kept;                       ///< kept positions; counts empty: dense
  std::ptrdiff_t kept_sequence_stride = 0;      ///< groups from one sequence's lists to the next's
  view<const float, 2, B> lse;                  ///< [slots, q_heads] natural log, finite
  recording_view<B> recording;                  ///< where the weights go
};

namespace detail {
/// The backend's implementation.  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
template <backend B>
struct recompute_impl;

template <storage T, backend B>
void check_recompute(const recompute_args<T, B>& a) {
  const auto slots = a.q.extent(0);
  const auto q_heads = a.q.extent(1);
  const auto sequences = a.kv_lens.extent(0);
  expects(a.kv.kv_heads > 0 && q_heads % a.kv.kv_heads == 0, "recompute: ", q_heads, " q_heads over ", a.kv.kv_heads,
          " kv_heads: the first must be a multiple of the second");
  expects(a.q.extent(2) == a.kv.head_dim, "recompute: q has head_dim ", a.q.extent(2), ", the cache ", a.kv.head_dim);
  expects(a.kv.key_scales.empty() || (scaled_storage<T> && a.kv.key_scales.extent(0) == a.kv.kv_heads),
          "recompute: ", a.kv.key_scales.extent(0), " key_scales for ", scaled_storage<T> ? a.kv.kv_heads : 0,
          " kv_heads with one");
  expects(a.slot_offsets.extent(0) == sequences + 1, "recompute: ", a.slot_offsets.extent(0), " slot_offsets for ",
          sequences, " sequences (one more is needed)");
  expects(a.lse.extent(0) == slots && a.lse.extent(1) == q_heads, "recompute: lse is [", a.lse.extent(0), ", ",
          a.lse.extent(1), "], needed [", slots, ", ", q_heads, "]");
  expects(a.cache_rows.empty() || a.cache_rows.extent(0) == sequences, "recompute: ", a.cache_rows.extent(0),
          " cache_rows for ", sequences, " sequences");
  if (!a.kept.counts.empty() && sequences > 0) {
    const auto last = (sequences - 1) * a.kept_sequence_stride + a.kv.kv_heads;
    expects(a.kept.groups() >= last, "recompute: the selection has ", a.kept.groups(), " groups, ", last,
            " are needed");
  }
  const auto rows = a.recording.slots == record_slots::newest ? sequences : slots;
  expects(a.recording.weights.extent(0) >= rows && a.recording.weights.extent(1) == q_heads,
          "recompute: the recording is [", a.recording.weights.extent(0), ", ", a.recording.weights.extent(1),
          ", …], needed [", rows, ", ", q_heads, ", …]");
}
}  // namespace detail

/// Leaves in args.recording what attend()'s recording leaves, entry for entry, where another engine ran the pass and
/// returned no more than its log-sum-exp: weight = exp(scale * q · k - lse), in float whatever the storage.
///
/// A weight too large for a float is +inf, which only an lse of other queries and keys leaves.
/// A row sums to one as nearly as the lse belongs to the same queries and keys: an engine that rounded queries to 16
/// bits leaves its own error in every weight of the row. The lse must be over all that a slot attended to, its tail
/// included.
///
/// \pre    the slots' keys are in the cache; lists satisfy the invariants of selection_view. On cuda nothing checks
///         offsets, lengths and counts, which are read when the work runs (a captured graph follows them), but that a
///         count is cut to its list's row and a recording to its own
/// \throws contract_error (shapes; on the cpu also a recording too short, and data out of range)
/// \cost   2 * recorded rows * attended * head_dim flop; reads attended * kv_heads * head_dim elements a sequence, once
///         for every eight query rows of a kv head; no workspace
/// \sync   cpu: done on return. cuda: queued on the context's stream.
template <storage T, backend B>
void recompute(context<B>& ctx, const recompute_args<T, B>& args) {
  detail::check_recompute(args);
  detail::recompute_impl<B>::run(ctx,
                                 args);  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
}

/// What recorded weights are stored as. fp16 on cuda: the pass is bound by memory bandwidth.
template <backend B>
using recorded_weight = std::conditional_t<std::same_as<B, cuda>, fp16, float>;

/// Recorded weights are stored in multiples of this: fp16 keeps its 11 bits of a weight down to 2^-29.
template <backend B>
inline constexpr float recorded_unit = std::same_as<B, cuda> ? 0x1p-15f : 1.0f;

/// Queries of several steps, the keys of the positions they are to be weighed over, and where the weights go.
template <storage T, backend B = cpu>
struct recompute_steps_args {
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
///   workspace_bytes(ctx, rows, kv_len), run(ctx, args)
template <backend B>
struct recompute_steps_impl;

template <storage T, backend B>
void check_recompute_steps(const recompute_steps_args<T, B>& a) {
  const auto steps = a.q.extent(0), layers = a.q.extent(1), slots = a.q.extent(2), q_heads = a.q.extent(3);
  const auto sequences = a.kv_lens.extent(0);
  expects(a.kv.kv_heads > 0 && q_heads % a.kv.kv_heads == 0, "recompute_steps: ", q_heads, " q_heads over ",
          a.kv.kv_heads, " kv_heads: the first must be a multiple of the second");
  expects(a.q.extent(4) == a.kv.head_dim && a.q.stride(4) == 1, "recompute_steps: q has head_dim ", a.q.extent(4),
          " of stride ", a.q.stride(4), ", the cache ", a.kv.head_dim, "; its elements must be adjacent");
  expects(a.slot_of.extent(0) == steps && a.slot_of.extent(1) == sequences &&
              (a.cache_rows.empty() || a.cache_rows.extent(0) == sequences),
          "recompute_steps: slot_of [", a.slot_of.extent(0), ", ", a.slot_of.extent(1), "] and ",
          a.cache_rows.extent(0), " cache_rows for ", steps, " steps of ", sequences, " sequences");
  expects(a.key_scales.empty() ||
              (scaled_storage<T> && a.key_scales.extent(0) == layers && a.key_scales.extent(1) == a.kv.kv_heads),
          "recompute_steps: key_scales [", a.key_scales.extent(0), ", ", a.key_scales.extent(1), "] for ", layers,
          " layers of ", a.kv.kv_heads, " kv_heads", scaled_storage<T> ? "" : ", whose storage has none");
  const auto rows = a.weights.extent(0);
  const auto is_per_row = [&](const auto& of) {
    return of.extent(0) == rows && of.extent(1) == layers && of.extent(2) == sequences && of.extent(3) == q_heads;
  };
  expects(
      a.lse.extent(0) == steps && a.lse.extent(1) == layers && a.lse.extent(2) == slots && a.lse.extent(3) == q_heads,
      "recompute_steps: lse is [", a.lse.extent(0), ", ", a.lse.extent(1), ", ", a.lse.extent(2), ", ",
      a.lse.extent(3), "], needed [", steps, ", ", layers, ", ", slots, ", ", q_heads, "]");
  expects((rows == 1 || rows == steps) && is_per_row(a.weights) && is_per_row(a.masses) && a.weights.stride(4) == 1,
          "recompute_steps: weights are [", rows, ", ", a.weights.extent(1), ", ", a.weights.extent(2), ", ",
          a.weights.extent(3), ", …] of stride ", a.weights.stride(4), " with masses [", a.masses.extent(0), ", ",
          a.masses.extent(1), ", ", a.masses.extent(2), ", ", a.masses.extent(3), "], needed [1 or ", steps, ", ",
          layers, ", ", sequences, ", ", q_heads, ", …] of stride 1, and as many masses");
}

}  // namespace detail

/// Bytes of workspace that recompute_steps() takes from the context for `rows` rows (1 or steps × layers × sequences ×
/// q_heads) of `kv_len` positions or anything smaller.
template <backend B>
std::size_t recompute_steps_workspace_bytes(const context<B>& ctx, std::ptrdiff_t rows, std::ptrdiff_t kv_len) {
  return detail::recompute_steps_impl<B>::workspace_bytes(ctx, rows, kv_len);
}

/// Writes the weights exp(scale * q · k - lse) of every position below kv_lens, their mean over the steps or each
/// step's, and what they sum to.
///
/// With the log-sum-exp of dense attention these are that attention's weights, and a row's mass is the share of the
/// prefix. With that of sparse attention each row is too large by 1 / kept mass of its step and head. `masses` reveals the
/// factor of a step's own row; in a mean over steps it weights the steps. A weight too large for a float (a score more than 88.72 above its log-sum-exp) is +inf on the cpu, as
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
void recompute_steps(context<B>& ctx, const recompute_steps_args<T, B>& args) {
  detail::check_recompute_steps(args);
  detail::recompute_steps_impl<B>::run(ctx, args);  // incomplete? include <specattn/specattn.hpp> (cpu)
}

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
