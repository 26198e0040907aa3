// The library's own attention for one sequence: a cache row, attend() through attention_pass, weights if wanted.
#pragma once

#include <cstdint>
#include <vector>

#include "specattn/attention_pass.hpp"
#include "specattn/buffer.hpp"
#include "specattn/cpu/attend.hpp"
#include "specattn/cpu/context.hpp"
#include "specattn/cpu/kv_cache.hpp"
#include "specattn/model.hpp"

/// Call advance() after each forward(). With record_all(), weights() holds those of the last pass's slots.
template <specattn::storage T>
class cached_attention {
 public:
  using rows = specattn::view<const float, 3>;

  cached_attention(specattn::context<specattn::cpu>& ctx, const specattn::model_shape& shape, std::int32_t capacity)
      : ctx_(ctx), shape_(shape), capacity_(capacity), cache_(cache_shape(shape, capacity)) {
    ctx.reserve_workspace(specattn::attend_workspace_bytes(
        ctx, {1, shape.max_slots, shape.q_heads, shape.kv_heads, shape.head_dim, capacity}));
  }

  std::int64_t length() const { return cache_.length(0); }
  void advance(std::int64_t slots) { cache_.advance(0, static_cast<std::int32_t>(slots)); }
  void roll_back(std::int64_t length) { cache_.roll_back(0, static_cast<std::int32_t>(length)); }

  void record_all() {
    weights_ = specattn::buffer<float>(static_cast<std::size_t>(shape_.layers) *
                                       static_cast<std::size_t>(shape_.max_slots * shape_.q_heads) *
                                       static_cast<std::size_t>(capacity_));
  }
  /// [layers, max_slots, q_heads, capacity]
  specattn::view<float, 4> weights() const {
    return {weights_.data(), {shape_.layers, shape_.max_slots, shape_.q_heads, capacity_}};
  }

  void operator()(std::int32_t layer, rows q, rows k, rows v, specattn::view<float, 3> out) {
    if (layer == 0) {
      offsets_[1] = static_cast<std::int32_t>(q.extent(0));
      kv_lens_[0] = cache_.length(0);
      cache_.reserve(0, offsets_[1]);
    }
    specattn::pass_layout<specattn::cpu> layout;
    layout.slot_offsets = {offsets_, {2}};
    layout.kv_lens = {kv_lens_, {1}};
    layout.cache_rows = {cache_rows_, {1}};
    specattn::attention_pass<T, specattn::cpu> pass(ctx_, cache_, layout);
    if (weights_.size() > 0) pass.record(weights(), specattn::record_slots::all);
    pass(layer, q, k, v, out);
  }

 private:
  static specattn::kv_cache_shape cache_shape(const specattn::model_shape& model, std::int32_t capacity) {
    specattn::kv_cache_shape shape;
    shape.layers = model.layers;
    shape.kv_heads = model.kv_heads;
    shape.head_dim = model.head_dim;
    shape.max_positions = capacity;
    return shape;
  }

  specattn::context<specattn::cpu>& ctx_;
  specattn::model_shape shape_;
  std::int32_t capacity_;
  specattn::kv_cache<T, specattn::cpu> cache_;
  specattn::buffer<float> weights_;
  std::int32_t offsets_[2] = {0, 0};
  std::int32_t kv_lens_[1] = {0};
  std::int32_t cache_rows_[1] = {0};
};
