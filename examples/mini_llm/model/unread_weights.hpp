#pragma once

#include <span>
#include <string>

#include "model_config.hpp"
#include "model_files.hpp"

namespace mini_llm {

/// Refuses files with a tensor that the model would not read: left out silently, a bias or a norm makes another model
/// of it. Harmless by name are tables of rotary angles, which follow from config.json, and lm_head.weight where
/// config.json ties it to the embedding and it is the same.
/// \param read what the model reads
/// \throws input_error naming file and tensor, why it is not read, and how many others there are
void refuse_unread_weights(const model_config& config, const model_files& files, std::span<const std::string> read);

}  // namespace mini_llm
