// A pair of models on the GPU behind plain C++: all that the rest of the program sees of CUDA.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "model/engine.hpp"
#include "model/loaded_model.hpp"
#include "specattn/alignment.hpp"
#include "specattn/decode_options.hpp"

namespace mini_llm {

/// A target's weights on the GPU, and a draft's where there is one. Engines refer to it: it must outlive them.
class device_pair {
 public:
  virtual ~device_pair() = default;

  virtual std::string device_name() const = 0;
  /// Of both models.
  virtual std::size_t weight_bytes() const = 0;
  virtual const specattn::model_fingerprint& target_fingerprint() const = 0;
  virtual const specattn::model_fingerprint& draft_fingerprint() const = 0;

  /// As the CPU's make_engine(), over specattn::decoder<..., cuda>. Engines of a pair share its stream: one at a time.
  /// \throws input_error for a guide or a key/value type that is not there on the GPU, specattn::contract_error as the
  ///         decoder, specattn::device_error
  virtual std::unique_ptr<engine> make(kv_type type, const guide_choice& guide,
                                       const specattn::decode_options& options) = 0;
  /// As the CPU's engine_bytes().
  virtual specattn::decode_memory engine_bytes(kv_type type, const guide_choice& guide,
                                               const specattn::decode_options& options) const = 0;
};

/// Loads the weights of models whose configuration is read onto the current GPU.
/// \param draft null: plain decoding
/// \throws input_error where this program was built without CUDA or this machine has no usable GPU, and for weights as
///         the CPU model; specattn::device_error
std::unique_ptr<device_pair> load_device_pair(const loaded_model& target, const loaded_model* draft);

}  // namespace mini_llm
