// A captured piece of work, pinned memory and events, each freed with its object.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "../context.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

/// A graph that can be launched. Move-only.
class captured_graph {
 public:
  captured_graph() = default;
  /// Captures what `queue()` puts on the stream. An exception ends the capture and passes on.
  template <class Queue>
  captured_graph(cudaStream_t stream, Queue&& queue) {
    recorder work(stream);
    queue();
    work.end();
    check_cuda(cudaGraphInstantiate(&executable_, work.graph, 0), "decode: capture");
  }
  captured_graph(captured_graph&& other) noexcept : executable_(std::exchange(other.executable_, nullptr)) {}
  captured_graph& operator=(captured_graph&& other) noexcept {
    std::swap(executable_, other.executable_);
    return *this;
  }
  captured_graph(const captured_graph&) = delete;
  captured_graph& operator=(const captured_graph&) = delete;
  ~captured_graph() {
    if (executable_ != nullptr) drop_error(cudaGraphExecDestroy(executable_));
  }

  void launch(cudaStream_t stream) const { check_cuda(cudaGraphLaunch(executable_, stream), "decode: launch"); }

 private:
  /// Ends the capture however the block is left.
  struct recorder {
    explicit recorder(cudaStream_t on) : stream(on) {
      check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "decode: capture");
      open = true;
    }
    recorder(const recorder&) = delete;
    recorder& operator=(const recorder&) = delete;
    ~recorder() {
      if (open) {
        drop_error(cudaStreamEndCapture(stream, &graph));
      }
      if (graph != nullptr) drop_error(cudaGraphDestroy(graph));
    }
    void end() {
      open = false;
      check_cuda(cudaStreamEndCapture(stream, &graph), "decode: capture");
    }

    cudaStream_t stream;
    cudaGraph_t graph = nullptr;
    bool open = false;
  };

  cudaGraphExec_t executable_ = nullptr;
};

/// Host memory that copies need not stage. Move-only, zeroed.
template <class T>
class pinned_buffer {
 public:
  pinned_buffer() = default;
  explicit pinned_buffer(std::size_t size) : size_(size) {
    if (size == 0) return;
    const relaxed_capture relaxed;
    check_cuda(cudaMallocHost(reinterpret_cast<void**>(&data_), size * sizeof(T)), "pinned_buffer");
    for (std::size_t i = 0; i < size; ++i) data_[i] = T{};
  }
  pinned_buffer(pinned_buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  pinned_buffer& operator=(pinned_buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  pinned_buffer(const pinned_buffer&) = delete;
  pinned_buffer& operator=(const pinned_buffer&) = delete;
  ~pinned_buffer() {
    if (data_ == nullptr) return;
    const relaxed_capture relaxed;
    drop_error(cudaFreeHost(data_));
  }

  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

/// A point in a stream's time. Move-only.
class timing_event {
 public:
  timing_event() { check_cuda(cudaEventCreate(&event_), "timing_event"); }
  timing_event(timing_event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  timing_event& operator=(timing_event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  timing_event(const timing_event&) = delete;
  timing_event& operator=(const timing_event&) = delete;
  ~timing_event() {
    if (event_ != nullptr) drop_error(cudaEventDestroy(event_));
  }

  /// Inside a capture: each replay records it anew.
  void record(cudaStream_t stream) const {
    check_cuda(cudaEventRecordWithFlags(event_, stream, cudaEventRecordExternal), "timing_event");
  }
  double seconds_since(const timing_event& before) const {
    float milliseconds = 0.0f;
    check_cuda(cudaEventElapsedTime(&milliseconds, before.event_, event_), "timing_event");
    return milliseconds * 1e-3;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace specattn::inline SPECATTN_CODE::detail
