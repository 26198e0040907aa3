#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

struct pcre2_real_code_8;

namespace mini_llm {

// A step is one item of an expression tried at one place, or one byte that the search moves by. The expressions in use
// need 5 a byte, on texts made for them 25, and a model has up to eight of them.
inline constexpr std::size_t split_steps_per_byte = 256;
inline constexpr std::size_t split_steps_allowance = 1'000'000;

/// Ranges of all the expressions of a tokenizer that have a part without regard to case. PCRE2 looks at every
/// character of such a range ([\x{100}-\x{10ffff}]: 8 ms) to compile it. The expressions in use have none.
inline constexpr std::size_t max_caseless_ranges = 64;

/// How many ranges an expression may compile without regard to case; none when no part of it is so.
std::size_t caseless_ranges(std::string_view expression) noexcept;

/// The steps that the patterns of a tokenizer may take on one text, all together.
class split_budget {
 public:
  /// Makes room for a stretch of the text.
  void add_text(std::size_t bytes) noexcept {
    bytes_ += bytes;
    allowed_ += bytes * split_steps_per_byte;
  }
  /// Whether there was room for so many steps.
  bool take(std::size_t steps) noexcept {
    taken_ += steps;
    return taken_ <= allowed_;
  }
  std::size_t bytes() const noexcept { return bytes_; }
  std::size_t allowed() const noexcept { return allowed_; }

 private:
  std::size_t bytes_ = 0;
  std::size_t allowed_ = split_steps_allowance;
  std::size_t taken_ = 0;
};

/// A regular expression that cuts text into pieces: every match is a piece, and so is every stretch
/// between matches (unless those are dropped).
///
/// Character classes follow Unicode (\p{L}, \s, \d). Two differences from the engines tokenizers
/// are written with are known: \s also takes U+180E, and characters newer than Unicode 14 are
/// unassigned.
class split_pattern {
 public:
  /// \param drop_gaps stretches between matches are left out instead of becoming pieces
  /// \param source    file name for messages
  /// \throws input_error when the expression does not compile, is longer than 4 KiB, refers back to a
  ///         group, has more than 32 that capture or repeats something a thousand times
  split_pattern(const std::string& expression, bool drop_gaps, std::string_view source);

  /// Appends the pieces of `text`, in order, none empty. They view `text`.
  /// \pre    text is well-formed UTF-8
  /// \param  budget what the search may cost; its steps are taken off
  /// \throws input_error when the budget is used up (a hostile expression can)
  /// \cost   linear in the text, by the budget; safe to call from many threads
  void split(std::string_view text, split_budget& budget, std::vector<std::string_view>& pieces) const;

 private:
  [[noreturn]] void refuse(int error, const split_budget& budget) const;

  std::shared_ptr<const pcre2_real_code_8> code_;
  bool drop_gaps_;
  std::string expression_;
  std::string source_;
};

}  // namespace mini_llm
