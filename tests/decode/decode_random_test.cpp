// The decoding loop under random options, on the CPU, for half a minute.
#include <doctest/doctest.h>

#include "decode/problem.hpp"
#include "decode/toy_model.hpp"
#include "specattn/specattn.hpp"

struct decode_fixture {
  using backend = specattn::cpu;
  static constexpr double seconds = 20.0;
  specattn::context<specattn::cpu> ctx{1};
  toy::model target{7, decode_testing::target_shape};
  toy::model draft{7, decode_testing::draft_shape, 0.15f};
};

#include "decode/random_cases.hpp"
