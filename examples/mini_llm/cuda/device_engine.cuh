// engine over specattn::decoder<..., cuda>, with the key/value type and the guide chosen at run time.
#pragma once

#include <memory>

#include "device_llama.cuh"
#include "model/engine.hpp"
#include "specattn/cuda/context.cuh"

namespace mini_llm {

/// See device_pair. \param draft null: plain decoding
std::unique_ptr<engine> make_device_engine(specattn::context<specattn::cuda>& ctx, device_llama& target,
                                           device_llama* draft, kv_type type, const guide_choice& guide,
                                           const specattn::decode_options& options);

specattn::decode_memory device_engine_bytes(const specattn::model_shape& target, const specattn::model_shape& draft,
                                            kv_type type, const guide_choice& guide,
                                            const specattn::decode_options& options);

}  // namespace mini_llm
