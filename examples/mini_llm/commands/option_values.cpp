#include "option_values.hpp"

#include <charconv>
#include <system_error>

#include "command_input.hpp"
#include "input_error.hpp"
#include "json_document.hpp"

namespace mini_llm {
namespace {

template <class Number>
std::optional<Number> parse(std::string_view text) {
  Number value{};
  const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (failed != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::string shown(double value) { return print("%.9g", value); }

[[noreturn]] void refuse(const std::string& names, std::string_view text, const std::string& expected) {
  std::string quoted = in_quotes(text);  // cut short, and free of what would break the line
  quoted.front() = quoted.back() = '\'';
  throw input_error(names, quoted + " is no " + expected);
}

template <class Number>
CLI::Option* add_read_number(CLI::App& command, const std::string& names, Number& value, double low, double high,
                             const std::string& help) {
  const auto read = [names, low, high, &value](const CLI::results_t& given) {
    value = static_cast<Number>(read_number(names, given.back(), low, high));
    return true;
  };
  const auto print_default = [&value] { return shown(static_cast<double>(value)); };
  return command.add_option(names, read, help, true, print_default)->type_name("NUMBER");
}

}  // namespace

std::int32_t read_integer(const std::string& names, std::string_view text, std::int32_t low, std::int32_t high) {
  const std::optional<std::int32_t> value = parse<std::int32_t>(text);
  if (value && *value >= low && *value <= high) return *value;
  refuse(names, text, "integer from " + std::to_string(low) + " to " + std::to_string(high));
}

double read_number(const std::string& names, std::string_view text, double low, double high) {
  const std::optional<double> value = parse<double>(text);
  if (value && *value >= low && *value <= high) return *value;  // which NaN is not
  refuse(names, text, "number from " + shown(low) + " to " + shown(high));
}

CLI::Option* add_integer(CLI::App& command, const std::string& names, std::int32_t& value, std::int32_t low,
                         std::int32_t high, const std::string& help) {
  const auto read = [names, low, high, &value](const CLI::results_t& given) {
    value = read_integer(names, given.back(), low, high);
    return true;
  };
  // No limit is no number to be shown as one.
  const auto print_default = [&value] { return value == any_count ? "no limit" : std::to_string(value); };
  return command.add_option(names, read, help, true, print_default)->type_name("INTEGER");
}

CLI::Option* add_number(CLI::App& command, const std::string& names, float& value, double low, double high,
                        const std::string& help) {
  return add_read_number(command, names, value, low, high, help);
}

CLI::Option* add_number(CLI::App& command, const std::string& names, double& value, double low, double high,
                        const std::string& help) {
  return add_read_number(command, names, value, low, high, help);
}

CLI::Option* add_seed(CLI::App& command, const std::string& names, std::optional<std::uint64_t>& value,
                      const std::string& help) {
  const auto read = [names, &value](const CLI::results_t& given) {
    const std::string& text = given.back();
    value = parse<std::uint64_t>(text);
    const std::optional<std::int64_t> below_zero = parse<std::int64_t>(text);
    if (!value && !(below_zero && *below_zero < 0)) {
      refuse(names, text, "seed: an integer from -9223372036854775808 to 18446744073709551615");
    }
    return true;
  };
  const auto print_default = [&value] { return value ? std::to_string(*value) : "random"; };
  return command.add_option(names, read, help, true, print_default)->type_name("INTEGER");
}

void refuse_empty_values(CLI::App& command, const CLI::Option* except) {
  for (CLI::Option* option : command.get_options({})) {
    if (option == except || option->get_items_expected_max() == 0) continue;
    const std::string names = option->get_name(false, true);
    option->check([names](const std::string& value) {
      if (value.empty()) throw input_error(names, "the value is empty (a variable that is not set?)");
      return std::string();
    });
  }
}

std::vector<std::string> plain_arguments(int count, const char* const* arguments) {
  std::vector<std::string> plain;
  for (int i = 0; i < count; ++i) {
    std::string argument = arguments[i];
    if (argument == "-md" || argument.starts_with("-md=")) argument.replace(0, 3, "--model-draft");
    const bool names_nothing = argument.starts_with("--") && argument.find('=') == argument.size() - 1;
    if (names_nothing) argument.pop_back();
    plain.push_back(std::move(argument));
    if (names_nothing) plain.emplace_back();
  }
  return plain;
}

}  // namespace mini_llm
