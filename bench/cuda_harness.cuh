// What every CUDA benchmark shares: graph replays less an empty node, cold or warm, and the copy bandwidth of the run.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "specattn/cuda/context.cuh"

namespace bench {

inline void check(cudaError_t status) { specattn::detail::check_cuda(status, "bench"); }

static __global__ void empty_kernel() {}

/// Says so where there is no device; a program that measures then returns `skipped`.
inline bool no_device() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return false;
  std::fprintf(stderr, "SKIPPED: no CUDA device\n");
  return true;
}
inline constexpr int skipped = 77;  // as ctest knows it

/// Random bits, always the same for the same numbers.
__device__ inline std::uint64_t random_bits(std::uint64_t i, std::uint64_t seed) {
  std::uint64_t x = (i + 1) * 0x9e3779b97f4a7c15u + seed * 0xd1342543de82ef95u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
/// A number of N(0, 1).
__device__ inline float normal(std::uint64_t i, std::uint64_t seed) {
  const std::uint64_t x = random_bits(i, seed);
  const float u = (static_cast<float>(x >> 40) + 0.5f) * 0x1p-24f;
  return sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * static_cast<float>(x & 0xffffffu) * 0x1p-24f);
}

/// Device times of one operation, in microseconds.
class device_clock {
 public:
  explicit device_clock(cudaStream_t stream) : stream_(stream) {
    check(cudaEventCreate(&begin_));
    check(cudaEventCreate(&end_));
    empty_us_ = replay([&](int) { empty_kernel<<<1, 1, 0, stream_>>>(); }, 100);
  }
  ~device_clock() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  double empty_us() const { return empty_us_; }

  /// Median over replays of a graph of `nodes` calls launch(0), launch(1), …, less an empty node.
  double net_us(const std::function<void(int)>& launch, int nodes) { return replay(launch, nodes) - empty_us_; }

  /// For what cannot be captured: median over turns of `calls` plain calls between two events, the host's part included.
  double stream_us(const std::function<void(int)>& launch, int calls) {
    return median_us(calls, [&] {
      for (int i = 0; i < calls; ++i) launch(i);
    });
  }

 private:
  double replay(const std::function<void(int)>& launch, int nodes) {
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < nodes; ++i) launch(i);
    check(cudaStreamEndCapture(stream_, &graph));
    check(cudaGraphInstantiate(&ready, graph, 0));
    const double us = median_us(nodes, [&] { check(cudaGraphLaunch(ready, stream_)); });
    check(cudaGraphExecDestroy(ready));
    check(cudaGraphDestroy(graph));
    return us;
  }

  /// Of one of the `parts` equal parts of `enqueue`, over ten turns.
  double median_us(int parts, const std::function<void()>& enqueue) {
    std::vector<double> times;
    for (int turn = 0; turn < 12; ++turn) {
      check(cudaEventRecord(begin_, stream_));
      enqueue();
      check(cudaEventRecord(end_, stream_));
      check(cudaEventSynchronize(end_));
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin_, end_));
      if (turn >= 2) times.push_back(1e3 * static_cast<double>(ms) / parts);  // the first two warm up
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
  double empty_us_ = 0;
};

/// Reads plus writes of a large device copy, in GB/s. Not in a graph: there a copy is left to a copy engine, which
/// reaches two thirds of this on an H200.
inline double copy_bandwidth(device_clock& clock, cudaStream_t stream) {
  const std::size_t bytes = std::size_t{1} << 30;
  specattn::buffer<std::byte, specattn::cuda> from(bytes), to(bytes);
  const double us = clock.stream_us(
      [&](int) { check(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream)); }, 5);
  return 2e-3 * static_cast<double>(bytes) / us;
}

inline void print_device() {
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0));
  int runtime = 0;
  check(cudaRuntimeGetVersion(&runtime));
  std::printf("device: %s, %d SMs, L2 %d MiB, CUDA runtime %d.%d\n", device.name, device.multiProcessorCount,
              device.l2CacheSize >> 20, runtime / 1000, runtime % 1000 / 10);
}

/// What a benchmark's main begins with, the device's line printed. `--smoke` as the first argument measures no bandwidth.
struct opened_device {
  opened_device(int argc, char** argv) : smoke(argc > 1 && std::strcmp(argv[1], "--smoke") == 0) {
    print_device();
    if (!smoke) copy_gb_s = copy_bandwidth(clock, ctx.stream());
  }

  bool smoke;
  specattn::context<specattn::cuda> ctx{new_stream()};
  device_clock clock{ctx.stream()};
  double copy_gb_s = 1;

 private:
  static cudaStream_t new_stream() {
    cudaStream_t stream;
    check(cudaStreamCreate(&stream));
    return stream;
  }
};

}  // namespace bench
