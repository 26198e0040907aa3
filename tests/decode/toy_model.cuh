// The toy model's weights on the device, in kernels as plain as its loops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "decode/toy_model.hpp"
#include "specattn/cuda/context.cuh"
#include "specattn/cuda/device/launch.cuh"
#include "specattn/model.hpp"

namespace toy {

struct product_launch {
  const float* weights;  // [outputs, hidden]
  const float* in;       // [rows, hidden]
  float* out;            // [rows, outputs]
  std::int32_t rows, outputs, hidden;
  bool add;                  // to what is there
  const std::int32_t* from;  // the row of `in`; null: its own
};

static __global__ void product_kernel(const __grid_constant__ product_launch p) {
  const auto i = static_cast<std::int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= p.rows * p.outputs) return;
  const std::int32_t row = i / p.outputs;
  const float* in = p.in + std::ptrdiff_t{p.from == nullptr ? row : p.from[row]} * p.hidden;
  const float* column = p.weights + std::ptrdiff_t{i % p.outputs} * p.hidden;
  float sum = 0.0f;
  for (std::int32_t d = 0; d < p.hidden; ++d) sum += column[d] * in[d];
  p.out[i] = p.add ? p.out[i] + sum : sum;
}

struct embed_launch {
  const float* embedding;
  const std::int32_t* tokens;
  const std::int32_t* positions;
  float* out;
  std::int32_t rows, hidden;
};

static __global__ void embed_kernel(const __grid_constant__ embed_launch e) {
  const auto i = static_cast<std::int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= e.rows * e.hidden) return;
  const std::int32_t row = i / e.hidden, d = i % e.hidden;
  const auto angle =
      static_cast<float>(e.positions[row]) / powf(100.0f, static_cast<float>(d) / static_cast<float>(e.hidden));
  e.out[i] = e.embedding[e.tokens[row] * e.hidden + d] + 0.3f * sinf(angle);
}

class device_model {
 public:
  explicit device_model(const model& from)
      : shape_(from.shape_), hidden_(from.hidden_), embedding_(upload(from.embedding_)) {
    for (std::size_t layer = 0; layer < from.q_.size(); ++layer) {
      q_.push_back(upload(from.q_[layer]));
      k_.push_back(upload(from.k_[layer]));
      v_.push_back(upload(from.v_[layer]));
      o_.push_back(upload(from.o_[layer]));
    }
    const auto slots = static_cast<std::size_t>(shape_.max_slots), hidden = static_cast<std::size_t>(hidden_);
    const auto kv = static_cast<std::size_t>(shape_.kv_heads) * static_cast<std::size_t>(shape_.head_dim);
    for (buffer* rows : {&x_, &rows_q_, &rows_out_}) *rows = buffer(slots * hidden);
    for (buffer* rows : {&rows_k_, &rows_v_}) *rows = buffer(slots * kv);
  }

  const specattn::model_shape& shape() const { return shape_; }

  template <class Attention>
  void forward(specattn::context<specattn::cuda>& ctx, const specattn::forward_batch<specattn::cuda>& batch,
               Attention& attention, specattn::view<float, 2, specattn::cuda> logits) {
    const auto slots = static_cast<std::int32_t>(batch.tokens.extent(0));
    const std::int32_t kv = shape_.kv_heads * shape_.head_dim;
    const embed_launch embed{
        embedding_.data(), batch.tokens.data(), batch.positions.data(), x_.data(), slots, hidden_};
    specattn::detail::start_kernel(ctx, embed_kernel, grid(slots * hidden_), threads, embed, "toy");
    for (std::size_t layer = 0; layer < q_.size(); ++layer) {
      multiply(ctx, {q_[layer].data(), x_.data(), rows_q_.data(), slots, hidden_, hidden_, false, nullptr});
      multiply(ctx, {k_[layer].data(), x_.data(), rows_k_.data(), slots, kv, hidden_, false, nullptr});
      multiply(ctx, {v_[layer].data(), x_.data(), rows_v_.data(), slots, kv, hidden_, false, nullptr});
      const auto heads = [&](const buffer& of, std::int32_t count) {
        return specattn::view<float, 3, specattn::cuda>(of.data(), {slots, count, shape_.head_dim});
      };
      attention(static_cast<std::int32_t>(layer), rows(heads(rows_q_, shape_.q_heads)),
                rows(heads(rows_k_, shape_.kv_heads)), rows(heads(rows_v_, shape_.kv_heads)),
                heads(rows_out_, shape_.q_heads));
      multiply(ctx, {o_[layer].data(), rows_out_.data(), x_.data(), slots, hidden_, hidden_, true, nullptr});
    }
    multiply(ctx, {embedding_.data(), x_.data(), logits.data(), static_cast<std::int32_t>(batch.logit_rows.extent(0)),
                   shape_.vocab, hidden_, false, batch.logit_rows.data()});
  }

  /// Overwrites an entry of the embedding, which is also the head.
  void spoil(std::size_t at, float with) {
    specattn::detail::check_cuda(cudaMemcpy(embedding_.data() + at, &with, sizeof(with), cudaMemcpyHostToDevice),
                                 "toy");
  }

 private:
  using buffer = specattn::buffer<float, specattn::cuda>;
  using rows = specattn::view<const float, 3, specattn::cuda>;
  static constexpr int threads = 128;

  static dim3 grid(std::int32_t items) { return dim3(specattn::detail::blocks_of(items, threads)); }
  static buffer upload(const std::vector<float>& from) {
    buffer copy(from.size());
    specattn::detail::check_cuda(cudaMemcpy(copy.data(), from.data(), copy.bytes(), cudaMemcpyHostToDevice), "toy");
    return copy;
  }
  static void multiply(specattn::context<specattn::cuda>& ctx, const product_launch& p) {
    specattn::detail::start_kernel(ctx, product_kernel, grid(p.rows * p.outputs), threads, p, "toy");
  }

  specattn::model_shape shape_;
  std::int32_t hidden_;
  buffer embedding_;
  std::vector<buffer> q_, k_, v_, o_;
  buffer x_, rows_q_, rows_k_, rows_v_, rows_out_;
};

}  // namespace toy
