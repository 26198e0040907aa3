# What holds for this repository's own tests, examples and benchmarks, and only when it is the top-level project:
# nothing here reaches a consumer.

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug, Release or RelWithDebInfo" FORCE)
endif()
if(NOT CMAKE_RUNTIME_OUTPUT_DIRECTORY)
  set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bin)
endif()
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_EXTENSIONS OFF)

# CUDA: AUTO takes a working nvcc from CUDACXX, PATH or /usr/local/cuda.
set(SPECATTN_CUDA_ENABLED OFF)
if(NOT SPECATTN_CUDA STREQUAL "OFF")
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(SPECATTN_NVCC nvcc PATHS /usr/local/cuda/bin DOC "nvcc, where SPECATTN_CUDA allows it")
    mark_as_advanced(SPECATTN_NVCC)
    if(SPECATTN_NVCC)
      set(ENV{CUDACXX} ${SPECATTN_NVCC})
    endif()
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
      set(CMAKE_CUDA_ARCHITECTURES "80;90a" CACHE STRING "GPU architectures")
    endif()
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(CMAKE_CUDA_STANDARD 20)
    # nvcc's level is the host code's alone (the device's is always 3), which launches kernels and checks results: at -O3
    # it takes more than half of the time of a file of tests.
    string(REPLACE "-O3" "-O1" CMAKE_CUDA_FLAGS_RELEASE "${CMAKE_CUDA_FLAGS_RELEASE}")
    set(SPECATTN_CUDA_ENABLED ON)
  elseif(SPECATTN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SPECATTN_CUDA=ON, but no working CUDA compiler was found: put nvcc on PATH or set CUDACXX")
  else()
    message(STATUS "No CUDA compiler: the CPU part only (SPECATTN_CUDA=ON makes this an error)")
  endif()
endif()

add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow>"
                    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wshadow>")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # False on "text" + string (GCC bug 105651) and inside AVX-512 intrinsics (GCC bug 105593).
  add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict;-Wno-maybe-uninitialized>")
endif()

if(SPECATTN_NATIVE)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-march=native SPECATTN_HAS_MARCH_NATIVE)
  if(SPECATTN_HAS_MARCH_NATIVE)
    # Host code of .cu files too: what of the library depends on the CPU carries it in its names, and files of both kinds
    # share contexts here.
    add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-march=native>" "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-march=native>")
  endif()
endif()

if(SPECATTN_SANITIZE)
  set(flags -fsanitize=${SPECATTN_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  if(SPECATTN_SANITIZE MATCHES "address.*undefined")
    list(APPEND flags -fno-sanitize=null,object-size,vptr) # the address sanitizer reports these, too; a third of the time
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND flags -fira-region=one) # instrumented functions are long: a sixth of the time, for slower code
  endif()
  add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:${flags}>")
  add_link_options(-fsanitize=${SPECATTN_SANITIZE})
endif()

find_program(SPECATTN_CLANG_FORMAT NAMES clang-format-14 clang-format)
mark_as_advanced(SPECATTN_CLANG_FORMAT)
if(SPECATTN_CLANG_FORMAT)
  add_custom_target(format COMMAND ${CMAKE_COMMAND} -D CLANG_FORMAT=${SPECATTN_CLANG_FORMAT} -D APPLY=ON
                                   -P ${PROJECT_SOURCE_DIR}/tests/lint/format.cmake)
endif()
