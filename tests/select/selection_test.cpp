// Lists of kept positions: how reused ones grow, and what validate() refuses.
#include "specattn/selection.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

#include "doctest/doctest.h"

using namespace specattn;  // NOLINT(google-build-using-namespace)

namespace {

constexpr std::int32_t untouched = 7777;

/// Two lists between guard entries; the second is the one under test.
struct guarded_lists {
  std::vector<std::int32_t> memory;
  std::vector<std::int32_t> counts{untouched, untouched};
  std::ptrdiff_t capacity;

  explicit guarded_lists(std::ptrdiff_t most)
      : memory(static_cast<std::size_t>(2 * most + 2), untouched), capacity(most) {}
  selection_view<cpu> view() { return {{memory.data() + 1, {2, capacity}}, {counts.data(), {2}}, {}, {}}; }
};

}  // namespace

TEST_CASE("selection: growing a list writes its new positions and its padding, and nothing before or after") {
  for (const std::int32_t capacity : {8, 64, 100, 200}) {
    for (std::int32_t count = keep_all; count <= capacity; ++count) {
      for (const std::int32_t more : {-3, 0, 1, 5, 64}) {
        if (count + more > capacity) continue;
        guarded_lists lists(capacity);
        const std::int32_t first = 1000, grown = count == keep_all || more < 0 ? count : count + more;
        detail::grow_list(lists.view(), 1, count, first, first + more);
        REQUIRE(lists.counts[0] == untouched);
        REQUIRE(lists.counts[1] == grown);
        const std::ptrdiff_t list = 1 + capacity;
        const std::ptrdiff_t padded = count == keep_all ? 0 : padded_count(grown, capacity);
        for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(lists.memory.size()); ++i) {
          const std::ptrdiff_t entry = i - list;
          const bool written = entry >= count && entry >= 0 && entry < padded;
          const std::int32_t wanted = !written        ? untouched
                                      : entry < grown ? first + static_cast<std::int32_t>(entry) - count
                                                      : -1;
          REQUIRE(lists.memory[static_cast<std::size_t>(i)] == wanted);
        }
      }
    }
  }
}
