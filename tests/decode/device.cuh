// The toy models of decode_testing's shapes on the device, for the decoding loop's tests there.
#pragma once

#include "cuda_fixture.cuh"
#include "decode/problem.hpp"
#include "decode/toy_model.cuh"

struct decode_device {
  using backend = specattn::cuda;
  cuda_fixture device;
  specattn::context<specattn::cuda>& ctx = device.context();
  toy::model host_target{7, decode_testing::target_shape};
  toy::model host_draft{7, decode_testing::draft_shape, 0.15f};
  toy::device_model target{host_target};
  toy::device_model draft{host_draft};
};
