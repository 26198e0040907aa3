// Dense causal attention of one sequence in plain loops: what the model's tests need, sharing nothing with attend().
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "specattn/cpu/context.hpp"
#include "specattn/model.hpp"

/// Keeps its own keys and values. Call advance() after each forward(). A slot's result does not depend on the others.
class plain_attention {
 public:
  using rows = specattn::view<const float, 3>;
  /// Told the weights of each slot and head: (layer, q head, position of the slot, weights [position + 1]).
  std::function<void(std::int32_t, std::int64_t, std::int64_t, const float*)> record;

  plain_attention(specattn::context<specattn::cpu>& ctx, const specattn::model_shape& shape, std::int64_t capacity)
      : ctx_(ctx), shape_(shape), row_size_(std::int64_t{shape.kv_heads} * shape.head_dim), capacity_(capacity) {
    const auto size = static_cast<std::size_t>(shape.layers * capacity * row_size_);
    keys_.resize(size);
    values_.resize(size);
  }

  void advance(std::int64_t slots) { length_ += slots; }
  void roll_back(std::int64_t length) { length_ = length; }
  std::int64_t length() const { return length_; }

  void operator()(std::int32_t layer, rows q, rows k, rows v, specattn::view<float, 3> out) {
    const std::int64_t slots = q.extent(0);
    for (std::int64_t slot = 0; slot < slots; ++slot) {
      for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
        std::memcpy(at(keys_, layer, length_ + slot, head), &k(slot, head, 0), head_bytes());
        std::memcpy(at(values_, layer, length_ + slot, head), &v(slot, head, 0), head_bytes());
      }
    }
    const std::int64_t heads = q.extent(1);
    const bool alone = static_cast<bool>(record);  // recorders need not be thread-safe
    const auto one = [&](std::ptrdiff_t i, int) { attend_one(layer, i / heads, i % heads, q, out); };
    if (alone) {
      for (std::int64_t i = 0; i < slots * heads; ++i) one(i, 0);
    } else {
      ctx_.parallel_for(slots * heads, one);
    }
  }

 private:
  std::size_t head_bytes() const { return static_cast<std::size_t>(shape_.head_dim) * sizeof(float); }
  float* at(std::vector<float>& of, std::int64_t layer, std::int64_t position, std::int64_t head) const {
    return of.data() + (layer * capacity_ + position) * row_size_ + head * shape_.head_dim;
  }

  /// Sixteen interleaved sums, so that the compiler can use vectors without changing the order.
  static float dot(const float* a, const float* b, std::int64_t size) {
    float sums[16] = {};
    for (std::int64_t i = 0; i + 16 <= size; i += 16) {
      for (int c = 0; c < 16; ++c) sums[c] += a[i + c] * b[i + c];
    }
    float sum = 0.0F;
    for (const float part : sums) sum += part;
    for (std::int64_t i = size / 16 * 16; i < size; ++i) sum += a[i] * b[i];
    return sum;
  }

  void attend_one(std::int32_t layer, std::int64_t slot, std::int64_t q_head, rows q, specattn::view<float, 3> out) {
    const std::int64_t dim = shape_.head_dim;
    const std::int64_t kv_head = q_head / (shape_.q_heads / shape_.kv_heads);
    const std::int64_t count = length_ + slot + 1;
    std::vector<float> weights(static_cast<std::size_t>(count));
    const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
    for (std::int64_t j = 0; j < count; ++j) {
      weights[static_cast<std::size_t>(j)] = scale * dot(&q(slot, q_head, 0), at(keys_, layer, j, kv_head), dim);
    }
    const float greatest = *std::max_element(weights.begin(), weights.end());
    double sum = 0.0;
    for (float& w : weights) sum += static_cast<double>(w = std::exp(w - greatest));
    float* const to = &out(slot, q_head, 0);
    std::fill_n(to, dim, 0.0F);
    for (std::int64_t j = 0; j < count; ++j) {
      float& w = weights[static_cast<std::size_t>(j)];
      w = static_cast<float>(static_cast<double>(w) / sum);
      const float* const value = at(values_, layer, j, kv_head);
      for (std::int64_t d = 0; d < dim; ++d) to[d] += w * value[d];
    }
    if (record) record(layer, q_head, count - 1, weights.data());
  }

  specattn::context<specattn::cpu>& ctx_;
  specattn::model_shape shape_;
  std::int64_t row_size_;
  std::int64_t capacity_;
  std::int64_t length_ = 0;
  std::vector<float> keys_;
  std::vector<float> values_;
};
