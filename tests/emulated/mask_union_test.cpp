// The device's mask_union() on the CPU: its cases, and random batches against the CPU's unions.
#include "specattn/cuda/mask_union.cuh"

#include "cpu_fixture.hpp"
#include "cuda_fixture.cuh"

using mask_union_fixture = cuda_fixture;

#include "mask_union/cases.hpp"
#include "mask_union/device_cases.hpp"

namespace mask_union_testing {

TEST_CASE("mask_union, emulated: random batches give the CPU's unions, on clusters and on lone CTAs") {
  cuda_fixture fixture;
  cpu_fixture cpu;
  expect_cpus(fixture, cpu, 12, 3, 300);
  expect_cpus(fixture, cpu, 4, 2, 9000);
  expect_cpus(fixture, cpu, 1, 110, 5000);
  expect_cpus(fixture, cpu, 1, 400, 40);
}

}  // namespace mask_union_testing
