// attend() over fp8_e4m3 on the CPU.
#include "cpu_fixture.hpp"
#include "specattn/cpu/attend.hpp"
#include "specattn/cpu/kv_cache.hpp"

struct attend_fixture : cpu_fixture {
  using cpu_fixture::cpu_fixture;
  template <class T>
  static constexpr double tolerance = 2e-5;
};

#include "attend/fp8_cases.hpp"
