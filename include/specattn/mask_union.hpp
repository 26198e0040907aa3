// Lists of the slots of a pass as one ascending union, and which slots each entry is for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "backend.hpp"
#include "error.hpp"
#include "selection.hpp"
#include "view.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// Lists of a ragged batch, one for each slot and kv head, and where their unions go. Slots of sequence s are
/// slot_offsets(s) … slot_offsets(s + 1) - 1.
template <backend B = cpu>
struct mask_union_args {
  selection_view<B> lists;  ///< [slots * kv_heads] the list of (slot, kv head h) is group slot * kv_heads + h
  view<const std::int32_t, 1, B> slot_offsets;  ///< [sequences + 1]
  view<const std::int32_t, 1, B> kv_lens;       ///< [sequences] prefix lengths
  std::int32_t kv_heads = 1;
  selection_view<B> out;  ///< [sequences * kv_heads] the union of (sequence s, kv head h) is group s * kv_heads + h
  view<std::uint32_t, 2, B> slot_masks;  ///< [sequences * kv_heads, capacity of out]
};

namespace detail {
/// The backend's implementation.  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
template <backend B>
struct mask_union_impl;

inline constexpr std::int32_t union_slots = std::numeric_limits<std::uint32_t>::digits;  ///< bits of a word

/// A slot's list as entries that ascend: of keep_all, the positions themselves.
struct slot_list {
  static constexpr std::int32_t end = (std::numeric_limits<std::int32_t>::max)();  ///< after every position

  const std::int32_t* positions = nullptr;  ///< null: every position
  std::ptrdiff_t stride = 1;
  std::int32_t count = 0;

  SPECATTN_HD std::int32_t entry(std::int32_t i) const {
    if (i >= count) return end;
    return positions == nullptr ? i : positions[i * stride];
  }
};

template <backend B>
SPECATTN_HD slot_list list_of(const mask_union_args<B>& a, std::ptrdiff_t group, std::int32_t kv_len) {
  const std::int32_t count = a.lists.counts[group];
  if (count == keep_all) return {nullptr, 1, kv_len};
  const auto most = static_cast<std::int32_t>(a.lists.capacity());
  return {a.lists.positions.data() + group * a.lists.positions.stride(0), a.lists.positions.stride(1),
          count < 0      ? 0
          : count < most ? count
                         : most};
}

/// Which lists a union is of.
struct union_source {
  std::ptrdiff_t first;  ///< the list of slot 0; the next slots' follow kv_heads apart
  std::int32_t kv_heads, slots, kv_len;

  SPECATTN_HD std::ptrdiff_t list(std::int32_t slot) const { return first + std::ptrdiff_t{slot} * kv_heads; }
};

template <backend B>
SPECATTN_HD union_source source_of(const mask_union_args<B>& a, std::ptrdiff_t group) {
  const std::ptrdiff_t s = group / a.kv_heads;
  const std::int32_t first = a.slot_offsets[s], count = a.slot_offsets[s + 1] - first;
  return {std::ptrdiff_t{first} * a.kv_heads + group % a.kv_heads, a.kv_heads,
          count < 0             ? 0
          : count < union_slots ? count
                                : union_slots,
          a.kv_lens[s]};
}

/// Writes what a union of `size` entries has besides them: padding, count and status. A size over the capacity says only
/// that there are more. `lanes` threads may share the work, each calling with its `lane`.
template <backend B>
SPECATTN_HD void finish_union(const mask_union_args<B>& a, std::ptrdiff_t group, bool everything, std::ptrdiff_t size,
                              std::uint32_t status, std::int32_t lane = 0, std::int32_t lanes = 1) {
  const std::ptrdiff_t capacity = a.out.capacity(), count = size < capacity ? size : capacity;
  const std::ptrdiff_t padded = padded_count(count, capacity);
  for (std::ptrdiff_t i = count + lane; i < padded; i += lanes) a.out.positions(group, i) = -1;
  if (lane != 0) return;
  a.out.counts[group] = everything ? keep_all : static_cast<std::int32_t>(count);
  if (!a.out.status.empty()) a.out.status[group] = size > capacity ? status | selection_capped : status;
}

template <backend B>
void check_mask_union(const mask_union_args<B>& a) {
  const auto sequences = a.kv_lens.extent(0);
  const auto groups = sequences * a.kv_heads;
  expects(a.kv_heads > 0 && a.lists.groups() % a.kv_heads == 0, "mask_union: ", a.lists.groups(),
          " lists of slots over ", a.kv_heads, " kv_heads: the first must be a multiple of the second");
  expects(a.slot_offsets.extent(0) == sequences + 1, "mask_union: ", a.slot_offsets.extent(0), " slot_offsets for ",
          sequences, " sequences (one more is needed)");
  expects(a.out.groups() == groups && a.out.positions.extent(0) == groups, "mask_union: ", sequences,
          " sequences of ", a.kv_heads, " kv_heads, out has ", a.out.groups(), " counts and ",
          a.out.positions.extent(0), " lists");
  expects(a.slot_masks.extent(0) == groups && a.slot_masks.extent(1) == a.out.capacity(),
          "mask_union: slot_masks is [", a.slot_masks.extent(0), ", ", a.slot_masks.extent(1), "], out [", groups,
          ", ", a.out.capacity(), "]");
  expects(a.out.status.empty() || a.out.status.extent(0) == groups, "mask_union: ", a.out.status.extent(0),
          " status entries for ", groups, " groups");
}
}  // namespace detail

/// Writes for every sequence and kv head the union of its slots' lists, padded as selection_view says, and beside each
/// entry a word whose bit i says that the list of slot i of the sequence holds that position: what attend() takes as
/// `kept` (kept_sequence_stride = kv_heads) and `slot_masks`, so that a row which several slots attend to is read once.
///
/// Where every list of a sequence and kv head is keep_all, so is the union, without a list or words; where only some
/// are, the union lists the prefix. A sequence without slots has an empty union. Lists may keep positions that others
/// do not; out.mass is not written. out.status, if given, is that of the lists together.
///
/// A union over the capacity loses its largest positions and is flagged selection_capped.
///
/// \pre    lists satisfy the invariants of selection_view; a sequence has at most 32 slots (on cuda, where nothing
///         checks offsets and lengths, the lists of further ones are left out); outputs do not overlap inputs
/// \throws contract_error (shapes; on the cpu also slots and counts out of range)
/// \cost   reads every list once; no workspace. cpu: a union is one thread's work. cuda: one launch, a union is the work of one
///         cluster of CTAs: up to 8 while the device runs them all at once, one before Hopper
/// \sync   cpu: done on return. cuda: queued on the context's stream; lengths and counts are read when the work runs
template <backend B>
void mask_union(context<B>& ctx, const mask_union_args<B>& args) {
  detail::check_mask_union(args);
  detail::mask_union_impl<B>::run(ctx,
                                  args);  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
}

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
