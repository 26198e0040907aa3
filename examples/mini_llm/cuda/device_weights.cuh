// The weights of a Llama model in device memory: matrices in bf16, gains in float, all in one allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "model/model_config.hpp"
#include "model/model_files.hpp"
#include "specattn/cuda/context.cuh"
#include "specattn/scalar.hpp"

namespace mini_llm {

/// [outputs, inputs], rows adjacent.
struct device_matrix {
  const specattn::bf16* data = nullptr;
  std::int64_t outputs = 0;
  std::int64_t inputs = 0;
};

struct device_layer {
  const float* attention_gain = nullptr;  ///< [hidden]
  device_matrix queries_keys_values;      ///< q heads, k heads, v heads
  device_matrix output;
  const float* feed_forward_gain = nullptr;  ///< [hidden]
  device_matrix gate_up;                     ///< [2 * ffn, hidden], gate first
  device_matrix down;
};

class device_weights {
 public:
  /// Loads; f32 and f16 weights are rounded to bf16.
  /// \throws input_error for missing, mis-shaped, non-float, NaN or infinite weights, specattn::device_error
  device_weights(const model_config& config, const model_files& files);
  /// Random weights, made on the device: every matrix is normal with a variance of 1 / inputs, every gain is 1, so that
  /// rows keep their size from layer to layer.
  device_weights(const model_config& config, std::uint64_t seed);

  const device_layer& layer(std::int32_t index) const { return layers_[static_cast<std::size_t>(index)]; }
  const float* final_gain() const { return final_gain_; }
  const device_matrix& head() const { return head_; }
  const device_matrix& embedding() const { return embedding_; }  ///< the head where they are tied
  std::size_t bytes() const { return memory_.bytes(); }
  /// A hash of all weights as the files hold them, the CPU model's too; 0 for random ones.
  std::uint64_t fingerprint() const { return fingerprint_; }

 private:
  /// A tensor of the files and its place: rows of a matrix (bf16) or a gain (float).
  struct tensor {
    std::string name;
    std::int64_t rows = 0;
    std::int64_t inputs = 0;  ///< 0: a gain of `rows` elements
    std::byte* place = nullptr;
  };
  /// Places tensors in memory, one after another; counts only while memory is null.
  class layout;

  explicit device_weights(const model_config& config);
  void lay_out(const model_config& config, layout& to);
  static void lay_out_layer(const model_config& config, std::int64_t index, layout& to, device_layer& layer);
  void load(const tensor& planned, const model_files& files);

  std::vector<tensor> tensors_;  // in the order in which the CPU model reads them
  specattn::buffer<std::byte, specattn::cuda> memory_;
  std::vector<device_layer> layers_;
  const float* final_gain_ = nullptr;
  device_matrix head_, embedding_;
  std::uint64_t fingerprint_ = 0;
};

}  // namespace mini_llm
