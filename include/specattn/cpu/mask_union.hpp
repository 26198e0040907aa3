// mask_union() on the CPU: one member of the team merges the lists of one sequence and kv head.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../mask_union.hpp"
#include "context.hpp"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

template <>
struct mask_union_impl<cpu> {
  static void run(context<cpu>& ctx, const mask_union_args<cpu>& args) {
    const auto sequences = static_cast<std::int32_t>(args.kv_lens.extent(0));
    for (std::int32_t s = 0; s < sequences; ++s) check_sequence(args, s);
    ctx.parallel_for(args.out.groups(), [&](std::ptrdiff_t g, int) { one_union(args, g); });
  }

 private:
  static void check_sequence(const mask_union_args<cpu>& a, std::int32_t s) {
    const std::int32_t first = a.slot_offsets[s];
    const std::int32_t last = a.slot_offsets[s + 1];
    const std::ptrdiff_t slots = a.lists.groups() / a.kv_heads;
    expects(first >= 0 && first <= last && last <= slots, "mask_union: sequence ", s, " has slots ", first, " … ",
            last, " of ", slots);
    expects(last - first <= union_slots, "mask_union: sequence ", s, " has ", last - first, " slots, a word ",
            union_slots);
    expects(a.kv_lens[s] >= 0, "mask_union: sequence ", s, " has kv_len ", a.kv_lens[s]);
    for (std::ptrdiff_t g = std::ptrdiff_t{first} * a.kv_heads; g < std::ptrdiff_t{last} * a.kv_heads; ++g) {
      const std::int32_t count = a.lists.counts[g];
      expects(count == keep_all || (count >= 0 && count <= a.lists.capacity() && count <= a.kv_lens[s]),
              "mask_union: group ", g, " has count ", count, ", capacity ", a.lists.capacity(), ", kv_len ",
              a.kv_lens[s]);
    }
  }

  static void one_union(const mask_union_args<cpu>& a, std::ptrdiff_t g) {
    const union_source from = source_of(a, g);
    slot_list lists[union_slots];
    std::int32_t cursors[union_slots] = {};
    std::uint32_t status = selection_ok;
    bool everything = from.slots > 0;
    for (std::int32_t i = 0; i < from.slots; ++i) {
      const std::ptrdiff_t list = from.list(i);
      lists[i] = list_of(a, list, from.kv_len);
      everything = everything && a.lists.counts[list] == keep_all;
      if (!a.lists.status.empty()) status |= a.lists.status[list];
    }
    const std::ptrdiff_t capacity = a.out.capacity();
    std::ptrdiff_t size = 0;
    for (; !everything; ++size) {
      std::int32_t next = slot_list::end;
      for (std::int32_t i = 0; i < from.slots; ++i) next = (std::min)(next, lists[i].entry(cursors[i]));
      if (next == slot_list::end) break;
      if (size == capacity) {
        ++size;
        break;
      }
      std::uint32_t word = 0;
      for (std::int32_t i = 0; i < from.slots; ++i) {
        if (lists[i].entry(cursors[i]) != next) continue;
        word |= 1u << i;
        ++cursors[i];
      }
      a.out.positions(g, size) = next;
      a.slot_masks(g, size) = word;
    }
    finish_union(a, g, everything, size, status);
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
