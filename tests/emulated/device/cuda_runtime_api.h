// A stand-in for the CUDA runtime on machines without a GPU: kernels run on the CPU, so that their logic is tested where
// they cannot run. A CTA is a system thread and its threads are fibers, switched at every synchronisation, shuffle and
// vote; the CTAs of a cluster run at once and reach each other's shared memory. It shows neither races inside a CTA nor
// times, and it is no proof for a device: the real tests are the *_test.cu.
#pragma once

#include <ucontext.h>
#include <csetjmp>

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __CUDACC__ 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local

// ---- the runtime --------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = void*;
inline constexpr unsigned cudaStreamNonBlocking = 1;
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : 232448;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

// ---- a CTA --------------------------------------------------------------------------------------------------

namespace emulated {

struct meeting {
  int members = 0;
  int arrived = 0;
  long generation = 0;
};

struct fiber {
  ucontext_t start;
  std::jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false;
  bool live = true;
};

struct cta {
  std::function<void()> body;
  std::vector<fiber> fibers;
  std::jmp_buf home;
  int current = 0;
  meeting block;
  std::vector<meeting> warps;
  std::vector<std::uint64_t> exchange;
  unsigned index = 0, rank = 0, size = 1;
  dim3 grid, at;
  std::barrier<>* cluster = nullptr;
  char** anchors = nullptr;  ///< an address in each CTA's shared memory
};

inline thread_local cta* here = nullptr;
inline thread_local char anchor = 0;

inline void yield() {
  cta& c = *here;
  if (_setjmp(c.fibers[static_cast<std::size_t>(c.current)].resume) == 0) _longjmp(c.home, 1);
}
inline void leave(meeting& m) {
  if (m.arrived < --m.members || m.members == 0) return;
  m.arrived = 0;
  ++m.generation;
}
inline void meet(meeting& m) {
  const long generation = m.generation;
  if (++m.arrived == m.members) {
    m.arrived = 0;
    ++m.generation;
    return;
  }
  while (m.generation == generation) yield();
}
inline int lane() { return here->current % 32; }
inline meeting& warp() { return here->warps[static_cast<std::size_t>(here->current / 32)]; }

inline void enter() {
  here->body();
  here->fibers[static_cast<std::size_t>(here->current)].live = false;
  leave(warp());
  leave(here->block);
  _longjmp(here->home, 1);
}

/// Lets the current fiber go on to its next meeting.
[[gnu::noinline]] inline void resume(cta& c) {
  fiber& f = c.fibers[static_cast<std::size_t>(c.current)];
  if (_setjmp(c.home) != 0) return;
  if (f.started) _longjmp(f.resume, 1);
  f.started = true;
  setcontext(&f.start);
}

inline void run(cta& c, int threads) {
  here = &c;
  c.fibers.resize(static_cast<std::size_t>(threads));
  c.exchange.resize(c.fibers.size());
  c.block.members = threads;
  c.warps.resize(c.fibers.size() / 32);
  for (meeting& m : c.warps) m.members = 32;
  constexpr std::size_t stack_bytes = 64 << 10;
  for (fiber& f : c.fibers) {
    f.stack.reset(new char[stack_bytes]);
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = stack_bytes;
    makecontext(&f.start, enter, 0);
  }
  while (c.block.members > 0) {
    for (c.current = 0; c.current < threads; ++c.current) {
      if (c.fibers[static_cast<std::size_t>(c.current)].live) resume(c);
    }
  }
}

inline void meet_cluster() {
  meet(here->block);
  if (here->size > 1 && here->current == 0) here->cluster->arrive_and_wait();
  meet(here->block);
}

/// What `lane` of this warp has given.
template <class T>
T from_lane(T x, int lane_wanted) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  const std::size_t first = static_cast<std::size_t>(here->current / 32 * 32);
  std::memcpy(&here->exchange[static_cast<std::size_t>(here->current)], &x, sizeof x);
  meet(warp());
  std::memcpy(&x, &here->exchange[first + static_cast<std::size_t>(lane_wanted)], sizeof x);
  meet(warp());
  return x;
}
template <class Op>
unsigned over_warp(unsigned x, Op op) {
  for (int distance = 16; distance > 0; distance /= 2) x = op(x, from_lane(x, lane() ^ distance));
  return x;
}

}  // namespace emulated

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  unsigned size = 1;
  for (int i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) size = config->attrs[i].val.clusterDim.x;
  }
  const dim3 grid = config->gridDim;
  const std::size_t rows = std::size_t{grid.y} * grid.z;
  for (std::size_t turn = 0; turn < grid.x / size * rows; ++turn) {
    const auto first = static_cast<unsigned>(turn / rows) * size, row = static_cast<unsigned>(turn % rows);
    std::barrier<> together(size);
    std::vector<char*> anchors(size);
    std::vector<std::thread> ctas;
    for (unsigned rank = 0; rank < size; ++rank) {
      ctas.emplace_back([&, rank] {
        emulated::cta c;
        c.body = [&] { kernel(arguments...); };
        c.index = first + rank;
        c.rank = rank;
        c.size = size;
        c.grid = grid;
        c.at = {first + rank, row % grid.y, row / grid.y};
        c.cluster = &together;
        c.anchors = anchors.data();
        anchors[rank] = &emulated::anchor;
        together.arrive_and_wait();
        emulated::run(c, static_cast<int>(config->blockDim.x));
        together.arrive_and_wait();  // a peer may still read this CTA's memory
      });
    }
    for (std::thread& each : ctas) each.join();
  }
  return cudaSuccess;
}

// ---- device code --------------------------------------------------------------------------------------------

inline struct {
  struct {
    operator unsigned() const { return static_cast<unsigned>(emulated::here->current); }
  } x;
} threadIdx;
#define blockIdx (emulated::here->at)
inline struct {
  struct {
    operator unsigned() const { return emulated::here->grid.x; }
  } x;
  struct {
    operator unsigned() const { return emulated::here->grid.y; }
  } y;
  struct {
    operator unsigned() const { return emulated::here->grid.z; }
  } z;
} gridDim;

inline void __syncthreads() { emulated::meet(emulated::here->block); }
inline void __syncwarp() { emulated::meet(emulated::warp()); }
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulated::from_lane(x, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulated::from_lane(x, emulated::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int distance) {
  return emulated::from_lane(x, emulated::lane() >= distance ? emulated::lane() - distance : emulated::lane());
}
inline unsigned __reduce_add_sync(unsigned, unsigned x) { return emulated::over_warp(x, std::plus<unsigned>{}); }
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  return emulated::over_warp(x, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
  return emulated::over_warp(x, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return emulated::over_warp(vote ? 1u << emulated::lane() : 0u, std::bit_or<unsigned>{});
}
inline int __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }

template <class T, class U>
T atomicAdd(T* sum, U x) {
  const T old = *sum;
  *sum += static_cast<T>(x);
  return old;
}
inline unsigned atomicOr(unsigned* bits, unsigned x) {
  const unsigned old = *bits;
  *bits |= x;
  return old;
}
inline unsigned atomicMax(unsigned* most, unsigned x) {
  const unsigned old = *most;
  *most = x > old ? x : old;
  return old;
}
inline unsigned atomicMin(unsigned* least, unsigned x) {
  const unsigned old = *least;
  *least = x < old ? x : old;
  return old;
}

inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __vimax3_u32(unsigned a, unsigned b, unsigned c) { return a > b ? (a > c ? a : c) : (b > c ? b : c); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
