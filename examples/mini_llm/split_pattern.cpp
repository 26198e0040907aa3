#define PCRE2_CODE_UNIT_WIDTH 8
#include "split_pattern.hpp"

#include <pcre2.h>

#include <algorithm>
#include <array>

#include "input_error.hpp"
#include "json_document.hpp"
#include "utf8.hpp"

namespace mini_llm {
namespace {

constexpr std::size_t max_expression_bytes = 4096;
constexpr std::uint32_t max_backtracking_kib = 64 * 1024;

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

struct free_compile_context {
  void operator()(pcre2_compile_context* p) const { pcre2_compile_context_free(p); }
};
struct free_match_context {
  void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
};
struct free_match_data {
  void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
};

template <class T>
T* checked(T* pointer) {
  if (pointer == nullptr) throw std::bad_alloc();
  return pointer;
}

PCRE2_SPTR as_pcre2(std::string_view text) { return reinterpret_cast<PCRE2_SPTR>(text.data()); }

}  // namespace

split_pattern::split_pattern(const std::string& expression, bool drop_gaps, std::string_view source)
    : drop_gaps_(drop_gaps), source_(source) {
  if (expression.empty() || expression.size() > max_expression_bytes) {
    throw input_error(source, "a split pattern of " + std::to_string(expression.size()) + " bytes (1 to " +
                                  std::to_string(max_expression_bytes) + " are accepted)");
  }
  const std::unique_ptr<pcre2_compile_context, free_compile_context> context(
      checked(pcre2_compile_context_create(nullptr)));
  int error = 0;
  PCRE2_SIZE error_at = 0;
  pcre2_code* const code =
      pcre2_compile(as_pcre2(expression), expression.size(), PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error,
                    &error_at, context.get());
  if (code == nullptr) {
    throw input_error(source, "the split pattern " + in_quotes(expression) + " does not compile: " +
                                  pcre2_message(error) + " at byte " + std::to_string(error_at));
  }
  code_.reset(code, [](pcre2_code* p) { pcre2_code_free(p); });
}

void split_pattern::split(std::string_view text, std::vector<std::string_view>& pieces) const {
  const std::unique_ptr<pcre2_match_context, free_match_context> context(
      checked(pcre2_match_context_create(nullptr)));
  const std::unique_ptr<pcre2_match_data, free_match_data> match(checked(pcre2_match_data_create(1, nullptr)));
  // The patterns in use backtrack over one run of spaces at most, hence by the text's length.
  const std::size_t steps = std::min<std::size_t>(1'000'000 + 4 * text.size(), 0xffffffffU);
  pcre2_set_match_limit(context.get(), static_cast<std::uint32_t>(steps));
  pcre2_set_heap_limit(context.get(), max_backtracking_kib);

  const auto add = [&](std::size_t begin, std::size_t end) {
    if (begin < end) pieces.push_back(text.substr(begin, end - begin));
  };
  std::size_t cut = 0;   // everything before it is in pieces
  std::size_t from = 0;  // where the next match is sought
  while (from < text.size()) {
    const int found =
        pcre2_match(code_.get(), as_pcre2(text), text.size(), from, PCRE2_NO_UTF_CHECK, match.get(), context.get());
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) throw input_error(source_, "the split pattern failed on the text: " + pcre2_message(found));
    const PCRE2_SIZE* const range = pcre2_get_ovector_pointer(match.get());
    if (range[1] <= range[0] || range[0] < cut) {  // an empty match cuts nothing; look one character on
      from = std::max(from, std::min<std::size_t>(range[1], text.size()));
      if (from < text.size()) from += read_utf8(text, from).length;
      continue;
    }
    if (!drop_gaps_) add(cut, range[0]);
    add(range[0], range[1]);
    cut = from = range[1];
  }
  if (!drop_gaps_) add(cut, text.size());
}

}  // namespace mini_llm
