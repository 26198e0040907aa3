#include "progress_line.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace mini_llm {
namespace {

bool errors_go_to_a_terminal() {
#if defined(__unix__) || defined(__APPLE__)
  return isatty(STDERR_FILENO) == 1;
#else
  return false;
#endif
}

}  // namespace

progress_line::progress_line(std::ostream& out) : out_(&out), on_terminal_(errors_go_to_a_terminal()) {}

progress_line::~progress_line() {
  if (shown_ > 0) *out_ << '\r' << std::string(shown_, ' ') << '\r' << std::flush;
}

void progress_line::show(const std::string& state) {
  const auto now = std::chrono::steady_clock::now();
  if (!on_terminal_ || now < next_) return;
  next_ = now + std::chrono::milliseconds(100);
  *out_ << '\r' << state;
  if (state.size() < shown_) *out_ << std::string(shown_ - state.size(), ' ');
  *out_ << std::flush;
  shown_ = state.size();
}

}  // namespace mini_llm
