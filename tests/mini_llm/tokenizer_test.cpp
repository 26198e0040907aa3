#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "damaged_input.hpp"
#include "input_error.hpp"
#include "text/stream_decoder.hpp"
#include "text/tokenizer.hpp"
#include "text/utf8.hpp"

using namespace mini_llm;
using ids = std::vector<std::int32_t>;

namespace {

const std::vector<std::string> fixtures{"llama2", "llama2_metaspace", "metaspace_split",
                                        "llama3", "digits",           "prefix_space"};

std::string fixture_text(const std::string& name) {
  return read_all(source_path("tests/mini_llm/data/" + name + ".json"));
}

tokenizer fixture(const std::string& name) { return tokenizer::parse(fixture_text(name), {}, name + ".json"); }

tokenizer embedded() { return tokenizer::load(source_path("examples/models/books-7m")); }

const nlohmann::json& encodings() {
  static const nlohmann::json all =
      nlohmann::json::parse(read_all(source_path("tests/mini_llm/data/encodings.json")));
  return all;
}

std::string streamed(const tokenizer& t, const ids& tokens, bool skip_special = true) {
  stream_decoder stream(t, false, skip_special);
  std::string text;
  for (const std::int32_t id : tokens) {
    const std::string part = stream.push(id);
    CHECK(whole_utf8_run(part, 0) == part.size());
    text += part;
  }
  return text + stream.flush();
}

nlohmann::json fixture_json(const std::string& name) { return nlohmann::json::parse(fixture_text(name)); }

std::string refusal_of(const nlohmann::json& file, const std::string& config = {}) {
  return refusal([&] { tokenizer::parse(file.dump(), config); });
}

/// The fixture with few tokens and merges left, so that damage hits what is not a list.
std::string shrunk(const std::string& name) {
  nlohmann::json file = fixture_json(name);
  nlohmann::json& model = file["model"];
  const nlohmann::json vocab = model["vocab"];
  nlohmann::json few;
  for (const char* text :
       {"H", "e", "l", "o", "w", "r", "d", "1", "\u0120", "\u2581", "<unk>", "<s>", "</s>", "<0x0A>"}) {
    if (vocab.contains(text)) few[text] = vocab[text];
  }
  nlohmann::json merges = nlohmann::json::array();
  for (const nlohmann::json& merge : model["merges"]) {
    if (merges.size() == 6) break;
    std::string left = merge.is_string() ? merge.get<std::string>() : merge[0].get<std::string>();
    std::string right = merge.is_string() ? left.substr(left.find(' ') + 1) : merge[1].get<std::string>();
    left = left.substr(0, left.find(' '));
    for (const std::string& text : {left, right, left + right}) few[text] = vocab[text];
    merges.push_back(merge);
  }
  model["vocab"] = few;
  model["merges"] = merges;
  if (!few.contains("<unk>")) model["unk_token"] = "e";
  return file.dump();
}

template <class Action>
double seconds(Action action) {
  const auto start = std::chrono::steady_clock::now();
  action();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

TEST_CASE("tokenizer: the embedded pair's golden texts get their ids exactly and come back") {
  const tokenizer t = embedded();
  CHECK(t.vocab_size() == 4096);
  const auto golden = nlohmann::json::parse(read_all(source_path("tests/golden/tokenizer.json")));
  REQUIRE(golden.size() >= 10);
  for (const auto& entry : golden) {
    const auto text = entry["text"].get<std::string>();
    CAPTURE(text);
    const ids tokens = t.encode(text, false);
    CHECK(tokens == entry["ids"].get<ids>());
    CHECK(t.decode(tokens, false) == text);
    CHECK(streamed(t, tokens, false) == text);
  }
}

TEST_CASE("tokenizer: the embedded models begin every text with <|endoftext|>, as their configuration asks") {
  const tokenizer t = embedded();
  CHECK(t.bos_id() == 0);
  CHECK(t.eos_id() == 0);
  CHECK(t.is_special(0));
  CHECK(t.encode("", true) == ids{0});
  CHECK(t.encode("", false).empty());
  CHECK(t.encode("Hello, world!", true) == ids{0, 40, 547, 79, 12, 991, 1});
  CHECK(t.token(80) == "p");
  CHECK(t.piece(*t.find("\u0120the")) == " the");
}

TEST_CASE("tokenizer: every kind encodes and decodes as Hugging Face's tokenizers does") {
  for (const std::string& name : fixtures) {
    const tokenizer t = fixture(name);
    for (const auto& entry : encodings()[name]) {
      const auto text = entry["text"].get<std::string>();
      CAPTURE(name);
      CAPTURE(text);
      const ids tokens = t.encode(text, false);
      CHECK(tokens == entry["ids"].get<ids>());
      CHECK(t.encode(text, true) == entry["ids_special"].get<ids>());
      CHECK(replace_invalid_utf8(t.decode(tokens)) == entry["decoded"].get<std::string>());
      CHECK(replace_invalid_utf8(t.decode(tokens, false)) == entry["decoded_all"].get<std::string>());
      CHECK(streamed(t, tokens) == entry["decoded"].get<std::string>());
    }
  }
}

TEST_CASE("tokenizer: on byte level any bytes come back unchanged, UTF-8 or not") {
  std::mt19937_64 random(7);
  for (const std::string name : {"llama3", "digits"}) {
    const tokenizer t = fixture(name);
    for (int i = 0; i < 300; ++i) {
      std::string text;
      const std::size_t length = random() % 40;
      while (text.size() < length) {
        text += random() % 3 == 0 ? std::string(1, static_cast<char>(random())) : std::string("caf\u00e9 \u65e5x");
      }
      CHECK(t.decode(t.encode(text, false), false) == text);
    }
  }
}

TEST_CASE("tokenizer: bytes that are not UTF-8 fall back to byte tokens or to the unknown token") {
  const std::string text = "a\xff\xc3(\xe2\x82";
  const tokenizer fallback = fixture("llama2");
  CHECK(fallback.decode(fallback.encode(text, false)) == text);
  const tokenizer unknown = fixture("metaspace_split");
  const ids tokens = unknown.encode(text, false);
  CHECK(std::count(tokens.begin(), tokens.end(), *unknown.find("<unk>")) >= 1);
}

TEST_CASE("stream_decoder: holds at most three bytes, and flush gives what is left as U+FFFD") {
  const tokenizer t = fixture("llama2");
  const auto byte = [&](const char* spelling) { return *t.find(spelling); };
  stream_decoder stream(t);
  CHECK(stream.push(byte("<0xF0>")).empty());
  CHECK(stream.push(byte("<0x9F>")).empty());
  CHECK(stream.push(byte("<0x98>")).empty());
  CHECK(stream.push(byte("<0x80>")) == "\U0001f600");
  CHECK(stream.push(byte("<0xF0>")).empty());
  CHECK(stream.push(byte("<0x9F>")).empty());
  CHECK(stream.push(byte("<0x41>")) == "\ufffdA");
  CHECK(stream.push(byte("<0x80>")) == "\ufffd");
  CHECK(stream.push(byte("<0xE2>")).empty());
  CHECK(stream.flush() == "\ufffd");
  CHECK(stream.flush().empty());
}

TEST_CASE("stream_decoder: a continuation keeps the space that the beginning of a text drops") {
  for (const std::string name : {"llama2", "llama2_metaspace", "metaspace_split"}) {
    const tokenizer t = fixture(name);
    const ids tokens = t.encode("the end", false);
    stream_decoder beginning(t);
    stream_decoder continuation(t, true);
    CHECK(beginning.push(tokens) == "the end");
    CHECK(continuation.push(tokens) == " the end");
  }
}

TEST_CASE("tokenizer: ids outside the vocabulary have no text") {
  const tokenizer t = fixture("llama3");
  CHECK(t.decode(ids{-1, INT32_MAX, INT32_MIN, static_cast<std::int32_t>(t.vocab_size())}, false).empty());
  CHECK(t.token(-1).empty());
  CHECK(t.piece(1 << 30).empty());
  CHECK_FALSE(t.is_special(-5));
}

TEST_CASE("tokenizer: tokenizer_config.json decides whether the begin and end tokens are added") {
  const std::string file = fixture_text("llama2");
  const auto with = [&](const std::string& config) { return tokenizer::parse(file, config).encode("a", true); };
  const ids bare = tokenizer::parse(file).encode("a", false);
  const auto framed = [&](bool begin, bool end) {
    ids result = bare;
    if (begin) result.insert(result.begin(), 1);
    if (end) result.push_back(2);
    return result;
  };
  CHECK(with({}) == framed(true, false));
  CHECK(with(R"({"add_bos_token": false, "bos_token": "<s>"})") == framed(false, false));
  CHECK(
      with(
          R"({"add_bos_token": true, "bos_token": {"content": "<s>"}, "add_eos_token": true, "eos_token": "</s>"})") ==
      framed(true, true));
  CHECK(tokenizer::parse(file, R"({"eos_token": "</s>"})").eos_id() == 2);
  CHECK(refusal([&] { with(R"({"bos_token": "<bos>"})"); }).find("<bos>") != std::string::npos);
  CHECK(refusal([&] { with(R"({"add_eos_token": true})"); }).find("add_eos_token") != std::string::npos);
}

TEST_CASE("same_vocabulary: agrees with itself and names the first difference") {
  CHECK_FALSE(same_vocabulary(embedded(), tokenizer::load(source_path("examples/models/books-1m"))));
  CHECK(same_vocabulary(fixture("llama2"), fixture("llama3"))->find("token ") != std::string::npos);
  auto file = fixture_json("digits");
  const tokenizer before = tokenizer::parse(file.dump());
  auto& vocab = file["model"]["vocab"];
  std::swap(vocab["a"], vocab["b"]);
  const auto difference = same_vocabulary(before, tokenizer::parse(file.dump()));
  REQUIRE(difference);
  CHECK(difference->find("\"a\"") != std::string::npos);
}

TEST_CASE("same_vocabulary: end tokens, names of special tokens and tokens that only one has do not count") {
  const tokenizer before = tokenizer::parse(fixture_text("digits"));
  CHECK_FALSE(
      same_vocabulary(before, tokenizer::parse(fixture_text("digits"), R"({"eos_token": "<|end_of_text|>"})")));
  auto padded = fixture_json("digits");
  padded["added_tokens"].push_back({{"id", before.vocab_size()}, {"content", "<pad>"}, {"special", true}});
  CHECK_FALSE(same_vocabulary(before, tokenizer::parse(padded.dump())));
  CHECK_FALSE(same_vocabulary(tokenizer::parse(padded.dump()), before));
  auto renamed = padded;
  renamed["added_tokens"].back()["content"] = "<|pad|>";
  CHECK_FALSE(same_vocabulary(tokenizer::parse(padded.dump()), tokenizer::parse(renamed.dump())));
}

TEST_CASE("tokenizer: long words, runs of spaces and repeated marks are encoded in near-linear time") {
  // A quadratic loop takes minutes on these; the bound is loose enough for sanitizers.
  const std::size_t size = 200'000;
  std::string spaces(size, ' ');
  std::string angles(size, '<');
  std::string letters(size, 'a');
  std::string marks;
  while (marks.size() < size) marks += "<s> ";
  for (const std::string& name : fixtures) {
    const tokenizer t = fixture(name);
    for (const std::string* text : {&spaces, &angles, &letters, &marks}) {
      CAPTURE(name);
      CAPTURE(text->substr(0, 4));
      CHECK(seconds([&] { t.encode(*text, false); }) < 20.0);
    }
  }
}

TEST_CASE("tokenizer: unsupported parts are refused by name") {
  const auto with = [](const char* pointer, const char* value) {
    auto file = fixture_json("llama3");
    file[nlohmann::json::json_pointer(pointer)] = nlohmann::json::parse(value);
    return refusal_of(file);
  };
  const auto names = [](const std::string& message, const char* word) {
    CAPTURE(message);
    CHECK(message.find(word) != std::string::npos);
    CHECK(message.find("tokenizer.json") != std::string::npos);
  };
  names(with("/model/type", "\"Unigram\""), "Unigram");
  names(with("/normalizer", R"({"type": "NFKC"})"), "NFKC");
  names(with("/pre_tokenizer", R"({"type": "BertPreTokenizer"})"), "BertPreTokenizer");
  names(with("/pre_tokenizer/pretokenizers/0/behavior", "\"Contiguous\""), "Contiguous");
  names(with("/pre_tokenizer/pretokenizers/0/pattern/Regex", "\"(a\""), "does not compile");
  names(with("/pre_tokenizer/pretokenizers/0/pattern/Regex", "\"\\\\C\""), "does not compile");
  names(with("/decoder", R"({"type": "WordPiece"})"), "WordPiece");
  names(with("/post_processor", R"({"type": "BertProcessing"})"), "BertProcessing");
  names(with("/model/dropout", "0.5"), "dropout");
  names(with("/model/continuing_subword_prefix", "\"##\""), "continuing_subword_prefix");
  names(with("/model/unk_token", "\"<nowhere>\""), "<nowhere>");
  names(with("/model/vocab/a", "-3"), "-3");
  names(with("/model/vocab/a", "2000000000"), "2000000000");
  names(with("/model/vocab/a", "66"), "both have id 66");
  names(with("/model/merges/0", "[\"a\"]"), "merge 0");
  names(with("/model/merges/0", "[\"a\", \"\\u2603\"]"), "vocabulary");
  names(with("/model/merges", "{}"), "array");
  names(with("/added_tokens/0/id", "-1"), "added_tokens[0].id");
  names(with("/added_tokens/0/content", "\"\""), "added_tokens[0]");
  names(with("/post_processor/processors/1/special_tokens/<|begin_of_text|>/ids", "[99999]"), "99999");
}

TEST_CASE("tokenizer: hostile files are refused or bounded") {
  CHECK(refusal([] { tokenizer::parse(""); }).find("byte") != std::string::npos);
  CHECK(refusal([] { tokenizer::parse(std::string(1'000'000, '[')); }).find("nested") != std::string::npos);
  std::string nested = "{\"model\":";
  for (int i = 0; i < 200'000; ++i) nested += "{\"a\":";
  CHECK(refusal([&] { tokenizer::parse(nested); }).find("nested") != std::string::npos);
  CHECK(refusal([] { tokenizer::parse("{\"model\":{\"vocab\":{\"a\":0,\"a\":1},\"merges\":[]}}"); }).find("twice") !=
        std::string::npos);

  auto backtracking = fixture_json("llama3");
  backtracking["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+)+b|(?:a|aa)*c";
  const tokenizer slow = tokenizer::parse(backtracking.dump());
  CHECK(refusal([&] { slow.encode(std::string(5000, 'a'), false); }).find("split pattern") != std::string::npos);

  auto growing = fixture_json("llama2");
  growing["normalizer"]["normalizers"] = nlohmann::json::array();
  growing["added_tokens"] = nlohmann::json::array();
  for (int i = 0; i < 30; ++i) {
    growing["normalizer"]["normalizers"].push_back(
        {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aaaaaaaa"}});
  }
  const tokenizer bomb = tokenizer::parse(growing.dump());
  CHECK(refusal([&] { bomb.encode("aaaaaaaaaaaaaaaa", false); }).find("grows") != std::string::npos);
}

TEST_CASE("tokenizer: every truncation of each kind of file is refused") {
  for (const std::string& name : fixtures) {
    const damage_count count = read_truncations(shrunk(name), [](std::string_view cut) { tokenizer::parse(cut); });
    CHECK(count.accepted == 0);
  }
}

TEST_CASE("tokenizer: 3000 mutations of each kind of file are refused or give a working tokenizer") {
  for (const std::string& name : fixtures) {
    const damage_count count = read_mutations(shrunk(name), 3000, [](std::string_view text) {
      const tokenizer t = tokenizer::parse(text);
      t.decode(t.encode("Hello <s>w\u00f6rld</s> 12\t\n \xff", true));
    });
    CHECK(count.refused > 0);
    CHECK(count.accepted > 0);
  }
}

TEST_CASE("tokenizer: mutations of tokenizer_config.json are refused or accepted") {
  const std::string file = fixture_text("llama2");
  const std::string config =
      R"({"add_bos_token": true, "add_eos_token": false, "bos_token": {"content": "<s>"}, "eos_token": "</s>"})";
  const auto read = [&](std::string_view text) { tokenizer::parse(file, text).encode("a", true); };
  read_truncations(config, read);
  CHECK(read_mutations(config, 1000, read).refused > 0);
}
