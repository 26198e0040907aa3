// attend() over masked unions on the CPU.
#include "specattn/cpu/attend.hpp"

#include "cpu_fixture.hpp"
#include "specattn/cpu/kv_cache.hpp"

struct attend_fixture : cpu_fixture {
  template <class T>
  static constexpr double tolerance = 2e-5;
};

#include "attend/mask_cases.hpp"

namespace attend_testing {

TEST_CASE("attend over masks: more slots than a word has bits are refused, and fit where the head is dense") {
  cpu_fixture fixture;
  pass_shape shape;
  shape.kv_lens = {20};
  shape.slots = {33};
  auto p = random_problem<float>(shape);
  keep_random(p, 0.5);
  mask_all(p, ~0u);
  CHECK_THROWS_WITH_AS(run(fixture, p), "attend: sequence 0 has 33 slots, a word of slot_masks 32",
                       specattn::contract_error);
  p.all.assign(1, std::vector<bool>(2, true));
  CHECK_NOTHROW(run(fixture, p));
}

}  // namespace attend_testing
