// SpecAttn: the version, the compiler floor and the one annotation macro. Includes nothing.
#pragma once

#define SPECATTN_VERSION_MAJOR 0
#define SPECATTN_VERSION_MINOR 1
#define SPECATTN_VERSION_PATCH 0

#if (defined(_MSVC_LANG) ? _MSVC_LANG : __cplusplus) < 202002L
#error "SpecAttn needs C++20: set CXX_STANDARD 20 (and CUDA_STANDARD 20 for .cu files) on this target"
#endif

// NaN logits are refused, masked scores are -inf, and rounding is done by adding and subtracting a large number.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0) || \
    defined(__ASSOCIATIVE_MATH__)
#error \
    "SpecAttn needs NaN, infinities and the order of sums: no -ffast-math or -Ofast (add -fno-fast-math to this target)"
#endif

/// Marks a function that host and device code share.
#if defined(__CUDACC__)
#define SPECATTN_HD __host__ __device__
#else
#define SPECATTN_HD
#endif

/// Every name lives in an inline namespace that carries the version, so that two copies of the library of different
/// versions can be linked into one process. All but plain data (options, counts, shapes, views, alignments, errors) lives
/// in another one inside it, which carries what the compiler may use of the CPU: a linker keeps one copy of a function's
/// name, and a file compiled for any CPU must not end up with the copy of a file compiled for AVX-512. Data has no such
/// name, so that files of different flags, such as .cu and .cpp files, can hand it to each other.
#define SPECATTN_DATA v0_1_0
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SPECATTN_CODE v0_1_0::inline isa_avx512
#elif defined(__AVX512F__)
#define SPECATTN_CODE v0_1_0::inline isa_avx512f
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SPECATTN_CODE v0_1_0::inline isa_avx2
#elif defined(__AVX__)
#define SPECATTN_CODE v0_1_0::inline isa_avx
#elif defined(__SSE4_1__)
#define SPECATTN_CODE v0_1_0::inline isa_sse4
#else
#define SPECATTN_CODE v0_1_0::inline isa_any
#endif
