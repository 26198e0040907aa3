// The flags that commands share.
#pragma once

#include <CLI/CLI.hpp>

#include "session.hpp"

namespace mini_llm {

/// The least share of its pages that a guide can keep.
inline constexpr double least_share = 1e-6;

/// All that a decoding command takes.
void add_session_flags(CLI::App& command, session_options& options);

// Parts of it, for the commands that take these alone.
void add_alignment_flag(CLI::App& command, session_options& options);
void add_device_flag(CLI::App& command, session_options& options);
void add_keep_flag(CLI::App& command, session_options& options);
void add_recording_flags(CLI::App& command, session_options& options);
void add_dense_flags(CLI::App& command, session_options& options);

}  // namespace mini_llm
