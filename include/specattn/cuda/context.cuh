// context<cuda>: a stream and a workspace. buffer<T, cuda>: device memory. Every call to the runtime is checked here.
#pragma once

#include "device/requirements.cuh"  // first

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

namespace specattn::inline SPECATTN_CODE {

namespace detail {
/// Throws device_error naming the operation unless a runtime call succeeded. What it tells is taken back from the runtime,
/// which would keep it for the next cudaGetLastError() of the program; what a broken device leaves stays. An error from
/// before a call of the library's that succeeds is the program's: calls are checked by what they return, so that it is
/// neither blamed on the library nor lost.
inline void check_cuda(cudaError_t status, const char* operation) {
  if (status == cudaSuccess) [[likely]]
    return;
  static_cast<void>(cudaGetLastError());
  raise<device_error>(std::string(operation) + ": " + cudaGetErrorString(status));
}
/// For destructors, which have nobody to tell.
inline void drop_error(cudaError_t status) {
  if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
}

/// Makes a device current for the calling thread, and puts back the one before.
class device_guard {
 public:
  explicit device_guard(int device) {
    check_cuda(cudaGetDevice(&before_), "device");
    changed_ = before_ != device;
    if (changed_) check_cuda(cudaSetDevice(device), "device");
  }
  device_guard(const device_guard&) = delete;
  device_guard& operator=(const device_guard&) = delete;
  ~device_guard() {
    if (changed_) drop_error(cudaSetDevice(before_));
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// While it lives, the calling thread may allocate and free although a stream is captured, by another thread or by itself.
class relaxed_capture {
 public:
  relaxed_capture() { drop_error(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  relaxed_capture(const relaxed_capture&) = delete;
  relaxed_capture& operator=(const relaxed_capture&) = delete;
  ~relaxed_capture() { drop_error(cudaThreadExchangeStreamCaptureMode(&mode_)); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // in between, the thread's own
};

/// A stream for a moment's work, which waits for no other stream: work on the legacy stream would break whatever capture
/// of a stream that waits for that one another thread is at.
class setup_stream {
 public:
  explicit setup_stream(const char* operation) : operation_(operation) {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), operation);
  }
  setup_stream(const setup_stream&) = delete;
  setup_stream& operator=(const setup_stream&) = delete;
  ~setup_stream() { drop_error(cudaStreamDestroy(stream_)); }

  cudaStream_t get() const { return stream_; }
  /// Waits until everything queued is done.
  void finish() const { check_cuda(cudaStreamSynchronize(stream_), operation_); }

 private:
  relaxed_capture relaxed_;
  const char* operation_;
  cudaStream_t stream_ = nullptr;
};

/// The device of a stream. The default streams, and before CUDA 12.8 all, are taken for the current device's.
inline int device_of(cudaStream_t stream) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "context");
#if CUDART_VERSION >= 12080
  if (stream != nullptr && stream != cudaStreamLegacy && stream != cudaStreamPerThread)
    check_cuda(cudaStreamGetDevice(stream, &device), "context");
#endif
  return device;
}

/// Tells what the program's device code was compiled for; never launched.
template <class = void>
__global__ void compiled_for_probe() {}
}  // namespace detail

/// Elements in memory of the device that is current when they are made, zeroed. Making one waits until they are, and for
/// no other work: it may happen while any thread captures any stream.
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
    const detail::setup_stream zeroing("buffer");
    void* memory = nullptr;
    detail::check_cuda(cudaMalloc(&memory, bytes()), "buffer");
    buffer owner;  // frees it if the rest throws
    owner.data_ = static_cast<T*>(memory);
    detail::check_cuda(cudaMemsetAsync(memory, 0, bytes(), zeroing.get()), "buffer");
    zeroing.finish();
    data_ = std::exchange(owner.data_, nullptr);
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
    if (data_ == nullptr) return;
    const detail::relaxed_capture relaxed;
    detail::drop_error(cudaFree(data_));
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

/// Work goes to `stream` and stays asynchronous: results may be read when the stream has come that far. One context's
/// operations share one workspace, so they must stay on one stream; other streams need contexts of their own.
///
/// The context is of the stream's device (a default stream's, and before CUDA 12.8 any stream's, being the one current
/// when the context is made), whichever is current later: operations and reserve_workspace() go there. Buffers, caches
/// and decoders, which know no context when they allocate, lie on the device current at that time: it must be the same.
template <>
class context<cuda> {
 public:
  /// \param stream          owned by the caller; the default stream cannot be captured in a graph
  /// \param workspace_bytes memory for the operations' scratch: the largest of their …_workspace_bytes()
  /// \throws device_error without a usable GPU
  explicit context(cudaStream_t stream = nullptr, std::size_t workspace_bytes = 0)
      : stream_(stream), device_(detail::device_of(stream)) {
    const detail::device_guard here(device_);
    cudaFuncAttributes probe{};
    detail::check_cuda(cudaFuncGetAttributes(&probe, detail::compiled_for_probe<>), "context");
    code_major_ = probe.ptxVersion / 10;
    detail::check_cuda(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device_), "context");
    detail::check_cuda(cudaDeviceGetAttribute(&block_shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_),
                       "context");
    reserve_workspace(workspace_bytes);
  }

  cudaStream_t stream() const { return stream_; }
  /// The stream's.
  int device() const { return device_; }
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
    if (bytes <= workspace_.size()) return;
    const detail::device_guard here(device_);
    workspace_ = buffer<std::byte, cuda>(bytes);
  }
  /// The workspace. Throws contract_error when it holds fewer than `bytes`.
  std::byte* workspace(std::size_t bytes, const char* operation) {
    detail::expects(bytes <= workspace_.size(), operation, ": needs a workspace of ", bytes,
                    " bytes, the context has ", workspace_.size());
    return workspace_.data();
  }

 private:
  cudaStream_t stream_ = nullptr;
  int device_ = 0;
  buffer<std::byte, cuda> workspace_;
  int code_major_ = 0;
  int multiprocessors_ = 0;
  int block_shared_bytes_ = 0;
};

}  // namespace specattn::inline SPECATTN_CODE
