// What a CUDA user includes: the core and the device's specialisations. Needs nvcc and the toolkit's CUB.
#pragma once

#if !defined(__CUDACC__)
#error \
    "specattn/cuda.cuh holds device code: compile this file with nvcc (a name in .cu, or the CMake property LANGUAGE CUDA)"
#else
#include "cuda/alignment.cuh"
#include "cuda/attend.cuh"
#include "cuda/context.cuh"
#include "cuda/decode.cuh"
#include "cuda/draft_guide.cuh"
#include "cuda/importance.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/mask_union.cuh"
#include "cuda/recompute.cuh"
#include "cuda/select.cuh"
#include "cuda/verify.cuh"
#include "decode_memory.hpp"
#include "renamed.hpp"
#endif
