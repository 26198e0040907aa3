// The loop on the device: decoder<T, Target, Draft, Guide, cuda>, whose rounds are captured graphs.
#pragma once

#include "../decode.hpp"
#include "round.cuh"
