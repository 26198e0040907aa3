#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "input_error.hpp"
#include "nfc.hpp"
#include "tokenizer_file.hpp"

namespace mini_llm {

// A file in use makes a space three bytes ("▁") and puts one such mark in front of each stretch between two added
// tokens, hence of each two bytes: less than fourfold. A chain of replacements can multiply with every step.
inline constexpr std::size_t max_text_growth = 16;
inline constexpr std::size_t text_growth_allowance = 1024;  // bytes, so that a short text may get a long prefix

/// What the steps of a tokenizer.json may make of a text of some length, in bytes: text_growth_allowance and
/// max_text_growth times the text, over all the stretches that the text is cut into.
class growth_limit {
 public:
  /// \param where part of the file for messages ("normalizer"); must outlive this
  growth_limit(std::string_view where, std::size_t given)
      : where_(where), given_(given), limit_(text_growth_allowance + max_text_growth * given) {}

  /// Asked before a text of so many bytes is made. \throws input_error when it and what is kept are too much
  void check(std::size_t bytes) const {
    if (bytes <= limit_ - kept_) return;
    throw input_error("tokenizer.json: " + std::string(where_) + ": a text of " + std::to_string(given_) +
                      " bytes grows to " + std::to_string(kept_ + bytes) + " or more (at most " +
                      std::to_string(limit_) + " are accepted, " + std::to_string(text_growth_allowance) + " and " +
                      std::to_string(max_text_growth) + " times the text)");
  }

  /// Counts a finished stretch.
  void keep(std::size_t bytes) {
    check(bytes);
    kept_ += bytes;
  }

 private:
  std::string_view where_;
  std::size_t given_;
  std::size_t limit_;
  std::size_t kept_ = 0;
};

/// \pre    `from` is not empty
/// \throws input_error when the result is past the limit, before it is made
inline std::string replace_all(std::string_view text, std::string_view from, std::string_view to,
                               const growth_limit& limit) {
  std::size_t places = 0;
  for (std::size_t at = text.find(from); at != text.npos; at = text.find(from, at + from.size())) ++places;
  const std::size_t size = text.size() - places * from.size() + places * to.size();
  limit.check(size);
  std::string result;
  result.reserve(size);
  for (std::size_t at = 0;;) {
    const std::size_t next = text.find(from, at);
    result += text.substr(at, next - at);
    if (next == text.npos) return result;
    result += to;
    at = next + from.size();
  }
}

/// The stretch after all the steps; it counts as kept.
/// \throws input_error when it is past the limit after any of them, and see require_nfc()
inline std::string normalize(const std::vector<normalizer_step>& steps, std::string_view stretch,
                             growth_limit& limit) {
  std::string text(stretch);
  for (const normalizer_step& step : steps) {
    if (step.nfc) {
      require_nfc(text);
    } else if (step.prepend) {
      limit.check(text.size() + step.to.size());
      text.insert(0, step.to);
    } else {
      text = replace_all(text, step.from, step.to, limit);
    }
  }
  limit.keep(text.size());
  return text;
}

}  // namespace mini_llm
