#include "device_product.cuh"

#include <cublas_v2.h>

#include <string>

namespace mini_llm {
namespace {

constexpr std::size_t product_workspace_bytes = std::size_t{32} << 20;  // what cuBLAS recommends for Hopper

void check_cublas(cublasStatus_t status) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  specattn::detail::raise<specattn::device_error>(std::string("device_llama: cuBLAS: ") +
                                                  cublasGetStatusString(status));
}

}  // namespace

void device_product::destroy::operator()(cublasContext* handle) const {
  static_cast<void>(cublasDestroy(handle));  // nobody to tell in a destructor
}

device_product::device_product() : workspace_(product_workspace_bytes) {
  cublasHandle_t handle = nullptr;
  check_cublas(cublasCreate(&handle));
  handle_.reset(handle);
}

void device_product::use(specattn::context<specattn::cuda>& ctx) {
  check_cublas(cublasSetStream(handle_.get(), ctx.stream()));
  check_cublas(cublasSetWorkspace(handle_.get(), workspace_.data(), workspace_.size()));  // the line above undoes it
}

void device_product::operator()(specattn::view<const specattn::bf16, 2, specattn::cuda> x,
                                const device_matrix& weights, specattn::view<float, 2, specattn::cuda> y, bool add) {
  // cuBLAS counts columns first: what it sees is y^T = weights x^T.
  const float one = 1.0f, kept = add ? 1.0f : 0.0f;
  const auto size = [](std::ptrdiff_t value) { return static_cast<int>(value); };
  check_cublas(cublasGemmEx(handle_.get(), CUBLAS_OP_T, CUBLAS_OP_N, size(weights.outputs), size(x.extent(0)),
                            size(weights.inputs), &one, weights.data, CUDA_R_16BF, size(weights.inputs), x.data(),
                            CUDA_R_16BF, size(x.stride(0)), &kept, y.data(), CUDA_R_32F, size(y.stride(0)),
                            CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

}  // namespace mini_llm
