// attend() over fp8_e4m3 on the device: the CPU's cases, and long passes beside the CPU's.
#include "specattn/cuda/attend.cuh"

#include "cpu_fixture.hpp"
#include "cuda_fixture.cuh"
#include "specattn/cpu/attend.hpp"
#include "specattn/cpu/kv_cache.hpp"
#include "specattn/cuda/kv_cache.cuh"

struct attend_fixture : cuda_fixture {
  template <class T>
  static constexpr double tolerance = 2e-5;
};

#include "attend/fp8_cases.hpp"

namespace attend_testing {

TEST_CASE("attend over fp8 on the device: long ragged batches, dense, listed and mixed, agree with the CPU") {
  attend_fixture fixture;
  cpu_fixture cpu(8);
  for (const auto& [group, head_dim] : {std::pair{4, 128}, {8, 64}, {1, 128}, {2, 256}, {4, 96}, {8, 32}, {7, 24}}) {
    CAPTURE(group);
    CAPTURE(head_dim);
    pass_shape shape;
    shape.kv_lens = {20000, 3, 7001, 0, 640, 1};
    shape.slots = {6, 6, 1, 2, 0, 9};
    shape.group = group;
    shape.head_dim = head_dim;
    shape.page_size = group % 2 == 0 ? 16 : 0;
    auto p = random_problem<fp8_e4m3>(shape);
    p.record = true;
    for (const bool listed : {false, true}) {
      if (listed) keep_random(p, 0.22);
      const answer want = run(cpu, p), got = run(fixture, p);
      const auto difference = [](const std::vector<float>& a, const std::vector<float>& b) {
        double largest = a.size() == b.size() ? 0.0 : 1e30;
        for (std::size_t i = 0; i < a.size() && i < b.size(); ++i) {
          const double d = std::abs(double{a[i]} - double{b[i]});
          if (!(d <= largest)) largest = d >= 0 ? d : 1e30;
        }
        return largest;
      };
      CHECK(difference(want.out, got.out) < attend_fixture::tolerance<fp8_e4m3>);
      CHECK(difference(want.lse, got.lse) < attend_fixture::tolerance<fp8_e4m3>);
      CHECK(difference(want.weights, got.weights) < attend_fixture::tolerance<fp8_e4m3>);
    }
  }
}

}  // namespace attend_testing
