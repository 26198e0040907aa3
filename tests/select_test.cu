// select() on the device: the CPU's cases, and what only a device can get wrong.
#include "specattn/cuda/select.cuh"

#include <memory>

#include "cuda_fixture.cuh"
#include "specattn/cpu/select.hpp"

using select_fixture = cuda_fixture;

#include "select_cases.hpp"
#include "select_group_cases.hpp"
