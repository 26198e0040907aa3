// The device as the cases of select, attend, … see a backend.
#pragma once

#include <memory>
#include <vector>

#include "specattn/cuda/context.cuh"

struct cuda_fixture {
  using backend = specattn::cuda;
  static constexpr bool to_the_bit = true;

  cuda_fixture() {
    specattn::detail::check_cuda(cudaStreamCreate(&stream_), "test");
    context_ = std::make_unique<specattn::context<specattn::cuda>>(stream_);
  }
  cuda_fixture(const cuda_fixture&) = delete;
  cuda_fixture& operator=(const cuda_fixture&) = delete;
  ~cuda_fixture() {
    context_.reset();
    cudaStreamDestroy(stream_);
  }

  specattn::context<specattn::cuda>& context() { return *context_; }
  cudaStream_t stream() const { return stream_; }

  template <class T>
  specattn::buffer<T, specattn::cuda> upload(const std::vector<T>& host) {
    specattn::buffer<T, specattn::cuda> copy(host.size());
    if (!host.empty()) {
      specattn::detail::check_cuda(cudaMemcpy(copy.data(), host.data(), copy.bytes(), cudaMemcpyHostToDevice),
                                   "test");
    }
    return copy;
  }

  template <class T>
  std::vector<T> download(const specattn::buffer<T, specattn::cuda>& from) {
    specattn::detail::check_cuda(cudaStreamSynchronize(stream_), "test");
    std::vector<T> copy(from.size());
    if (!copy.empty()) {
      specattn::detail::check_cuda(cudaMemcpy(copy.data(), from.data(), from.bytes(), cudaMemcpyDeviceToHost),
                                   "test");
    }
    return copy;
  }

  /// Fills the workspace with garbage: nothing may be expected of it.
  void soil_workspace() {
    const std::size_t bytes = context_->workspace_bytes();
    if (bytes == 0) return;
    specattn::detail::check_cuda(cudaMemsetAsync(context_->workspace(bytes, "test"), 0xab, bytes, stream_), "test");
  }

 private:
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<specattn::context<specattn::cuda>> context_;
};
