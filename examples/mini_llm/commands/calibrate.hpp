// `mini_llm calibrate`: fits an alignment from texts, or from text that the target samples itself.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "command_input.hpp"
#include "session.hpp"
#include "specattn/cpu/calibrate.hpp"

namespace mini_llm {

struct calibrate_options {
  session_options pair;
  std::vector<std::filesystem::path> files;  ///< none: the target samples its own text
  std::int32_t tokens = 2048;                ///< of each text
  std::optional<std::uint64_t> seed = 1;     ///< of a sampled text; nothing: a random one
  specattn::calibration_options fit;
  std::string windows = "16,64,256";
  std::filesystem::path out = "alignment.json";
  std::string plot;  ///< prefix of the pictures' names; empty: none
  bool json = false;
};

/// `with` is opened with the guide none.
/// Text that the target samples after its beginning-of-text token: temperature 0.8, top-p 0.95.
token_text sample_text(session& with, std::int32_t tokens, std::uint64_t seed);

/// Reads the texts with both models and fits. The alignment names the models and the hashes of their weights.
specattn::calibration calibrate_pair(session& with, const std::vector<token_text>& texts,
                                     const specattn::calibration_options& options);

/// The whole command. \throws input_error, specattn::contract_error
void run_calibrate(const calibrate_options& options);

}  // namespace mini_llm
