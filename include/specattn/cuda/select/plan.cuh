// What makes a selection's lists on a device: which kernel, clusters of how many CTAs, how much shared memory and workspace.
// Numbers in, numbers out: workspace_bytes() and run() ask the same functions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../select.hpp"
#include "../context.cuh"
#include "../device/launch.cuh"
#include "held_row.cuh"
#include "problem.cuh"
#include "resident_memory.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

/// What of a device a plan depends on.
struct select_device {
  int largest_cluster = 1;
  std::ptrdiff_t multiprocessors = 1;
  std::size_t block_shared_bytes = 0;  ///< of a CTA at most

  static select_device of(const context<cuda>& ctx) {
    return {ctx.code_major() >= 9 ? select_max_cluster : 1, ctx.multiprocessors(),
            static_cast<std::size_t>(ctx.block_shared_bytes())};
  }
};

enum class select_way {
  resident,  ///< a row, or a union's rows one by one, in shared memory: select_rows_kernel
  scored,    ///< rows combined, their scores in shared memory: select_combined_kernel
  swept,     ///< in memory: select_groups_kernel
};

struct select_plan {
  select_way way = select_way::swept;
  int cluster = 1;
  std::size_t shared_bytes = 0;       ///< dynamic, of a CTA
  std::size_t most_shared_bytes = 0;  ///< of any launch of the way's kernels on the device
};

/// Makes the plans of one device.
class select_planner {
 public:
  explicit select_planner(const select_device& device) : device_(device) {}

  /// \param combined  whether rows are combined position by position
  select_way way(std::ptrdiff_t kv_len, const selection_rule& rule, bool combined) const {
    if (rule.page_size > 1) return select_way::swept;
    if (combined) return kv_len <= device_.largest_cluster * most_scores() ? select_way::scored : select_way::swept;
    const bool fits = static_shared_bytes(sizeof(select_row_memory)) + resident_bytes(most_share, sizeof(float)) <=
                      device_.block_shared_bytes;
    return fits && rule.method == threshold_method::exact && kv_len <= device_.largest_cluster * most_share
               ? select_way::resident
               : select_way::swept;
  }
  /// Of workspace for a group.
  std::size_t group_bytes(std::ptrdiff_t kv_len, const selection_rule& rule, bool combined) const {
    if (way(kv_len, rule, combined) != select_way::swept) return 0;
    return select_scratch_view{}.lay_out(nullptr, kv_len, combined, rule.page_size > 1);
  }
  /// The same for up to `rows` rows: what a cap, a wanted mass or fewer rows make of them is not known beforehand.
  std::size_t most_group_bytes(std::ptrdiff_t rows, std::ptrdiff_t kv_len, const selection_rule& rule) const {
    const std::size_t alone = group_bytes(kv_len, rule, false);
    const std::size_t combined = rows > 1 ? group_bytes(kv_len, rule, true) : 0;
    return alone > combined ? alone : combined;
  }

  select_plan plan(std::ptrdiff_t groups, std::ptrdiff_t kv_len, std::size_t weight_bytes, const selection_rule& rule,
                   bool combined) const {
    select_plan made{.way = way(kv_len, rule, combined)};
    if (made.way == select_way::resident) {
      const std::ptrdiff_t most = most_share * 4 / static_cast<std::ptrdiff_t>(weight_bytes);
      made.cluster = resident_cluster(groups, kv_len, most);
      made.shared_bytes = resident_bytes(member_share(kv_len, made.cluster), weight_bytes);
      made.most_shared_bytes = resident_bytes(most, weight_bytes);
    } else if (made.way == select_way::scored) {
      made.cluster = scored_cluster(groups, kv_len);
      made.shared_bytes = scored_bytes(member_share(kv_len, made.cluster));
      made.most_shared_bytes = scored_bytes(most_scores());
    } else {
      while (made.cluster < device_.largest_cluster && groups * made.cluster * 2 <= 3 * device_.multiprocessors)
        made.cluster *= 2;
    }
    return made;
  }

 private:
  /// A CTA's share of a row: so large that a Hopper multiprocessor holds three CTAs, or that one fits elsewhere.
  static constexpr std::ptrdiff_t most_share = 16384;  ///< of floats; twice as many of 16 bits
  static_assert(2 * most_share == row_most_share);
  static std::size_t resident_bytes(std::ptrdiff_t share, std::size_t weight_bytes) {
    const std::size_t keys = static_cast<std::size_t>(share) * weight_bytes;
    const std::size_t search =
        sizeof(select_team_memory) + static_cast<std::size_t>(share) / 4;  // two bits a position
    return keys > search ? keys : search;
  }

  /// Scores of a CTA: three fit a Hopper multiprocessor. Twice as many are held where nothing else would do and a CTA may
  /// have the 102 KB they take, which it may not on devices of compute capability 12.
  static constexpr std::ptrdiff_t few_scores = 4096;
  static_assert(2 * few_scores <= held_row<float>::most);
  static std::size_t scored_bytes(std::ptrdiff_t share) {
    return static_cast<std::size_t>(share) * sizeof(std::uint64_t) + static_cast<std::size_t>(share) / 4;
  }
  std::ptrdiff_t most_scores() const {
    const auto fit = [&](std::ptrdiff_t scores) {
      return static_shared_bytes(sizeof(select_team_memory)) + scored_bytes(scores) <= device_.block_shared_bytes;
    };
    if (device_.largest_cluster > 1 && fit(2 * few_scores)) return 2 * few_scores;
    return fit(few_scores) ? few_scores : 0;
  }
  int scored_cluster(std::ptrdiff_t groups, std::ptrdiff_t kv_len) const {
    int cluster = 1;
    while (cluster < device_.largest_cluster &&
           (kv_len > cluster * few_scores || groups * cluster * 2 <= 3 * device_.multiprocessors))
      cluster *= 2;
    return cluster;
  }

  /// Three CTAs of a full share fit a Hopper multiprocessor, of half a share four.
  std::ptrdiff_t ctas_at_once(std::ptrdiff_t share, std::ptrdiff_t most) const {
    return std::ptrdiff_t{share > most / 2 ? 3 : 4} * device_.multiprocessors;
  }
  /// The cluster that should take the least time, the smallest of several: a multiprocessor takes as long for a CTA as
  /// for its share and 2304 more positions, and a wave of CTAs does not end before a lone one would, which takes as long
  /// as for 16384 more. (Fitted to an H100.)
  int resident_cluster(std::ptrdiff_t groups, std::ptrdiff_t kv_len, std::ptrdiff_t most) const {
    int best = 0;
    std::ptrdiff_t least = 0;
    for (int cluster = 1; cluster <= device_.largest_cluster; cluster *= 2) {
      const std::ptrdiff_t share = member_share(kv_len, cluster);
      if (share > most) continue;
      const std::ptrdiff_t positions = share > 8192 ? share : 8192;  // fewer pay for no larger cluster
      const std::ptrdiff_t each = (groups * cluster + device_.multiprocessors - 1) / device_.multiprocessors;
      const std::ptrdiff_t waves = (groups * cluster - 1) / ctas_at_once(share, most) + 1;
      const std::ptrdiff_t time = each * (2304 + positions) + waves * (16384 + positions);
      if (best != 0 && time >= least) continue;
      best = cluster;
      least = time;
    }
    return best;
  }

  select_device device_;
};

}  // namespace specattn::inline SPECATTN_CODE::detail
