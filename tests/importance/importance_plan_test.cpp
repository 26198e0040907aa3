// What mix_importance() asks of devices that are not at hand.
#include <doctest/doctest.h>

#include <initializer_list>

#include "specattn/cuda/importance/plan.cuh"

using namespace specattn::detail;

TEST_CASE("importance plan: no device is asked for more shared memory than a CTA of it can have") {
  for (const int code_major : {8, 9, 10, 11, 12}) {
    for (const int room : {101376, 166912, 232448}) {  // 99, 163 and 227 KB
      for (const int slabs : {1, 2, 9}) {
        for (const int steps : {1, 4}) {
          CAPTURE(code_major);
          CAPTURE(room);
          const importance_plan plan = plan_importance(code_major, room, slabs, steps);
          CHECK(plan.shared_bytes > 0);
          CHECK(plan.shared_bytes <= room);
          CHECK(plan.stages >= importance_stages_before_hopper);
        }
      }
    }
  }
}

TEST_CASE("importance plan: Hopper uses all it has, compute capability 12 two stages, older code its own two") {
  constexpr int hopper = 232448, consumer = 101376;
  CHECK(plan_importance(9, hopper, 1, 1).straight);
  CHECK(plan_importance(9, hopper, 1, 1).shared_bytes == row_shared_bytes);
  CHECK_FALSE(plan_importance(9, hopper, 2, 1).straight);
  CHECK_FALSE(plan_importance(9, hopper, 1, 2).straight);
  CHECK(plan_importance(9, hopper, 2, 1).stages == 4);
  CHECK_FALSE(plan_importance(12, consumer, 1, 1).straight);
  CHECK(plan_importance(12, consumer, 1, 1).stages == 2);
  CHECK(plan_importance(12, consumer, 1, 1).shared_bytes == stage_ring_bytes(2));
  CHECK(plan_importance(8, hopper, 1, 1).shared_bytes == 2 * importance_stage_bytes);
}
