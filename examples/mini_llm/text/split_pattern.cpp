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
constexpr std::uint32_t max_groups = 32;      // that capture: each step copies what they hold; real expressions: none
constexpr std::size_t max_repeat_digits = 3;  // real expressions repeat up to three times

// No optimisation may skip the steps that are counted.
constexpr std::uint32_t compile_options =
    PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C | PCRE2_AUTO_CALLOUT | PCRE2_NO_START_OPTIMIZE;

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

/// Where a search stands and what it may still cost.
struct search {
  split_budget* budget;
  std::size_t at;
};

/// PCRE2 calls this before each item of the expression. Its own match limit counts the places to which it may have
/// to go back; what a single item reads ("`.*`" inside a lookahead, from every character) shows only in how far the
/// place moved meanwhile.
int count_steps(pcre2_callout_block* block, void* data) {
  search& state = *static_cast<search*>(data);
  const std::size_t place = block->current_position;
  const std::size_t moved = place > state.at ? place - state.at : state.at - place;
  state.at = place;
  return state.budget->take(1 + moved) ? 0 : PCRE2_ERROR_MATCHLIMIT;
}

/// Whether a brace asks for so many repeats that an item could read much and fail uncounted.
bool repeats_much(std::string_view expression) {
  for (std::size_t at = 0; at < expression.size(); ++at) {
    if (expression[at] == '\\') {  // the braces of \x{3040} are no repeat
      ++at;
      if (expression.substr(at).starts_with("x{") || expression.substr(at).starts_with("o{")) ++at;
    } else if (expression[at] == '{') {
      std::size_t digits = 0;
      for (const char c : expression.substr(at + 1)) {
        digits = c >= '0' && c <= '9' ? digits + 1 : 0;
        if (digits > max_repeat_digits) return true;
        if (digits == 0 && c != ',' && c != ' ') break;
      }
    }
  }
  return false;
}

PCRE2_SPTR as_pcre2(std::string_view text) { return reinterpret_cast<PCRE2_SPTR>(text.data()); }

}  // namespace

std::size_t caseless_ranges(std::string_view expression) noexcept {
  bool caseless = false;
  for (std::size_t at = expression.find("(?"); at != expression.npos; at = expression.find("(?", at + 1)) {
    const std::string_view rest = expression.substr(at + 2);
    constexpr std::string_view flags = "^-imnsxJUabcdefghjklopqrtuvwyzDSWPT";  // those there are, and room for more
    caseless = caseless || rest.substr(0, rest.find_first_not_of(flags)).find('i') != rest.npos;
  }
  return caseless ? static_cast<std::size_t>(std::count(expression.begin(), expression.end(), '-')) : 0;
}

split_pattern::split_pattern(const std::string& expression, bool drop_gaps, std::string_view source)
    : drop_gaps_(drop_gaps), expression_(expression), source_(source) {
  if (expression.empty() || expression.size() > max_expression_bytes) {
    throw input_error(source, "a split pattern of " + std::to_string(expression.size()) + " bytes (1 to " +
                                  std::to_string(max_expression_bytes) + " are accepted)");
  }
  const std::unique_ptr<pcre2_compile_context, free_compile_context> context(
      checked(pcre2_compile_context_create(nullptr)));
  int error = 0;
  PCRE2_SIZE error_at = 0;
  pcre2_code* const code =
      pcre2_compile(as_pcre2(expression), expression.size(), compile_options, &error, &error_at, context.get());
  if (code == nullptr) {
    throw input_error(source, "the split pattern " + in_quotes(expression) + " does not compile: " +
                                  pcre2_message(error) + " at byte " + std::to_string(error_at));
  }
  code_.reset(code, [](pcre2_code* p) { pcre2_code_free(p); });
  std::uint32_t references = 0;
  std::uint32_t groups = 0;
  pcre2_pattern_info(code, PCRE2_INFO_BACKREFMAX, &references);
  pcre2_pattern_info(code, PCRE2_INFO_CAPTURECOUNT, &groups);
  const auto refuse_it = [&](const std::string& why) {
    throw input_error(source, "the split pattern " + in_quotes(expression) + why);
  };
  if (references > 0) refuse_it(" refers back to a group, which is not supported");
  if (groups > max_groups) {
    refuse_it(" has " + std::to_string(groups) + " groups that capture (at most " + std::to_string(max_groups) +
              " are accepted)");
  }
  if (repeats_much(expression)) refuse_it(" repeats something more than 999 times");
}

void split_pattern::refuse(int error, const split_budget& budget) const {
  if (error == PCRE2_ERROR_MATCHLIMIT) {
    throw input_error(source_, "the split pattern " + in_quotes(expression_) + " takes more than " +
                                   std::to_string(budget.allowed()) + " steps on a text of " +
                                   std::to_string(budget.bytes()) + " bytes (at most " +
                                   std::to_string(split_steps_allowance) + " and " +
                                   std::to_string(split_steps_per_byte) + " a byte are accepted)");
  }
  throw input_error(source_, "the split pattern " + in_quotes(expression_) + " failed on a text of " +
                                 std::to_string(budget.bytes()) + " bytes (it may go back over " +
                                 std::to_string(max_backtracking_kib) + " KiB): " + pcre2_message(error));
}

void split_pattern::split(std::string_view text, split_budget& budget, std::vector<std::string_view>& pieces) const {
  const std::unique_ptr<pcre2_match_context, free_match_context> context(
      checked(pcre2_match_context_create(nullptr)));
  const std::unique_ptr<pcre2_match_data, free_match_data> match(checked(pcre2_match_data_create(1, nullptr)));
  search state{&budget, 0};
  pcre2_set_callout(context.get(), count_steps, &state);
  pcre2_set_match_limit(context.get(),
                        static_cast<std::uint32_t>(std::min<std::size_t>(budget.allowed(), 0xffffffffU)));
  pcre2_set_heap_limit(context.get(), max_backtracking_kib);

  const auto add = [&](std::size_t begin, std::size_t end) {
    if (begin < end) pieces.push_back(text.substr(begin, end - begin));
  };
  std::size_t cut = 0;   // everything before it is in pieces
  std::size_t from = 0;  // where the next match is sought
  while (from < text.size()) {
    state.at = from;
    const int found =
        pcre2_match(code_.get(), as_pcre2(text), text.size(), from, PCRE2_NO_UTF_CHECK, match.get(), context.get());
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) refuse(found, budget);
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
