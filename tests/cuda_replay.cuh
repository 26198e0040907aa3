// A captured graph of a test. Not in the fixture, which the emulated device takes too.
#pragma once

#include <cuda_runtime.h>

#include "cuda_fixture.cuh"

/// What queue() puts on the stream, to be launched again and again. An unsafe call while it is captured throws.
class cuda_replay {
 public:
  template <class Queue>
  cuda_replay(const cuda_fixture& fixture, Queue&& queue) : stream_(fixture.stream()) {
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    queue();
    check(cudaStreamEndCapture(stream_, &graph_));
    check(cudaGraphInstantiate(&ready_, graph_, 0));
  }
  cuda_replay(const cuda_replay&) = delete;
  cuda_replay& operator=(const cuda_replay&) = delete;
  ~cuda_replay() {
    cudaGraphExecDestroy(ready_);
    cudaGraphDestroy(graph_);
  }
  void launch() const { check(cudaGraphLaunch(ready_, stream_)); }

 private:
  static void check(cudaError_t status) { specattn::detail::check_cuda(status, "test"); }
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t ready_ = nullptr;
};
