// A small transformer with seeded random weights, in plain loops: fast enough for thousands of rounds in a test, and
// its rows never depend on each other. A draft that resembles a target is the same seed with some noise.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "specattn/cpu/context.hpp"
#include "specattn/model.hpp"
#include "specattn/random.hpp"
#include "specattn/view.hpp"

namespace toy {

class device_model;

class model {
 public:
  model(std::uint64_t seed, specattn::model_shape shape, float noise = 0.0f)
      : shape_(shape), hidden_(shape.q_heads * shape.head_dim), noise_(noise) {
    embedding_ = weights(seed, 0, shape.vocab, 1.0f);
    const auto slots = static_cast<std::size_t>(shape.max_slots);
    const std::int32_t kv = shape.kv_heads * shape.head_dim;
    for (std::int32_t layer = 0; layer < shape.layers; ++layer) {
      const float scale = 2.0f / std::sqrt(static_cast<float>(hidden_));
      const auto salt = static_cast<std::uint64_t>(4 * layer);
      q_.push_back(weights(seed, salt + 1, hidden_, scale));
      k_.push_back(weights(seed, salt + 2, kv, scale));
      v_.push_back(weights(seed, salt + 3, kv, scale));
      o_.push_back(weights(seed, salt + 4, hidden_, scale));
    }
    for (auto* rows : {&x_, &rows_q_, &rows_out_}) rows->resize(slots * static_cast<std::size_t>(hidden_));
    for (auto* rows : {&rows_k_, &rows_v_}) rows->resize(slots * static_cast<std::size_t>(kv));
  }

  const specattn::model_shape& shape() const { return shape_; }

  template <class Attention>
  void forward(specattn::context<specattn::cpu>&, const specattn::forward_batch<>& batch, Attention& attention,
               specattn::view<float, 2> logits) {
    const auto slots = static_cast<std::ptrdiff_t>(batch.tokens.size());
    const std::int32_t kv = shape_.kv_heads * shape_.head_dim;
    for (std::ptrdiff_t s = 0; s < slots; ++s) embed(batch, s);
    for (std::int32_t layer = 0; layer < shape_.layers; ++layer) {
      const auto l = static_cast<std::size_t>(layer);
      for (std::ptrdiff_t s = 0; s < slots; ++s) {
        multiply(q_[l], hidden_, row(x_, s, hidden_), row(rows_q_, s, hidden_));
        multiply(k_[l], kv, row(x_, s, hidden_), row(rows_k_, s, kv));
        multiply(v_[l], kv, row(x_, s, hidden_), row(rows_v_, s, kv));
      }
      const auto heads = [&](std::vector<float>& of, std::int32_t count) {
        return specattn::view<float, 3>(of.data(), {slots, count, shape_.head_dim});
      };
      attention(layer, specattn::view<const float, 3>(heads(rows_q_, shape_.q_heads)),
                specattn::view<const float, 3>(heads(rows_k_, shape_.kv_heads)),
                specattn::view<const float, 3>(heads(rows_v_, shape_.kv_heads)), heads(rows_out_, shape_.q_heads));
      for (std::ptrdiff_t s = 0; s < slots; ++s) add_output(o_[l], s);
    }
    for (std::size_t r = 0; r < batch.logit_rows.size(); ++r) {
      multiply(embedding_, shape_.vocab, row(x_, batch.logit_rows[r], hidden_),
               &logits(static_cast<std::ptrdiff_t>(r), 0));
    }
  }

 private:
  friend class device_model;  // decode/toy_model.cuh

  static float* row(std::vector<float>& of, std::ptrdiff_t s, std::int32_t width) { return of.data() + s * width; }

  std::vector<float> weights(std::uint64_t seed, std::uint64_t salt, std::int32_t outputs, float scale) const {
    std::vector<float> w(static_cast<std::size_t>(outputs) * static_cast<std::size_t>(hidden_));
    for (std::size_t i = 0; i < w.size(); ++i) {
      const float own = specattn::uniform(seed * 64 + salt, i, specattn::random_use::draft) - 0.5f;
      const float other = specattn::uniform(seed * 64 + salt, i, specattn::random_use::accept) - 0.5f;
      w[i] = scale * (own + noise_ * other);
    }
    return w;
  }

  void embed(const specattn::forward_batch<>& batch, std::ptrdiff_t s) {
    const auto at = static_cast<std::size_t>(s);
    float* x = row(x_, s, hidden_);
    for (std::int32_t d = 0; d < hidden_; ++d) {
      const auto angle = static_cast<float>(batch.positions[at]) / std::pow(100.0f, static_cast<float>(d) / hidden_);
      x[d] = embedding_[static_cast<std::size_t>(batch.tokens[at] * hidden_ + d)] + 0.3f * std::sin(angle);
    }
  }

  void multiply(const std::vector<float>& w, std::int32_t outputs, const float* in, float* out) const {
    for (std::int32_t o = 0; o < outputs; ++o) {
      const float* column = w.data() + static_cast<std::ptrdiff_t>(o) * hidden_;
      float sum = 0.0f;
      for (std::int32_t d = 0; d < hidden_; ++d) sum += column[d] * in[d];
      out[o] = sum;
    }
  }

  void add_output(const std::vector<float>& w, std::ptrdiff_t s) {
    float* q = row(rows_q_, s, hidden_);  // free again: holds the product
    multiply(w, hidden_, row(rows_out_, s, hidden_), q);
    float* x = row(x_, s, hidden_);
    for (std::int32_t d = 0; d < hidden_; ++d) x[d] += q[d];
  }

  specattn::model_shape shape_;
  std::int32_t hidden_;
  float noise_;
  std::vector<float> embedding_;
  std::vector<std::vector<float>> q_, k_, v_, o_;
  std::vector<float> x_, rows_q_, rows_k_, rows_v_, rows_out_;
};

}  // namespace toy
