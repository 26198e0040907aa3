// The decoding loop under random options, on the device.
#include "specattn/cuda/decode.cuh"

#include "cuda_fixture.cuh"
#include "decode_problem.hpp"
#include "specattn/specattn.hpp"
#include "toy_model.cuh"

struct decode_fixture {
  using backend = specattn::cuda;
  static constexpr double seconds = 20.0;
  cuda_fixture device;
  specattn::context<specattn::cuda>& ctx = device.context();
  toy::model host_target{7, decode_testing::target_shape};
  toy::model host_draft{7, decode_testing::draft_shape, 0.15f};
  toy::device_model target{host_target};
  toy::device_model draft{host_draft};
};

#include "decode_random_cases.hpp"
