// What the model on the GPU (cuda/device_llama.cuh) does not compute.
#pragma once

#include <string_view>

#include "model_config.hpp"

namespace mini_llm {

/// Refuses a model that the CPU runs and the GPU would run wrongly: with biases, norms of queries and keys, or a factor
/// on attention. Weights are not looked at.
/// \param source the model, for the message
/// \throws input_error naming what the model has
void require_device_model(const model_config& config, std::string_view source);

}  // namespace mini_llm
