// What the measuring commands are given alike: a pair of models, texts, lists of numbers.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "session.hpp"

namespace mini_llm {

/// Registers the models, threads and the cache's type.
void add_pair_flags(CLI::App& command, session_options& options);

/// A text as tokens, and the name it goes by in tables.
struct token_text {
  std::string name;
  std::vector<std::int32_t> tokens;
};

/// Reads texts, each cut to at most `limit` tokens; "-" is standard input.
/// \throws input_error for files that cannot be read or hold fewer than `least` tokens
std::vector<token_text> read_texts(const std::vector<std::filesystem::path>& files, const loaded_model& reader,
                                   std::int32_t limit, std::int32_t least);

/// Numbers separated by commas.
/// \throws input_error naming the flag and the part that is no number in [low, high]
std::vector<double> parse_numbers(const std::string& list, const char* flag, double low, double high);
std::vector<std::int32_t> parse_integers(const std::string& list, const char* flag, std::int32_t low,
                                         std::int32_t high);

/// Text by printf's rules.
std::string print(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace mini_llm
