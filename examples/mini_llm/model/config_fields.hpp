#pragma once

#include <string>
#include <string_view>

#include "json_document.hpp"

namespace mini_llm {

/// Refuses fields of config.json that would change the arithmetic and that nobody here reads: biases, factors on
/// embeddings, residuals, attention or logits, soft caps, other norms, partial rotation, experts, quantisation and
/// their kind, each unless its value is the one that changes nothing (false, null, 0, a factor of 1). Fields are known
/// by the words of their names, so that one that is invented tomorrow is not read past. Other unknown fields are
/// harmless.
/// \throws input_error naming the field and its value
void refuse_unread_fields(const json_field& root);

/// Python writes NaN, Infinity and -Infinity, which JSON does not have. Here they become texts: refused where a number
/// matters, and no reason to refuse a file that has them elsewhere.
std::string quote_python_numbers(std::string_view text);

}  // namespace mini_llm
