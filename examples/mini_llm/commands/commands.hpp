// The program's subcommands. Each function registers one, with its flags and what it runs.
#pragma once

#include <CLI/CLI.hpp>

namespace mini_llm {

/// Writes text after a prompt: the main job.
void add_generate_command(CLI::App& app);
/// Fits an alignment from a text and shows it.
void add_calibrate_command(CLI::App& app);
/// Perplexity and reduction of every guide: the paper's protocol.
void add_perplexity_command(CLI::App& app);
/// Prefill and decode rates by depth of context.
void add_bench_command(CLI::App& app);

}  // namespace mini_llm
