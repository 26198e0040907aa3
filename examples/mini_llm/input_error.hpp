#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace mini_llm {

/// Something the user gave is wrong: a file is missing, cut short, malformed or not supported.
/// The message names the file, the field and the values, and is fit to be shown as it is.
struct input_error : std::runtime_error {
  using std::runtime_error::runtime_error;

  /// \param source  file the fault is in
  /// \param problem what is wrong there, naming the field and its value
  input_error(std::string_view source, std::string_view problem)
      : std::runtime_error(std::string(source) + ": " + std::string(problem)) {}
};

}  // namespace mini_llm
