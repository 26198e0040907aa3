// Attention of new slots over a cache: dense, recording, or over a selection with the dense causal tail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "backend.hpp"
#include "error.hpp"
#include "kv_cache.hpp"
#include "scalar.hpp"
#include "selection.hpp"
#include "view.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// Which slots record their weights.
enum class record_slots {
  newest,  ///< the last slot of each sequence: recorded row = sequence of the batch
  all,     ///< every slot: recorded row = slot
};

/// Where attend() leaves softmax weights. Entry j of a row belongs to the j-th attended position: for dense
/// attention position j itself; for guided attention the j-th of the kept list, then the tail. A row holds
/// (kept or kv_len) + tail entries that sum to one over everything the slot attended to; what lies after it is left
/// as it was.
template <backend B = cpu>
struct recording_view {
  view<float, 3, B> weights;  ///< [sequences or slots, q_heads, capacity]; empty: record nothing
  record_slots slots = record_slots::newest;
};

/// One layer's attention for a ragged batch of sequences.
///
/// Slots of sequence s are rows slot_offsets(s) … slot_offsets(s + 1) - 1 of `q`. Their own keys and values are
/// already in the cache, at positions kv_lens(s) …: slot i of a sequence attends to its kept prefix positions and to
/// tail positions kv_len … kv_len + i.
template <storage T, backend B = cpu>
struct attend_args {
  view<const float, 3, B> q;  ///< [slots, q_heads, head_dim], rotated
  kv_view<T, B> kv;
  view<const std::int32_t, 1, B> slot_offsets;  ///< [sequences + 1]
  view<const std::int32_t, 1, B> kv_lens;       ///< [sequences] prefix lengths, the slots not counted
  view<const std::int32_t, 1, B> cache_rows;    ///< [sequences] rows of the block table; empty: 0, 1, …
  float scale = 0.0f;                           ///< of the scores; 0: 1 / sqrt(head_dim)
  /// Kept positions; counts empty: dense. The list of (sequence s, kv head h) is group
  /// s * kept_sequence_stride + h.
  selection_view<B> kept;
  std::ptrdiff_t kept_sequence_stride = 0;
  /// Lists of slots given as one union: [groups, capacity] beside kept.positions, bit i of an entry's word saying that
  /// slot i of the sequence attends to that position. An entry that a slot does not attend to is recorded as 0. The tail
  /// and groups of keep_all need no words. At most 32 slots a sequence; empty: every slot attends to the whole list.
  view<const std::uint32_t, 2, B> slot_masks;
  view<float, 3, B> out;  ///< [slots, q_heads, head_dim], overwritten; must not overlap q
  view<float, 2, B> lse;  ///< [slots, q_heads] natural log; may be empty
  recording_view<B> recording;
};

namespace detail {
/// The backend's implementation.
template <backend B>
struct attend_impl;

inline constexpr std::int32_t most_masked_slots = 32;  ///< bits of a word of slot_masks

/// Whether slot `slot` of a sequence attends to the position of a word of slot_masks.
SPECATTN_HD inline bool slot_reads(std::uint32_t word, std::int32_t slot) {
  return slot < most_masked_slots && (word >> slot & 1u) != 0;
}

template <storage T, backend B>
void check_attend(const attend_args<T, B>& a) {
  const auto slots = a.q.extent(0);
  const auto q_heads = a.q.extent(1);
  const auto head_dim = a.q.extent(2);
  const auto sequences = a.kv_lens.extent(0);
  expects(a.kv.kv_heads > 0 && q_heads % a.kv.kv_heads == 0, "attend: ", q_heads, " q_heads over ", a.kv.kv_heads,
          " kv_heads: the first must be a multiple of the second");
  expects(head_dim == a.kv.head_dim, "attend: q has head_dim ", head_dim, ", the cache ", a.kv.head_dim);
  for (const auto* scales : {&a.kv.key_scales, &a.kv.value_scales}) {
    expects(scales->empty() || scaled_storage<T>, "attend: scales of a storage type that has none");
    expects(scales->empty() || scales->extent(0) == a.kv.kv_heads, "attend: ", scales->extent(0), " scales for ",
            a.kv.kv_heads, " kv_heads");
  }
  expects(a.slot_offsets.extent(0) == sequences + 1, "attend: ", a.slot_offsets.extent(0), " slot_offsets for ",
          sequences, " sequences (one more is needed)");
  expects(a.out.extents() == a.q.extents(), "attend: out is [", a.out.extent(0), ", ", a.out.extent(1), ", ",
          a.out.extent(2), "], q is [", slots, ", ", q_heads, ", ", head_dim, "]");
  expects(a.lse.empty() || (a.lse.extent(0) == slots && a.lse.extent(1) == q_heads), "attend: lse is [",
          a.lse.extent(0), ", ", a.lse.extent(1), "], needed [", slots, ", ", q_heads, "]");
  expects(a.cache_rows.empty() || a.cache_rows.extent(0) == sequences, "attend: ", a.cache_rows.extent(0),
          " cache_rows for ", sequences, " sequences");
  if (!a.kept.counts.empty() && sequences > 0) {
    const auto last = (sequences - 1) * a.kept_sequence_stride + a.kv.kv_heads;
    expects(a.kept.groups() >= last, "attend: the selection has ", a.kept.groups(), " groups, ", last, " are needed");
  }
  if (!a.slot_masks.empty()) {
    expects(!a.kept.counts.empty(), "attend: slot_masks without a selection");
    expects(a.slot_masks.extent(0) >= a.kept.groups() && a.slot_masks.extent(1) >= a.kept.capacity(),
            "attend: slot_masks is [", a.slot_masks.extent(0), ", ", a.slot_masks.extent(1), "], the selection [",
            a.kept.groups(), ", ", a.kept.capacity(), "]");
  }
  if (!a.recording.weights.empty()) {
    const auto rows = a.recording.slots == record_slots::newest ? sequences : slots;
    expects(a.recording.weights.extent(0) >= rows && a.recording.weights.extent(1) == q_heads,
            "attend: the recording is [", a.recording.weights.extent(0), ", ", a.recording.weights.extent(1),
            ", …], needed [", rows, ", ", q_heads, ", …]");
  }
}

/// \param behind_append  the call before on the context was an append of the slots to args.kv, which may have rotated q:
///                       on cuda, what does not depend on it begins before it ends
template <storage T, backend B>
void attend(context<B>& ctx, const attend_args<T, B>& args, bool behind_append) {
  check_attend(args);
  if constexpr (std::is_same_v<B, cpu>) {
    attend_impl<B>::run(ctx, args);  // incomplete? include <specattn/specattn.hpp>
  } else {
    attend_impl<B>::run(ctx, args, behind_append);  // incomplete? include <specattn/cuda.cuh>
  }
}
}  // namespace detail

/// The largest pass that a workspace has to serve.
struct attend_shape {
  std::int32_t sequences = 1;
  std::int32_t slots = 1;  ///< of all sequences together
  std::int32_t q_heads = 0;
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t kv_len = 0;  ///< longest prefix plus tail
};

/// Bytes of workspace that attend() takes from the context for this shape or anything smaller in every field.
template <backend B>
std::size_t attend_workspace_bytes(const context<B>& ctx, const attend_shape& shape) {
  return detail::attend_impl<B>::workspace_bytes(ctx, shape);
}

/// Runs the pass. Arithmetic is float whatever the storage. The result of a slot does not depend, to the bit on the
/// cpu, on the other slots or sequences of the batch or on the number of threads; listing every position gives the
/// bits of the dense pass.
///
/// On cuda, offsets, lengths and counts are read when the work runs: a captured graph follows them, and nothing checks
/// them but that a count is cut to its list's row and a recording to its own. With storage of 16 bits and of 8, queries
/// and weights enter the products as sums of two elements (16 bits of them with bf16, 22 with fp16 and fp8_e4m3), and a
/// value that is not finite reaches every slot of its sequence that shares a tile of positions with it.
///
/// \pre    the slots' keys and values are in the cache; lists satisfy the invariants of selection_view; under slot_masks
///         values are finite: a listed position that a slot does not attend to counts with weight 0
/// \throws contract_error (shapes, a recording too short, a workspace too small; on the cpu too many masked slots)
/// \cost   4 * slots * q_heads * attended * head_dim flop; reads 2 * attended * kv_heads * head_dim elements a sequence
/// \sync   cpu: done on return. cuda: queued on the context's stream.
template <storage T, backend B>
void attend(context<B>& ctx, const attend_args<T, B>& args) {
  detail::attend(ctx, args, false);
}

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
