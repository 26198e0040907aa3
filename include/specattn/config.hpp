// SpecAttn: the version, the compiler floor and the one annotation macro. Includes nothing.
#pragma once

#define SPECATTN_VERSION_MAJOR 0
#define SPECATTN_VERSION_MINOR 1
#define SPECATTN_VERSION_PATCH 0

#if (defined(_MSVC_LANG) ? _MSVC_LANG : __cplusplus) < 202002L
#error "SpecAttn needs C++20: set CXX_STANDARD 20 (and CUDA_STANDARD 20 for .cu files) on this target"
#endif

/// Marks a function that host and device code share.
#if defined(__CUDACC__)
#define SPECATTN_HD __host__ __device__
#else
#define SPECATTN_HD
#endif

/// Every name lives in an inline namespace that carries the version, so that two copies of the library of
/// different versions can be linked into one process.
namespace specattn {
inline namespace v0_1 {}
}  // namespace specattn
