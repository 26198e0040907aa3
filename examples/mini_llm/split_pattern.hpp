#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

struct pcre2_real_code_8;

namespace mini_llm {

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
  /// \throws input_error when the expression does not compile
  split_pattern(const std::string& expression, bool drop_gaps, std::string_view source);

  /// Appends the pieces of `text`, in order, none empty. They view `text`.
  /// \pre    text is well-formed UTF-8
  /// \throws input_error when the expression backtracks beyond a bound (a hostile one can)
  /// \cost   linear in the text for the expressions in use; safe to call from many threads
  void split(std::string_view text, std::vector<std::string_view>& pieces) const;

 private:
  std::shared_ptr<const pcre2_real_code_8> code_;
  bool drop_gaps_;
  std::string source_;
};

}  // namespace mini_llm
