// What the library throws, and the one place it throws from.
#pragma once

#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "config.hpp"

namespace specattn::inline SPECATTN_DATA {

/// The caller broke a stated precondition. The message names the operation and the values.
struct contract_error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// A device or its runtime failed (no GPU, a launch that did not start, an asynchronous fault).
struct device_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Called in place of a throw where exceptions are disabled. It must not return.
using failure_handler = void (*)(const char* message);

/// The one handler of a process, whatever its files were compiled for.
struct failure_handling {
  static inline failure_handler handler = nullptr;
};

}  // namespace specattn::inline SPECATTN_DATA

namespace specattn::inline SPECATTN_CODE {

/// Sets what happens on an error under -fno-exceptions (ignored otherwise). Not thread-safe: set it once at start.
inline void set_failure_handler(failure_handler handler) { failure_handling::handler = handler; }

namespace detail {

inline void append_part(std::string& text, std::string_view part) { text += part; }
template <class Number>
  requires std::is_arithmetic_v<Number>
void append_part(std::string& text, Number number) { text += std::to_string(number); }

/// The only throw point of the library.
template <class Error>
[[noreturn]] void raise(const std::string& message) {
#if defined(__cpp_exceptions)
  if constexpr (std::is_constructible_v<Error, const std::string&>) {
    throw Error(message);
  } else {
    throw Error();  // std::bad_alloc, which holds no text
  }
#else
  if (failure_handling::handler != nullptr) failure_handling::handler(message.c_str());
  std::abort();  // a handler must not return, and without exceptions there is nobody else to tell
#endif
}

/// Throws contract_error made of `parts` unless `holds`.
template <class... Parts>
void expects(bool holds, const Parts&... parts) {
  if (holds) [[likely]]
    return;
  std::string message;
  (append_part(message, parts), ...);
  raise<contract_error>(message);
}

/// Runs `work`; returns what it threw, or null. Without exceptions an error does not come back.
template <class Work>
std::exception_ptr attempt(Work&& work) {
#if defined(__cpp_exceptions)
  try {
    work();
  } catch (...) {
    return std::current_exception();
  }
#else
  work();
#endif
  return nullptr;
}

/// Runs `undo` when the scope ends, by an exception or early, unless it was dismissed. `undo` must not throw.
template <class Undo>
class undo_scope {
 public:
  explicit undo_scope(Undo undo) : undo_(std::move(undo)) {}
  undo_scope(const undo_scope&) = delete;
  undo_scope& operator=(const undo_scope&) = delete;
  ~undo_scope() {
    if (armed_) undo_();
  }
  void dismiss() { armed_ = false; }

 private:
  Undo undo_;
  bool armed_ = true;
};

}  // namespace detail
}  // namespace specattn::inline SPECATTN_CODE
