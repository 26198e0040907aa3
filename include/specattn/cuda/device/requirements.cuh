// What device code needs, in one sentence: without it a file fails in many places, none of which says why.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error \
    "SpecAttn's kernels need compute capability 8.0: set CMAKE_CUDA_ARCHITECTURES to 80 or more (nvcc: -arch=sm_80), the default is lower"
#endif
