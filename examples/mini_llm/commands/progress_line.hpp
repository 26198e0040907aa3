// One line of progress that rewrites itself.
#pragma once

#include <chrono>
#include <ostream>
#include <string>

namespace mini_llm {

/// Shows the newest state at most ten times a second, and clears the line when it goes. Silent off a terminal.
class progress_line {
 public:
  explicit progress_line(std::ostream& out);
  ~progress_line();
  progress_line(const progress_line&) = delete;
  progress_line& operator=(const progress_line&) = delete;

  void show(const std::string& state);

 private:
  std::ostream* out_;
  bool on_terminal_;
  std::size_t shown_ = 0;
  std::chrono::steady_clock::time_point next_{};
};

}  // namespace mini_llm
