#include <doctest/doctest.h>
#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "damaged_input.hpp"
#include "input_error.hpp"
#include "json_document.hpp"
#include "model/model_config.hpp"
#include "text/split_pattern.hpp"
#include "text/token_finder.hpp"
#include "text/tokenizer.hpp"

// What a tokenizer.json that was made for it can ask of the reader: memory and time stay bounded, and what is refused
// is refused with the value and the limit. The limits are far from what real files have; see tokenizer_test.cpp.

using namespace mini_llm;
using nlohmann::json;

namespace {

std::atomic<std::size_t> allocated_now{0};
std::atomic<std::size_t> allocated_most{0};

/// The most memory that `action` held at once, in bytes.
template <class Action>
std::size_t memory_of(Action action) {
  const std::size_t before = allocated_now;
  allocated_most = before;
  action();
  return allocated_most - before;
}

}  // namespace

void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  void* const memory = std::malloc(size);
  const std::size_t now = allocated_now += malloc_usable_size(memory);
  if (now > allocated_most) allocated_most = now;
  return memory;
}

void* operator new(std::size_t size) {
  void* const memory = operator new(size, std::nothrow);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

__attribute__((noinline)) void operator delete(void* memory) noexcept {
  if (memory != nullptr) allocated_now -= malloc_usable_size(memory);
  std::free(memory);
}

__attribute__((noinline)) void operator delete(void* memory, std::size_t) noexcept { operator delete(memory); }

namespace {

constexpr std::size_t mebibyte = std::size_t{1} << 20;

/// A small character model: "u" is the unknown token.
json small_file() {
  return {
      {"added_tokens", json::array()},
      {"decoder", {{"type", "Fuse"}}},
      {"model",
       {{"type", "BPE"}, {"vocab", {{"u", 0}, {"a", 1}, {" ", 2}}}, {"merges", json::array()}, {"unk_token", "u"}}}};
}

json replace(const std::string& from, const std::string& to) {
  return {{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
}

json split(const std::string& expression) {
  return {{"type", "Split"}, {"pattern", {{"Regex", expression}}}, {"behavior", "Isolated"}, {"invert", false}};
}

json with(const char* field, const json& value) {
  json file = small_file();
  file[json::json_pointer(field)] = value;
  return file;
}

std::string refusal_of(const json& file) {
  const std::string text = file.dump();
  std::string message;
  // A refused file costs what it is made of, not what it would make.
  CHECK(memory_of([&] { message = refusal([&] { tokenizer::parse(text); }); }) < 40 * text.size() + mebibyte);
  return message;
}

std::string refusal_of(const json& file, const std::string& text) {
  const tokenizer t = tokenizer::parse(file.dump());
  std::string message;
  CHECK(memory_of([&] { message = refusal([&] { t.encode(text, true); }); }) < 200 * text.size() + mebibyte);
  return message;
}

void says(const std::string& message, std::initializer_list<const char*> words) {
  CAPTURE(message);
  CHECK(message.size() < 1000);
  for (const char* word : words) CHECK(message.find(word) != std::string::npos);
}

json sequence(const char* list, const json& steps) { return {{"type", "Sequence"}, {list, steps}}; }

std::string repeated(const std::string& text, std::size_t bytes) {
  std::string result;
  while (result.size() < bytes) result += text;
  return result;
}

}  // namespace

TEST_CASE("hostile tokenizer: what a step looks for or puts in has 256 bytes at most") {
  const std::string large(1'000'000, 'x');
  says(refusal_of(with("/normalizer", replace(" ", large))), {"normalizer.content", "1000000", "256"});
  says(refusal_of(with("/normalizer", replace(large, " "))), {"normalizer.pattern.String", "1000000", "256"});
  says(refusal_of(with("/normalizer", {{"type", "Prepend"}, {"prepend", large}})), {"prepend", "1000000", "256"});
  says(refusal_of(with("/decoder", replace("a", large))), {"decoder.content", "1000000", "256"});
}

TEST_CASE("hostile tokenizer: a word mark is a single character") {
  const auto mark = [](const std::string& text) { return json{{"type", "Metaspace"}, {"replacement", text}}; };
  says(refusal_of(with("/pre_tokenizer", mark(std::string(1'000'000, 'x')))), {"replacement", "single character"});
  says(refusal_of(with("/decoder", mark("__"))), {"replacement", "single character", "__"});
  json file = with("/pre_tokenizer", mark("\u2581"));
  file["decoder"] = mark("\u2581");
  CHECK(tokenizer::parse(file.dump()).encode("a a", false).size() == 4);
}

TEST_CASE("hostile tokenizer: a chain of replacements is stopped before it makes a text too long") {
  json steps = json::array();
  for (int i = 0; i < 30; ++i) steps.push_back(replace("a", repeated("a", 256)));
  const json file = with("/normalizer", sequence("normalizers", steps));
  says(refusal_of(file, repeated("a", 100'000)), {"normalizer", "100000 bytes", "25600000", "1601024"});
}

TEST_CASE("hostile tokenizer: stretches between added tokens share what the text may grow by") {
  json steps = json::array();
  for (int i = 0; i < 30; ++i) steps.push_back({{"type", "Prepend"}, {"prepend", repeated("a", 32)}});
  json file = with("/normalizer", sequence("normalizers", steps));
  file["added_tokens"].push_back({{"id", 3}, {"content", "|"}});
  says(refusal_of(file, repeated("a|", 10'000)), {"normalizer", "10000 bytes", "161024"});
}

TEST_CASE("hostile tokenizer: decoding makes little more of a vocabulary than it is") {
  json file = with("/decoder", sequence("decoders", json::array({replace("_", repeated("x", 256))})));
  for (int i = 0; i < 3000; ++i) file["model"]["vocab"]["_" + std::to_string(i)] = 3 + i;
  says(refusal_of(file), {"decoder of the vocabulary", "grows"});
  json chain = json::array();
  for (int i = 0; i < 30; ++i) chain.push_back(replace("a", repeated("a", 250)));
  says(refusal_of(with("/decoder", sequence("decoders", chain))), {"decoder", "1 bytes", "62500", "1040"});
}

TEST_CASE("hostile tokenizer: added tokens stay short when they are normalized") {
  json file = with("/normalizer", replace("-", repeated("x", 200)));
  file["added_tokens"].push_back({{"id", 3}, {"content", "---"}, {"normalized", true}});
  says(refusal_of(file), {"\"---\"", "600", "512"});
}

TEST_CASE("hostile tokenizer: many long added tokens take the memory they are made of") {
  json file = small_file();
  std::mt19937_64 random(3);
  for (int i = 0; i < 2000; ++i) {
    std::string content;
    while (content.size() < 512) content += static_cast<char>('A' + random() % 26);
    file["added_tokens"].push_back({{"id", 3 + i}, {"content", content}, {"special", true}});
  }
  const std::string text = file.dump();
  CHECK(memory_of([&] { tokenizer::parse(text); }) < 8 * text.size());
}

TEST_CASE("token_finder: finds the leftmost and there the longest token, as looking for each does") {
  std::mt19937_64 random(11);
  const auto word = [&](std::size_t longest) {
    std::string text(1 + random() % longest, 'a');
    for (char& c : text) c = "ab\xff"[random() % 3];
    return text;
  };
  for (int round = 0; round < 300; ++round) {
    std::vector<added_token> tokens(random() % 12);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      tokens[i].content = word(5);
      tokens[i].id = static_cast<std::int32_t>(i);
    }
    const std::string text = word(60);
    std::vector<std::pair<std::size_t, std::int32_t>> expected;  // where, which
    for (std::size_t at = 0; at < text.size();) {
      std::size_t longest = 0;
      for (const added_token& token : tokens) {
        if (token.content.size() < longest || text.compare(at, token.content.size(), token.content) != 0) continue;
        longest = token.content.size();
        if (!expected.empty() && expected.back().first == at) expected.pop_back();
        expected.emplace_back(at, static_cast<std::int32_t>(token.id));
      }
      at += std::max<std::size_t>(longest, 1);
    }
    std::vector<text_stretch> stretches;
    token_finder(tokens).split(text, stretches);
    std::vector<std::pair<std::size_t, std::int32_t>> found;
    std::string joined;
    for (const text_stretch& stretch : stretches) {
      if (stretch.id >= 0) found.emplace_back(joined.size(), stretch.id);
      joined += stretch.text;
    }
    CHECK(found == expected);
    CHECK(joined == text);
  }
}

TEST_CASE("hostile tokenizer: an expression that searches the rest of the text from every character is stopped") {
  const std::string text = std::string(20'000, 'a') + "z";
  for (const char* expression : {".(?=.*z)", "(?s).(?!.*z)", "a(?=(?:a|b)*+c)|.", "(a|aa)+$|b", "(?:a(?=a*+b)|a)+"}) {
    CAPTURE(expression);
    says(refusal_of(with("/pre_tokenizer", split(expression)), text),
         {"split pattern", expression, "20001 bytes", "6120256"});
  }
}

TEST_CASE("hostile tokenizer: the patterns of a chain share their steps on all the pieces of a text") {
  // Each piece alone would be within the bound.
  const json chain = {split("."), split(repeated("a?", 120) + "b")};
  says(refusal_of(with("/pre_tokenizer", sequence("pretokenizers", chain)), repeated("a", 2000)),
       {"split pattern", "2000 bytes", "1512000"});
}

TEST_CASE("hostile tokenizer: expressions whose cost cannot be counted are refused") {
  says(refusal_of(with("/pre_tokenizer", split("(.*)\\1z"))), {"(.*)\\1z", "refers back"});
  says(refusal_of(with("/pre_tokenizer", split(repeated("(x)?", 132)))), {"(x)?", "33", "32"});
  says(refusal_of(with("/pre_tokenizer", split("[^z]{5,60000}"))), {"60000", "999"});
  for (const char* expression : {"\\p{N}{1,3}", "[\\x{3040}-\\x{30FF}\\x{10000}]+", "a{2,}", "\\\\{3}"}) {
    CAPTURE(expression);
    CHECK_NOTHROW(tokenizer::parse(with("/pre_tokenizer", split(expression)).dump()));
  }
}

TEST_CASE("hostile tokenizer: patterns that take long to compile are refused") {
  const std::string ranges = "(?si)[" + repeated("\\x{100}-\\x{10ffff}", 330) + "]";
  const json chain = {split(ranges), split("[" + ranges + "]|-"), split(ranges), split(ranges)};
  says(refusal_of(with("/pre_tokenizer", sequence("pretokenizers", chain))), {"ranges", "77", "64"});
  CHECK(caseless_ranges("(?i:'s|'t)|[^\\r\\n]?[a-z0-9]+") == 2);
  CHECK(caseless_ranges("(?<in>a)(?:i)[!-/:-~]?[A-Za-z]+") == 0);
}

TEST_CASE("hostile tokenizer: tokens that are made to meet in one bucket of the hash table are refused") {
  // A file with thousands of these makes each search for a token walk through all of them.
  json file = small_file();
  const std::size_t size = 100;
  std::unordered_map<std::string_view, int> table;  // as the vocabulary's
  table.reserve(size);
  for (int i = 0; file["model"]["vocab"].size() < size; ++i) {
    const std::string text = "x" + std::to_string(i);
    if (table.bucket(text) == 0) file["model"]["vocab"][text] = file["model"]["vocab"].size();
  }
  says(refusal_of(file), {"\"x", "64", "collide"});
}

TEST_CASE("hostile tokenizer: merges that are made to meet in one bucket of the hash table are refused") {
  json file = small_file();
  const int longest = 200;
  json vocab{{"u", 0}};
  for (int i = 1; i <= longest; ++i) vocab[std::string(static_cast<std::size_t>(i), 'a')] = i;
  json merges = json::array();
  const auto hash = [](std::uint64_t left, std::uint64_t right) {  // as bpe_model's for so many merges
    std::uint64_t pair = (left << 32) | right;
    pair ^= pair >> 32;
    pair *= 0x9e3779b97f4a7c15ULL;
    return pair ^ (pair >> 29);
  };
  std::unordered_map<std::uint64_t, int> table;
  table.reserve(100);
  for (std::uint64_t left = 1; left < longest; ++left) {
    for (std::uint64_t right = 1; left + right <= longest && merges.size() < 100; ++right) {
      if (hash(left, right) % table.bucket_count() != 0) continue;
      merges.push_back({std::string(left, 'a'), std::string(right, 'a')});
    }
  }
  REQUIRE(merges.size() == 100);
  file["model"]["vocab"] = vocab;
  file["model"]["merges"] = merges;
  says(refusal_of(file), {"model.merges", "64", "collide"});
}

TEST_CASE("split_pattern: the expressions in use are far from the bound on texts made for them") {
  const std::string contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
  const std::string upper = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]";
  const std::string lower = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]";
  const std::string tail = "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
  const std::string head = "[^\\r\\n\\p{L}\\p{N}]?";
  const std::vector<std::string> expressions{
      contractions + "|" + head + "\\p{L}+" + tail,  // Llama 3, Qwen
      head + upper + "*" + lower + "+" + contractions + "?|" + head + upper + "+" + lower + "*" + contractions + "?" +
          tail,  // o200k
      "[!-/:-~]?[A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*" + tail};
  for (const std::string& expression : expressions) {
    const split_pattern pattern(expression, false, "tokenizer.json");
    for (const char* unit :
         {" ", "\n ", " \t", "a", "A", "A'", "'", "'l", "1", "1a ", "\u65e5", "\U0001f600 ", "-", "- "}) {
      CAPTURE(unit);
      const std::string text = repeated(unit, 30'000) + "x";
      split_budget budget;
      budget.add_text(text.size());
      CHECK(budget.take(budget.allowed() - 30 * text.size()));  // of 256 a byte
      std::vector<std::string_view> pieces;
      pattern.split(text, budget, pieces);
      std::string joined;
      for (const std::string_view piece : pieces) joined += piece;
      CHECK(joined == text);
    }
  }
}

TEST_CASE("hostile tokenizer: a template puts 64 tokens on either side of a text at most") {
  json single = json::array();
  for (int i = 0; i < 31; ++i) single.push_back({{"SpecialToken", {{"id", "u"}}}});
  single.push_back({{"Sequence", {{"id", "A"}}}});
  const auto file = [&](int ids) {
    const json special = {{"u", {{"ids", std::vector<int>(static_cast<std::size_t>(ids))}}}};
    return with("/post_processor", {{"type", "TemplateProcessing"}, {"single", single}, {"special_tokens", special}});
  };
  says(refusal_of(file(3)), {"post_processor.single[21]", "66", "64"});
  CHECK(tokenizer::parse(file(2).dump()).encode("", true).size() == 62);
}

TEST_CASE("hostile tokenizer: a document's memory is bounded, whatever it is made of") {
  for (const char* unit : {"0,", "[],", "{},", "\"\",", "[[]],", "{\"\":0},", "\"abcdefghijklmnopqrst\","}) {
    CAPTURE(unit);
    const std::string text = "[" + repeated(unit, mebibyte) + "0]";
    std::string message;
    CHECK(memory_of([&] { message = refusal([&] { parse_json(text, "x.json", mebibyte); }); }) < 2 * mebibyte);
    says(message, {"x.json", "1048576", "memory"});
  }
}

TEST_CASE("hostile tokenizer: long names and tokens are refused, and messages stay short") {
  json file = small_file();
  file["model"]["vocab"][std::string(100'000, 'a')] = 3;
  says(refusal_of(file), {"100000", "4096"});
  const std::string name(100'000, 'n');
  const json single = {{{"SpecialToken", {{"id", name}}}}, {{"Sequence", {{"id", "A"}}}}};
  json processor = {{"type", "TemplateProcessing"}, {"single", single}, {"special_tokens", json::object()}};
  says(refusal_of(with("/post_processor", processor)), {"nnn", "missing"});
  processor["special_tokens"][name] = {{"ids", -1}};
  says(refusal_of(with("/post_processor", processor)), {"array"});
  says(refusal_of(with("/model/vocab/a", std::vector<int>(100'000))), {"\"a\"", "an id expected"});
}

TEST_CASE("hostile config: a model has 256 end tokens at most") {
  json config = {{"architectures", {"LlamaForCausalLM"}},
                 {"hidden_size", 64},
                 {"num_hidden_layers", 1},
                 {"num_attention_heads", 1},
                 {"vocab_size", 10},
                 {"intermediate_size", 64},
                 {"max_position_embeddings", 64},
                 {"rms_norm_eps", 1e-6}};
  config["eos_token_id"] = std::vector<int>(257, 1);
  says(refusal([&] { parse_model_config(config.dump()); }), {"eos_token_id", "257", "256"});
}
