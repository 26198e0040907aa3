#pragma once

#include "gguf_file.hpp"
#include "model_config.hpp"
#include "safetensors.hpp"

namespace mini_llm {

/// The configuration of a model of the architecture "llama" (Llama, Mistral, SmolLM and others) in a GGUF file, from the
/// metadata llama.* and the special tokens' ids. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
///
/// Rope scaling is supported where it is linear or a table (rope_freqs.weight, which the converter makes of Llama 3's). What
/// would change the arithmetic and is not supported (other architectures and scaling, experts, factors, a part of a split
/// model) is refused by name; other unknown keys are ignored.
/// \throws input_error naming the key and its value
model_config read_gguf_config(const gguf_file& file);

/// The weights of that model by the names that a Hugging Face directory would have, each number rounded to bf16 when it is
/// asked for; they view the file. The rows of q and k, which the converter of llama.cpp interleaves for this architecture,
/// come in the order of Hugging Face: the pairs that rotate together half a head apart.
/// \throws input_error for tensors that are missing, mis-shaped, or would be left out
safetensors_file::tensor_map gguf_weights(const gguf_file& file, const model_config& config);

}  // namespace mini_llm
