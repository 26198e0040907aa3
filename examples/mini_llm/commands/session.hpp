// What a command that decodes needs: models, guide, tokens; made from what the user gave, with every check up front.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda/device_pair.hpp"
#include "model/engine.hpp"
#include "model/loaded_model.hpp"
#include "specattn/cpu/context.hpp"
#include "specattn/decode_options.hpp"

namespace mini_llm {

/// The user's choice of models and method. Paths left empty mean the pair that ships with the source.
struct session_options {
  std::filesystem::path model;
  std::filesystem::path draft;
  std::filesystem::path alignment;
  std::string guide;  ///< empty: draft where there are a draft and an alignment, else none
  std::string kv = "f16";
  std::string device = "cpu";  ///< or cuda
  std::int32_t threads = 0;    ///< 0: specattn::usable_cpus()
  specattn::selection_rule rule{.rows = specattn::combine::mean};
  specattn::decode_options decode;
  std::int32_t window = 512;
  float kept_share = 0.25f;
};

struct session {
  std::unique_ptr<specattn::context<specattn::cpu>> ctx;
  std::unique_ptr<loaded_model> target;
  std::unique_ptr<loaded_model> draft;     ///< null: plain decoding
  std::unique_ptr<device_pair> on_device;  ///< the models' weights, where they are on the GPU; null: the CPU
  guide_choice guide;
  kv_type kv = kv_type::f16;
  specattn::decode_options decode;

  llama* draft_model() const { return draft ? draft->model.get() : nullptr; }
  std::unique_ptr<engine> make(const guide_choice& with, const specattn::decode_options& options) const;
  /// What the engine of this session's own choice allocates.
  specattn::decode_memory engine_bytes() const;
  std::size_t weight_bytes() const;

  /// Refuses a run that this machine's memory cannot hold, or the models' contexts.
  /// \param positions of a text, at most
  /// \throws input_error
  void require_room(const guide_choice& with, specattn::decode_options options, std::int64_t positions) const;
};

/// Refuses rounds of so many drafted tokens whose refresh takes more tokens than a pass.
/// \throws input_error naming --refresh and the most it may be
void check_refresh(std::int32_t refresh_every, std::int32_t draft_length);

/// Loads and checks. \throws input_error, specattn::contract_error
session open_session(const session_options& options);

/// The alignment for a session's pair: from the file given, or alignment.json beside the embedded models; none when no
/// file was given and the one there is for other models.
/// \throws input_error when the file given cannot be read, specattn::contract_error when it is for other models
std::optional<specattn::alignment> find_alignment(const std::filesystem::path& given, const session& with);

}  // namespace mini_llm
