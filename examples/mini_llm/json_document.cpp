#include "json_document.hpp"

#include <cstddef>
#include <vector>

#include "input_error.hpp"

namespace mini_llm {
namespace {

using json = nlohmann::json;

/// Builds the document as nlohmann's own builder does, and counts depth and repeated names.
class strict_builder : public nlohmann::json_sax<json> {
 public:
  explicit strict_builder(std::size_t max_memory) : max_memory_(max_memory) {}

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(json::number_integer_t value) override { return add(value); }
  bool number_unsigned(json::number_unsigned_t value) override { return add(value); }
  bool number_float(json::number_float_t value, const json::string_t&) override { return add(value); }
  bool string(json::string_t& value) override { return fits(string_memory + value.size()) && add(std::move(value)); }
  bool binary(json::binary_t&) override { return fault("binary data"); }
  bool start_object(std::size_t) override { return open(json::object()); }
  bool end_object() override { return close(); }
  bool start_array(std::size_t) override { return open(json::array()); }
  bool end_array() override { return close(); }

  bool key(json::string_t& name) override {
    if (!fits(member_memory + name.size())) return false;
    const auto [place, fresh] = open_.back()->get_ref<json::object_t&>().emplace(name, nullptr);
    if (!fresh) return fault("the name " + in_quotes(name) + " is given twice in one object");
    member_ = &place->second;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    // The library's text starts with "[json.exception.…] "; the rest is for people.
    const std::string text = error.what();
    const std::size_t bracket = text.find("] ");
    return fault("malformed JSON at byte " + std::to_string(position) + ": " +
                 (bracket == std::string::npos ? text : text.substr(bracket + 2)));
  }

  json take() { return std::move(root_); }
  const std::string& problem() const { return problem_; }

 private:
  bool fault(std::string problem) {
    problem_ = std::move(problem);
    return false;
  }

  // What the allocator adds and what a growing array leaves unused included.
  static constexpr std::size_t value_memory = 2 * sizeof(json);
  static constexpr std::size_t string_memory = sizeof(std::string) + 16;
  static constexpr std::size_t container_memory = sizeof(json::object_t) + 16;
  static constexpr std::size_t member_memory = sizeof(json::object_t::value_type) + 48;

  bool fits(std::size_t bytes) {
    memory_ += bytes;
    if (memory_ <= max_memory_) return true;
    return fault("the document takes more than " + std::to_string(max_memory_) + " bytes of memory (" +
                 std::to_string(values_) + " values so far)");
  }

  json* place(json&& value) {
    ++values_;
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (open_.back()->is_array()) {
      auto& elements = open_.back()->get_ref<json::array_t&>();
      elements.push_back(std::move(value));
      return &elements.back();
    }
    *member_ = std::move(value);
    return member_;
  }

  bool add(json value) {
    if (!fits(value_memory)) return false;
    place(std::move(value));
    return true;
  }

  bool open(json&& container) {
    if (open_.size() >= static_cast<std::size_t>(max_json_depth)) {
      return fault("nested deeper than " + std::to_string(max_json_depth) + " levels");
    }
    if (!fits(value_memory + container_memory)) return false;
    open_.push_back(place(std::move(container)));
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  json root_;
  // Pointers stay good: only the innermost container grows, and its address is its parent's.
  std::vector<json*> open_;
  json* member_ = nullptr;
  std::size_t max_memory_;
  std::size_t memory_ = 0;
  std::size_t values_ = 0;
  std::string problem_;
};

}  // namespace

json parse_json(std::string_view text, std::string_view source, std::size_t max_memory) {
  strict_builder builder(max_memory);
  if (!json::sax_parse(text.begin(), text.end(), &builder)) {
    throw input_error(source, builder.problem());
  }
  return builder.take();
}

std::string in_quotes(std::string_view text) {
  constexpr std::size_t longest = 80;
  std::string shown = "\"";
  for (const char c : text.substr(0, longest)) {
    const auto byte = static_cast<unsigned char>(c);
    shown += (byte < 0x20 || byte == 0x7f) ? '?' : c;
  }
  // A cut may leave part of a character behind; drop it.
  if (text.size() > longest) {
    while (!shown.empty() && (static_cast<unsigned char>(shown.back()) & 0x80) != 0) {
      shown.pop_back();
    }
    shown += "...";
  }
  return shown + "\"";
}

json_field json_field::at(std::string_view name) const {
  if (auto member = find(name)) return *std::move(member);
  refuse("the field " + in_quotes(name) + " is missing");
}

std::optional<json_field> json_field::find(std::string_view name) const {
  const auto& members = object().get_ref<const json::object_t&>();
  const auto member = members.find(name);
  if (member == members.end() || member->second.is_null()) return std::nullopt;
  constexpr std::size_t longest = 80;  // a name may come from the file itself, and stands in messages
  const std::string shown(name.size() <= longest ? name : "...");
  return json_field(member->second, source_, path_.empty() ? shown : path_ + "." + shown);
}

json_field json_field::at(std::size_t index) const {
  if (index >= size()) {
    refuse("element " + std::to_string(index) + " is missing (" + std::to_string(size()) + " given)");
  }
  return json_field((*value_)[index], source_, path_ + "[" + std::to_string(index) + "]");
}

std::size_t json_field::size() const { return array().size(); }

std::int64_t json_field::integer(std::int64_t low, std::int64_t high) const {
  const std::string range = "an integer from " + std::to_string(low) + " to " + std::to_string(high);
  if (!value_->is_number_integer()) expected(range);
  if (value_->is_number_unsigned() && value_->get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX)) {
    expected(range);
  }
  const auto value = value_->get<std::int64_t>();
  if (value < low || value > high) expected(range);
  return value;
}

double json_field::number(double low, double high) const {
  const std::string range = "a number from " + json(low).dump() + " to " + json(high).dump();
  if (!value_->is_number()) expected(range);
  const auto value = value_->get<double>();
  if (!(value >= low && value <= high)) expected(range);
  return value;
}

bool json_field::boolean() const {
  if (!value_->is_boolean()) expected("true or false");
  return value_->get<bool>();
}

const std::string& json_field::text() const {
  if (!value_->is_string()) expected("a string");
  return value_->get_ref<const std::string&>();
}

const json& json_field::object() const {
  if (!value_->is_object()) expected("an object");
  return *value_;
}

const json& json_field::array() const {
  if (!value_->is_array()) expected("an array");
  return *value_;
}

void json_field::refuse(const std::string& problem) const {
  throw input_error(source_, path_.empty() ? problem : path_ + ": " + problem);
}

void json_field::expected(const std::string& what) const {
  std::string got;
  if (value_->is_string()) {
    got = in_quotes(value_->get_ref<const std::string&>());
  } else if (value_->is_structured()) {
    got = value_->is_array() ? "an array" : "an object";
  } else {
    got = value_->dump();
  }
  refuse(what + " expected, got " + got);
}

}  // namespace mini_llm
