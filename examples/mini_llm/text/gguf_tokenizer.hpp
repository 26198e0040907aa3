#pragma once

#include "gguf_file.hpp"
#include "tokenizer_file.hpp"

namespace mini_llm {

/// What the metadata tokenizer.ggml.* of a GGUF file say, as if a tokenizer.json had said it. Keys:
/// https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what they leave to the reader (the split patterns that
/// tokenizer.ggml.pre names, defaults) is as llama.cpp has it: src/llama-vocab.cpp in https://github.com/ggml-org/llama.cpp.
///
/// Read are the models "gpt2" (byte-level BPE with merges) and "llama" (SentencePiece BPE: of two neighbours that make a
/// token, those whose token has the highest score are joined first). Others are refused by name, and so are unknown
/// patterns.
/// \throws input_error naming the key and its value
tokenizer_settings read_gguf_tokenizer(const gguf_file& file);

}  // namespace mini_llm
