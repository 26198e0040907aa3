// context<cuda>: a stream and a workspace. buffer<T, cuda>: device memory. Every call to the runtime is checked here.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "../backend.hpp"
#include "../buffer.hpp"
#include "../error.hpp"
#include "../view.hpp"

namespace specattn::inline v0_1 {

namespace detail {
/// Throws device_error naming the operation unless a runtime call succeeded.
inline void check_cuda(cudaError_t status, const char* operation) {
  if (status == cudaSuccess) [[likely]]
    return;
  raise<device_error>(std::string(operation) + ": " + cudaGetErrorString(status));
}

/// Tells what the program's device code was compiled for; never launched.
template <class = void>
__global__ void compiled_for_probe() {}
}  // namespace detail

/// Elements in device memory, zeroed. Making one waits for the device.
template <class T>
class buffer<T, cuda> {
  static_assert(std::is_trivially_copyable_v<T>, "a specattn::buffer holds trivially copyable elements only");

 public:
  buffer() = default;
  /// \throws device_error when the device has no room
  explicit buffer(std::size_t size) : size_(size) {
    if (size == 0) return;
    detail::expects(size <= static_cast<std::size_t>(PTRDIFF_MAX) / sizeof(T), "buffer: ", size, " elements of ",
                    sizeof(T), " bytes do not fit the address space");
    void* memory = nullptr;
    detail::check_cuda(cudaMalloc(&memory, bytes()), "buffer");
    data_ = static_cast<T*>(memory);
    detail::check_cuda(cudaMemset(memory, 0, bytes()), "buffer");
    detail::check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "buffer");  // non-blocking streams would not wait
  }
  buffer(buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  buffer& operator=(buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  buffer(const buffer&) = delete;
  buffer& operator=(const buffer&) = delete;
  ~buffer() {
    if (data_ != nullptr) static_cast<void>(cudaFree(data_));  // nobody to tell in a destructor
  }

  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  std::size_t bytes() const { return size_ * sizeof(T); }

  /// The first product(extents) elements, shaped. Throws contract_error when the buffer holds fewer.
  template <std::size_t Rank>
  view<T, static_cast<int>(Rank), cuda> shaped(const std::ptrdiff_t (&extents)[Rank]) const {
    return detail::shape_buffer<cuda>(data_, size_, extents);
  }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Work goes to `stream` of the device that is current when the context is made, and stays asynchronous: results
/// may be read when the stream has come that far. One context's operations share one workspace, so they must stay on
/// one stream; other streams need contexts of their own.
template <>
class context<cuda> {
 public:
  /// \param stream          owned by the caller; the default stream cannot be captured in a graph
  /// \param workspace_bytes memory for the operations' scratch: the largest of their …_workspace_bytes()
  /// \throws device_error without a usable GPU
  explicit context(cudaStream_t stream = nullptr, std::size_t workspace_bytes = 0)
      : stream_(stream), workspace_(workspace_bytes) {
    int device = 0;
    detail::check_cuda(cudaGetDevice(&device), "context");
    cudaFuncAttributes probe{};
    detail::check_cuda(cudaFuncGetAttributes(&probe, detail::compiled_for_probe<>), "context");
    code_major_ = probe.ptxVersion / 10;
    detail::check_cuda(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device), "context");
    detail::check_cuda(cudaDeviceGetAttribute(&block_shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                       "context");
  }

  cudaStream_t stream() const { return stream_; }
  /// Of the compute capability that the code which runs here was compiled for: 9 for Hopper. It can be lower than the
  /// device's: a driver translates code for older devices, which then knows no clusters.
  int code_major() const { return code_major_; }
  int multiprocessors() const { return multiprocessors_; }
  /// The most shared memory that one CTA can have.
  int block_shared_bytes() const { return block_shared_bytes_; }

  std::size_t workspace_bytes() const { return workspace_.size(); }
  /// Allocates a workspace of at least `bytes`, waiting for the device if an old one must go; what it held is lost.
  /// Never inside a graph's capture.
  void reserve_workspace(std::size_t bytes) {
    if (bytes > workspace_.size()) workspace_ = buffer<std::byte, cuda>(bytes);
  }
  /// The workspace. Throws contract_error when it holds fewer than `bytes`.
  std::byte* workspace(std::size_t bytes, const char* operation) {
    detail::expects(bytes <= workspace_.size(), operation, ": needs a workspace of ", bytes,
                    " bytes, the context has ", workspace_.size());
    return workspace_.data();
  }

 private:
  cudaStream_t stream_ = nullptr;
  buffer<std::byte, cuda> workspace_;
  int code_major_ = 0;
  int multiprocessors_ = 0;
  int block_shared_bytes_ = 0;
};

}  // namespace specattn::inline v0_1
