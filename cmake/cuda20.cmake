# CMake before 3.26 knows no C++20 dialect for nvcc and stops at generate time, with 'requires the language dialect
# "CUDA20"', as soon as a target with a .cu file links a C++20 library. This teaches it. Include it after the CUDA
# language is enabled; the package config does so, and harmless repetition is the normal case.
#
# The two options are cached, so that they reach every directory of the build whichever of them asked for SpecAttn.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION AND CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA"
   AND CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.0)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20" CACHE INTERNAL "")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20" CACHE INTERNAL "")
endif()
if(CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" AND CMAKE_CUDA20_STANDARD_COMPILE_OPTION
   AND NOT "cuda_std_20" IN_LIST CMAKE_CUDA_COMPILE_FEATURES)
  set(CMAKE_CUDA20_COMPILE_FEATURES cuda_std_20)
  list(APPEND CMAKE_CUDA_COMPILE_FEATURES cuda_std_20)
endif()
