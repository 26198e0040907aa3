// Y = X W^T on the device by cuBLAS: bf16 in, float sums, float out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "device_weights.cuh"
#include "specattn/cuda/context.cuh"
#include "specattn/scalar.hpp"
#include "specattn/view.hpp"

struct cublasContext;

namespace mini_llm {

/// A cuBLAS handle with a workspace of its own, so that products can be captured in a graph and replayed beside others.
class device_product {
 public:
  /// \throws specattn::device_error
  device_product();

  /// Products go to this context's stream from now on.
  void use(specattn::context<specattn::cuda>& ctx);

  /// y = x * weights^T, or y += x * weights^T.
  /// \param x [rows, inputs], \param y [rows, outputs]; rows of adjacent elements
  void operator()(specattn::view<const specattn::bf16, 2, specattn::cuda> x, const device_matrix& weights,
                  specattn::view<float, 2, specattn::cuda> y, bool add = false);

  std::size_t workspace_bytes() const { return workspace_.bytes(); }

 private:
  struct destroy {
    void operator()(cublasContext* handle) const;
  };
  std::unique_ptr<cublasContext, destroy> handle_;
  specattn::buffer<std::byte, specattn::cuda> workspace_;
};

}  // namespace mini_llm
