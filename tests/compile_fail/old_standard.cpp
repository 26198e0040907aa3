// A target left at C++17 is told what to set.
// expect: SpecAttn needs C++20: set CXX_STANDARD 20 (and CUDA_STANDARD 20 for .cu files) on this target
// misuse-flags: -std=c++17
#include <specattn/config.hpp>
