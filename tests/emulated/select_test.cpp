// The device's select() on the CPU: its cases, and rows on one CTA and on a cluster against the CPU's lists.
#include "specattn/cuda/select.cuh"

#include "cpu_fixture.hpp"
#include "cuda_fixture.cuh"
#include "specattn/cpu/select.hpp"

using select_fixture = cuda_fixture;

#include "select_cases.hpp"
#include "select_device_cases.hpp"
#include "select_group_cases.hpp"

namespace specattn::inline v0_1::detail {
thread_local uint4 member_memory[4608];  // a CTA's dynamic shared memory: keys of its part of a row, or scores
}

namespace select_testing {

TEST_CASE("select, emulated: rows of every kind, on one CTA and on a cluster, give the CPU's lists") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  std::mt19937 random(57);
  for (const std::ptrdiff_t length : {700, 5000, 16384, 40000, 131072}) {
    for (const float top_p : {0.5f, 0.95f}) {
      specattn::selection_rule rule;
      rule.top_p = top_p;
      if (length == 16384) rule.recent = 2000;
      auto p = dense_problem<float>(6, 1, length, rule);
      fill_kinds(p, random);
      same_as_cpu(fixture, cpu, p);
    }
  }
}

}  // namespace select_testing
