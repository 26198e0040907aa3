// The decoding loop under random options, on the device.
#include "specattn/cuda/decode.cuh"

#include "decode/device.cuh"
#include "specattn/specattn.hpp"

struct decode_fixture : decode_device {
  static constexpr double seconds = 20.0;
};

#include "decode/random_cases.hpp"
