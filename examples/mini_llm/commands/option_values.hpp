// Options that are read strictly: decimal numbers within a range, nothing empty, and one line that says what is wrong.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mini_llm {

/// The most that a count without a limit of its own may be.
inline constexpr std::int32_t any_count = std::numeric_limits<std::int32_t>::max();

/// A number in decimal digits ("010" is ten), whole and from `low` to `high`.
/// \param names of the option it was given to, as CLI11 lists them ("-t,--threads")
/// \throws input_error naming the option, the value and the range
std::int32_t read_integer(const std::string& names, std::string_view text, std::int32_t low, std::int32_t high);
double read_number(const std::string& names, std::string_view text, double low, double high);

/// Adds an option whose value read_integer or read_number reads. What `value` holds is its default, shown in the help.
CLI::Option* add_integer(CLI::App& command, const std::string& names, std::int32_t& value, std::int32_t low,
                         std::int32_t high, const std::string& help);
CLI::Option* add_number(CLI::App& command, const std::string& names, float& value, double low, double high,
                        const std::string& help);
CLI::Option* add_number(CLI::App& command, const std::string& names, double& value, double low, double high,
                        const std::string& help);

/// Adds an option for a seed: all 64 bits of it, or nothing for a number below zero.
CLI::Option* add_seed(CLI::App& command, const std::string& names, std::optional<std::uint64_t>& value,
                      const std::string& help);

/// An option that is given an empty value is refused: most often the value was a variable that is not set, and what the
/// option's absence would do was not asked for.
/// \param except an option that may be empty; nullptr: none
void refuse_empty_values(CLI::App& command, const CLI::Option* except = nullptr);

/// The arguments as CLI11 can read them: "-md X", llama.cpp's spelling of --model-draft, is no -m with the value "d", and
/// "--name=" gives an empty value in place of the argument that follows.
std::vector<std::string> plain_arguments(int count, const char* const* arguments);

}  // namespace mini_llm
