#include "device_weights.cuh"

#include <cuda_bf16.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <span>
#include <utility>

#include "model/device_support.hpp"
#include "model/unread_weights.hpp"
#include "model/weight_store.hpp"
#include "specattn/random.hpp"

namespace mini_llm {
namespace {

using specattn::bf16;
using specattn::detail::check_cuda;
using specattn::detail::expects;

constexpr unsigned fill_threads = 256;

/// Four normal numbers a thread, by Box and Muller; `number` keeps the matrices apart.
__global__ void fill_normal_kernel(bf16* to, std::int64_t count, float deviation, std::uint64_t seed,
                                   std::uint32_t number) {
  const std::int64_t quad = std::int64_t{blockIdx.x} * fill_threads + threadIdx.x;
  const specattn::philox_words words =
      specattn::philox({{static_cast<std::uint32_t>(quad), static_cast<std::uint32_t>(quad >> 32), number, 0u}},
                       static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
  for (int pair = 0; pair < 2; ++pair) {
    const float u = (static_cast<float>(words.word[2 * pair] >> 8) + 0.5f) * 0x1p-24f;
    const float radius = deviation * sqrtf(-2.0f * logf(u));
    float sine, cosine;
    sincospif(static_cast<float>(words.word[2 * pair + 1] >> 8) * 0x1p-23f, &sine, &cosine);
    const std::int64_t i = quad * 4 + pair * 2;
    if (i < count) to[i].bits = __bfloat16_as_ushort(__float2bfloat16_rn(radius * cosine));
    if (i + 1 < count) to[i + 1].bits = __bfloat16_as_ushort(__float2bfloat16_rn(radius * sine));
  }
}

void fill_normal(bf16* to, std::int64_t count, float deviation, std::uint64_t seed, std::uint32_t number) {
  const auto ctas = static_cast<unsigned>((count + 4 * fill_threads - 1) / (4 * fill_threads));
  fill_normal_kernel<<<ctas, fill_threads>>>(to, count, deviation, seed, number);
  check_cuda(cudaGetLastError(), "device_weights");
}

void upload(const void* from, std::byte* to, std::size_t bytes) {
  check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "device_weights");
}

}  // namespace

class device_weights::layout {
 public:
  layout(std::byte* memory, std::vector<tensor>& tensors) : memory_(memory), tensors_(tensors) {}

  std::size_t bytes() const { return bytes_; }

  /// The stacked `sources`, each (name, rows).
  void matrix(std::initializer_list<std::pair<std::string, std::int64_t>> sources, std::int64_t inputs,
              device_matrix& made) {
    made = {reinterpret_cast<const bf16*>(at(bytes_)), 0, inputs};
    for (const auto& [name, rows] : sources) {
      tensors_.push_back({name, rows, inputs, at(bytes_)});
      made.outputs += rows;
      bytes_ += static_cast<std::size_t>(rows * inputs) * sizeof(bf16);
    }
    align();
  }
  void gain(std::string name, std::int64_t size, const float*& made) {
    made = reinterpret_cast<const float*>(at(bytes_));
    tensors_.push_back({std::move(name), size, 0, at(bytes_)});
    bytes_ += static_cast<std::size_t>(size) * sizeof(float);
    align();
  }

 private:
  std::byte* at(std::size_t offset) const { return memory_ == nullptr ? nullptr : memory_ + offset; }
  void align() { bytes_ = (bytes_ + 255) / 256 * 256; }

  std::byte* memory_;
  std::vector<tensor>& tensors_;
  std::size_t bytes_ = 0;
};

device_weights::device_weights(const model_config& config) : layers_(static_cast<std::size_t>(config.layers)) {
  require_device_model(config, "device_llama");
  expects(config.hidden % 8 == 0 && config.ffn % 8 == 0 && config.head_dim % 8 == 0, "device_llama: hidden ",
          config.hidden, ", ffn ", config.ffn, " and head_dim ", config.head_dim,
          " must be multiples of 8: rows are read 16 bytes at a time");
  layout counted(nullptr, tensors_);
  lay_out(config, counted);
  memory_ = specattn::buffer<std::byte, specattn::cuda>(counted.bytes());
  tensors_.clear();
  layout placed(memory_.data(), tensors_);
  lay_out(config, placed);
}

device_weights::device_weights(const model_config& config, const model_files& files) : device_weights(config) {
  std::vector<std::string> names;
  for (const tensor& planned : tensors_) names.push_back(planned.name);
  refuse_unread_weights(config, files, names);
  fingerprint_ = first_weight_hash;
  for (const tensor& planned : tensors_) load(planned, files);
  tensors_.clear();
}

device_weights::device_weights(const model_config& config, std::uint64_t seed) : device_weights(config) {
  std::uint32_t number = 0;
  for (const tensor& planned : tensors_) {
    if (planned.inputs > 0) {
      fill_normal(reinterpret_cast<bf16*>(planned.place), planned.rows * planned.inputs,
                  1.0f / std::sqrt(static_cast<float>(planned.inputs)), seed, number++);
    } else {
      const std::vector<float> ones(static_cast<std::size_t>(planned.rows), 1.0f);
      upload(ones.data(), planned.place, ones.size() * sizeof(float));
    }
  }
  tensors_.clear();
  check_cuda(cudaDeviceSynchronize(), "device_weights");
}

void device_weights::lay_out(const model_config& config, layout& to) {
  for (std::int64_t i = 0; i < config.layers; ++i) {
    lay_out_layer(config, i, to, layers_[static_cast<std::size_t>(i)]);
  }
  to.gain("model.norm.weight", config.hidden, final_gain_);
  to.matrix({{"model.embed_tokens.weight", config.vocab}}, config.hidden, embedding_);
  head_ = embedding_;
  if (!config.tie_word_embeddings) to.matrix({{"lm_head.weight", config.vocab}}, config.hidden, head_);
}

void device_weights::lay_out_layer(const model_config& config, std::int64_t index, layout& to, device_layer& layer) {
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  const std::int64_t q_size = config.q_heads * config.head_dim;
  const std::int64_t kv_size = config.kv_heads * config.head_dim;
  to.gain(prefix + "input_layernorm.weight", config.hidden, layer.attention_gain);
  to.matrix({{prefix + "self_attn.q_proj.weight", q_size},
             {prefix + "self_attn.k_proj.weight", kv_size},
             {prefix + "self_attn.v_proj.weight", kv_size}},
            config.hidden, layer.queries_keys_values);
  to.matrix({{prefix + "self_attn.o_proj.weight", config.hidden}}, q_size, layer.output);
  to.gain(prefix + "post_attention_layernorm.weight", config.hidden, layer.feed_forward_gain);
  to.matrix({{prefix + "mlp.gate_proj.weight", config.ffn}, {prefix + "mlp.up_proj.weight", config.ffn}},
            config.hidden, layer.gate_up);
  to.matrix({{prefix + "mlp.down_proj.weight", config.hidden}}, config.ffn, layer.down);
}

void device_weights::load(const tensor& planned, const model_files& files) {
  std::vector<std::int64_t> shape{planned.rows};
  if (planned.inputs > 0) shape.push_back(planned.inputs);
  const stored_tensor& stored = files.weight(planned.name, shape);
  const std::int64_t row_elements = (std::max<std::int64_t>)(planned.inputs, 1);
  std::vector<float> floats;
  std::vector<bf16> rounded;
  read_in_chunks(planned.name, stored, fingerprint_,
                 [&](std::int64_t first_row, std::int64_t rows, std::span<const std::byte> bytes) {
                   const auto first = static_cast<std::size_t>(first_row * row_elements);
                   const auto count = static_cast<std::size_t>(rows * row_elements);
                   if (planned.inputs > 0 && stored.type == dtype::bf16) {
                     upload(bytes.data(), planned.place + first * sizeof(bf16), bytes.size());
                     return;
                   }
                   floats.resize(count);
                   read_floats({stored.type, {}, bytes}, floats);
                   if (planned.inputs == 0) {
                     upload(floats.data(), planned.place + first * sizeof(float), count * sizeof(float));
                     return;
                   }
                   rounded.resize(count);
                   std::transform(floats.begin(), floats.end(), rounded.begin(), specattn::from_float<bf16>);
                   upload(rounded.data(), planned.place + first * sizeof(bf16), count * sizeof(bf16));
                 });
}

}  // namespace mini_llm
