// attend() over masked unions on the device.
#include "specattn/cuda/attend.cuh"

#include "cuda_fixture.cuh"
#include "specattn/cuda/kv_cache.cuh"

struct attend_fixture : cuda_fixture {
  template <class T>
  static constexpr double tolerance = std::is_same_v<T, specattn::bf16> ? 1e-4 : 2e-5;
};

#include "attend/mask_cases.hpp"
