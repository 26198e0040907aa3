// The flags that every decoding command shares.
#pragma once

#include <CLI/CLI.hpp>

#include "session.hpp"

namespace mini_llm {

void add_session_flags(CLI::App& command, session_options& options);

}  // namespace mini_llm
