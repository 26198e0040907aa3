// Alignments as JSON text and files. The one header that needs nlohmann-json; specattn.hpp does not include it.
#pragma once

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <vector>

#include "alignment.hpp"
#include "error.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// Of the file's fields; raised when their meaning changes.
inline constexpr std::int32_t alignment_format = 1;

namespace detail {

/// Sizes beyond these are no model's: they bound what a hostile file can make us allocate.
inline constexpr std::int64_t largest_count = 1 << 30;
inline constexpr std::size_t largest_alignment_bytes = std::size_t{1} << 28;
inline constexpr int deepest_alignment = 16;

inline nlohmann::json fingerprint_json(const model_fingerprint& model) {
  return {{"name", model.name},
          {"layers", model.layers},
          {"q_heads", model.q_heads},
          {"kv_heads", model.kv_heads},
          {"head_dim", model.head_dim},
          {"vocab", model.vocab},
          {"weights", std::to_string(model.weights)}};
}

inline const nlohmann::json& field(const nlohmann::json& object, const char* name) {
  expects(object.is_object() && object.contains(name), "alignment: field '", name, "' is missing");
  return object[name];
}

/// An integer; one beyond 63 bits becomes the largest.
inline std::int64_t whole_number(const nlohmann::json& value) {
  if (!value.is_number_unsigned()) return value.get<std::int64_t>();
  return static_cast<std::int64_t>((std::min)(value.get<std::uint64_t>(), std::uint64_t{INT64_MAX}));
}

inline std::int32_t count_field(const nlohmann::json& object, const char* name, std::int64_t least,
                                std::int64_t most = largest_count) {
  const nlohmann::json& value = field(object, name);
  expects(value.is_number_integer(), "alignment: field '", name, "' is not an integer");
  const std::int64_t number = whole_number(value);
  expects(number >= least && number <= most, "alignment: field '", name, "' is ", number, ", outside ", least, " … ",
          most);
  return static_cast<std::int32_t>(number);
}

inline std::string text_field(const nlohmann::json& object, const char* name) {
  const nlohmann::json& value = field(object, name);
  expects(value.is_string(), "alignment: field '", name, "' is not a string");
  return value.get<std::string>();
}

inline model_fingerprint read_fingerprint(const nlohmann::json& document, const char* name) {
  const nlohmann::json& object = field(document, name);
  model_fingerprint model;
  model.name = text_field(object, "name");
  model.layers = count_field(object, "layers", 1, largest_model_part);
  model.q_heads = count_field(object, "q_heads", 1, largest_model_part);
  model.kv_heads = count_field(object, "kv_heads", 1, largest_model_part);
  model.head_dim = count_field(object, "head_dim", 0);
  model.vocab = count_field(object, "vocab", 0);
  const std::string hash = text_field(object, "weights");
  expects(!hash.empty() && hash.size() <= 20 && hash.find_first_not_of("0123456789") == std::string::npos,
          "alignment: field 'weights' of the ", name, " is '", std::string_view(hash).substr(0, 32), "', not a hash");
  const auto parsed = std::from_chars(hash.data(), hash.data() + hash.size(), model.weights);
  expects(parsed.ec == std::errc{}, "alignment: field 'weights' of the ", name, " is ", hash, ", beyond 64 bits");
  return model;
}

template <class Number>
std::vector<Number> read_numbers(const nlohmann::json& document, const char* name, std::size_t size) {
  const nlohmann::json& array = field(document, name);
  expects(array.is_array() && array.size() == size, "alignment: field '", name, "' is no array of ", size,
          " numbers");
  std::vector<Number> numbers;
  numbers.reserve(size);
  for (const nlohmann::json& value : array) {
    const bool fits = std::is_integral_v<Number> ? value.is_number_integer() : value.is_number();
    expects(fits, "alignment: field '", name, "' holds something that is no ",
            std::is_integral_v<Number> ? "integer" : "number");
    if constexpr (std::is_integral_v<Number>) {
      const std::int64_t wide = whole_number(value);
      expects(wide >= 0 && wide <= INT32_MAX, "alignment: field '", name, "' holds ", wide);
      numbers.push_back(static_cast<Number>(wide));
    } else {
      const auto wide = value.get<double>();  // checked before it is narrowed, which would be undefined
      expects(std::abs(wide) <= static_cast<double>((std::numeric_limits<Number>::max)()), "alignment: field '", name,
              "' holds ", wide);
      numbers.push_back(static_cast<Number>(wide));
    }
  }
  return numbers;
}

inline signal_set read_signals(const nlohmann::json& document, const model_fingerprint& draft) {
  const nlohmann::json& object = field(document, "signals");
  signal_set signals;
  signals.draft_layers = draft.layers;
  signals.draft_q_heads = draft.q_heads;
  const nlohmann::json& windows = field(object, "windows");
  expects(windows.is_array() && windows.size() <= 64, "alignment: field 'windows' is no array of at most 64 numbers");
  signals.windows = read_numbers<std::int32_t>(object, "windows", windows.size());
  signals.sinks = count_field(object, "sinks", 0);
  const nlohmann::json& history = field(object, "history");
  expects(history.is_boolean(), "alignment: field 'history' is neither true nor false");
  signals.history = history.get<bool>();
  return signals;
}

}  // namespace detail

/// The alignment as JSON text. Numbers come back to the bit; a name that is not UTF-8 does not.
/// \throws contract_error for an alignment that does not pass check()
inline std::string to_json_text(const alignment& from) {
  from.check();
  return nlohmann::json{
             {"specattn_alignment", alignment_format},
             {"draft", detail::fingerprint_json(from.draft)},
             {"target", detail::fingerprint_json(from.target)},
             {"signals",
              {{"windows", from.signals.windows}, {"sinks", from.signals.sinks}, {"history", from.signals.history}}},
             {"layer_map", from.layer_map},
             {"divergence", from.divergence},
             {"mixture_divergence", from.mixture_divergence},
             {"coefficients", from.coefficients}}
             .dump(1, ' ', false, nlohmann::json::error_handler_t::replace) +  // a name may be no UTF-8
         "\n";
}

/// \throws contract_error for text that is not such a document, naming what is wrong
inline alignment from_json_text(std::string_view text) {
  using nlohmann::json;
  detail::expects(text.size() <= detail::largest_alignment_bytes, "alignment: ", text.size(), " bytes are too many");
  // The parser keeps its own stack, but destroying a deep document recurses: refuse depth while reading.
  bool too_deep = false;
  const json document = json::parse(
      text.begin(), text.end(),
      [&](int depth, json::parse_event_t, json&) {
        too_deep = too_deep || depth > detail::deepest_alignment;
        return depth <= detail::deepest_alignment;
      },
      false);
  detail::expects(!document.is_discarded() && !too_deep, "alignment: the text is no JSON document of an alignment");
  detail::expects(document.is_object() && document.contains("specattn_alignment"),
                  "alignment: the document has no field 'specattn_alignment'");
  const std::int32_t format = detail::count_field(document, "specattn_alignment", 0);
  detail::expects(format == alignment_format, "alignment: format ", format, ", this library reads ",
                  alignment_format);
  alignment result;
  result.draft = detail::read_fingerprint(document, "draft");
  result.target = detail::read_fingerprint(document, "target");
  result.signals = detail::read_signals(document, result.draft);
  const auto layers = static_cast<std::size_t>(result.target.layers);
  const std::size_t groups = layers * static_cast<std::size_t>(result.target.kv_heads);
  result.layer_map = detail::read_numbers<std::int32_t>(document, "layer_map", layers);
  result.divergence =
      detail::read_numbers<float>(document, "divergence", layers * static_cast<std::size_t>(result.draft.layers));
  result.mixture_divergence = detail::read_numbers<float>(document, "mixture_divergence", groups);
  result.coefficients = detail::read_numbers<float>(document, "coefficients",
                                                    groups * static_cast<std::size_t>(result.signals.count()));
  result.check();
  return result;
}

/// Writes the file whole or not at all: under another name in the same directory first, then renamed.
/// \throws contract_error when `from` is inconsistent or the file cannot be written; what was there stays
inline void save_alignment(const alignment& from, const std::string& path) {
  const std::string text = to_json_text(from);
  const std::string partial = path + ".partial";
  std::error_code failed;
  bool written = false;
  errno = 0;
  {
    std::ofstream out(partial, std::ios::binary);
    out.write(text.data(), static_cast<std::streamsize>(text.size()));
    out.close();
    written = static_cast<bool>(out);
    if (!written) failed = std::error_code(errno, std::generic_category());
  }
  if (written) std::filesystem::rename(partial, path, failed);
  if (written && !failed) return;
  std::error_code ignored;
  std::filesystem::remove(partial, ignored);
  detail::expects(false, "alignment: '", path, "' cannot be written: ", failed.message());
}

/// \throws contract_error, naming the file, when it cannot be read or is not an alignment
inline alignment load_alignment(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  detail::expects(static_cast<bool>(in), "alignment: '", path, "' cannot be opened");
  std::string text;
  for (char part[1 << 14];
       in.read(part, sizeof part), in.gcount() > 0 && text.size() <= detail::largest_alignment_bytes;) {
    text.append(part, static_cast<std::size_t>(in.gcount()));
  }
#if defined(__cpp_exceptions)
  try {
    return from_json_text(text);
  } catch (const contract_error& error) {
    detail::raise<contract_error>("'" + path + "': " + error.what());
  }
#else
  return from_json_text(text);  // the message lacks the file's name: nothing can be caught to add it
#endif
}

/// The same, and refuses an alignment made for other models.
/// \throws contract_error naming both models and their values
inline alignment load_alignment(const std::string& path, const model_fingerprint& draft,
                                const model_fingerprint& target) {
  alignment found = load_alignment(path);
  const auto describe = [](const model_fingerprint& m) {
    return "'" + m.name + "' (" + std::to_string(m.layers) + " layers, " + std::to_string(m.q_heads) + "/" +
           std::to_string(m.kv_heads) + " heads of " + std::to_string(m.head_dim) + ", vocab " +
           std::to_string(m.vocab) + ", weights " + std::to_string(m.weights) + ")";
  };
  detail::expects(found.draft.matches(draft), "alignment: '", path, "' is for the draft ", describe(found.draft),
                  ", this one is ", describe(draft));
  detail::expects(found.target.matches(target), "alignment: '", path, "' is for the target ", describe(found.target),
                  ", this one is ", describe(target));
  return found;
}

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
