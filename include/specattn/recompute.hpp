// Softmax weights again, from queries, keys and the log-sum-exp that another engine's kernel returned.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attend.hpp"
#include "error.hpp"
#include "kv_cache.hpp"
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

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
