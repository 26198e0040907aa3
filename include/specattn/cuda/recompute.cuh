// recompute() and recompute_steps() on the device.
#pragma once

#include "recompute/pass.cuh"
#include "recompute/steps.cuh"
