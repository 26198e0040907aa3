// Tokenizers from GGUF metadata against those from tokenizer.json, whose ids are Hugging Face's (data/encodings.json).
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "damaged_input.hpp"
#include "gguf_builder.hpp"
#include "gguf_file.hpp"
#include "input_error.hpp"
#include "text/gguf_tokenizer.hpp"
#include "text/stream_decoder.hpp"
#include "text/tokenizer.hpp"

using namespace mini_llm;
using ids = std::vector<std::int32_t>;
using nlohmann::json;

namespace {

const std::string word_mark = "\u2581";

json read_json(const std::string& name) {
  return json::parse(read_all(source_path("tests/mini_llm/data/" + name + ".json")));
}

/// What a GGUF file keeps of a vocabulary.
struct token_table {
  std::vector<std::string> texts;
  std::vector<std::int32_t> kinds;
  std::vector<std::string> merges;
  std::vector<float> scores;
};

/// The table of a tokenizer.json: added tokens are control tokens where they are special, else user-defined; the token
/// of merge n scores -n.
token_table table_of(const json& file) {
  const json& model = file["model"];
  std::size_t size = 0;
  for (const auto& [text, id] : model["vocab"].items()) size = std::max(size, id.get<std::size_t>() + 1);
  for (const json& added : file["added_tokens"]) size = std::max(size, added["id"].get<std::size_t>() + 1);
  token_table table;
  table.texts.resize(size);
  table.kinds.assign(size, 1);
  table.scores.assign(size, -1e6F);
  for (const auto& [text, id] : model["vocab"].items()) {
    table.texts[id.get<std::size_t>()] = text;
    if (text.size() == 6 && text.starts_with("<0x")) table.kinds[id.get<std::size_t>()] = 6;
  }
  for (const json& added : file["added_tokens"]) {
    table.texts[added["id"].get<std::size_t>()] = added["content"];
    table.kinds[added["id"].get<std::size_t>()] = added["special"] ? 3 : 4;
  }
  for (const json& merge : model["merges"]) {
    std::string both = merge.is_string() ? merge.get<std::string>()
                                         : merge[0].get<std::string>() + " " + merge[1].get<std::string>();
    std::string whole = both;
    whole.erase(whole.find(' '), 1);
    const auto id = model["vocab"][whole].get<std::size_t>();
    table.scores[id] = -static_cast<float>(table.merges.size());
    table.merges.push_back(std::move(both));
  }
  return table;
}

gguf_builder byte_level(const token_table& table, const char* pre) {
  gguf_builder b;
  b.add("tokenizer.ggml.model", "gpt2").add("tokenizer.ggml.pre", pre).add("tokenizer.ggml.tokens", table.texts);
  return b.add("tokenizer.ggml.token_type", table.kinds).add("tokenizer.ggml.merges", table.merges);
}

gguf_builder sentencepiece(const token_table& table) {
  gguf_builder b;
  b.add("tokenizer.ggml.model", "llama").add("tokenizer.ggml.tokens", table.texts);
  return b.add("tokenizer.ggml.token_type", table.kinds).add("tokenizer.ggml.scores", table.scores);
}

tokenizer make(const gguf_builder& builder) {
  const std::string bytes = builder.bytes();
  return tokenizer::make(read_gguf_tokenizer(gguf_file::parse(as_bytes(bytes), "model.gguf")), "model.gguf");
}

void refused(const gguf_builder& builder, std::initializer_list<const char*> words) {
  const std::string message = refusal([&] { make(builder); });
  CAPTURE(message);
  CHECK(message.starts_with("model.gguf: "));
  CHECK(message.size() < 1000);
  for (const char* word : words) {
    CAPTURE(word);
    CHECK(message.find(word) != std::string::npos);
  }
}

/// All texts of encodings.json but those with tokens that swallow the spaces beside them, which GGUF cannot say.
int check_encodings(const tokenizer& words, const std::string& name) {
  int checked = 0;
  const json encodings = read_json("encodings");
  for (const json& golden : encodings[name]) {
    const std::string text = golden["text"];
    if (text.find("<pad>") != text.npos || text.find("<mark>") != text.npos) continue;
    CAPTURE(text.substr(0, 60));
    CHECK(words.encode(text, true) == golden["ids_special"].get<ids>());
    const ids plain = words.encode(text, false);
    CHECK(plain == golden["ids"].get<ids>());
    CHECK(replace_invalid_utf8(words.decode(plain)) == golden["decoded"].get<std::string>());
    CHECK(replace_invalid_utf8(words.decode(plain, false)) == golden["decoded_all"].get<std::string>());
    ++checked;
  }
  return checked;
}

}  // namespace

TEST_CASE(
    "gguf tokenizer: byte-level vocabularies give Hugging Face's ids, by the patterns that their names stand for") {
  gguf_builder llama3 = byte_level(table_of(read_json("llama3")), "llama-bpe");
  llama3.add("tokenizer.ggml.bos_token_id", static_cast<std::uint32_t>(*make(llama3).find("<|begin_of_text|>")));
  CHECK(check_encodings(make(llama3), "llama3") > 20);
  const tokenizer smollm = make(byte_level(table_of(read_json("digits")), "smollm"));
  CHECK(check_encodings(smollm, "digits") > 20);
}

TEST_CASE("gguf tokenizer: scores in place of merges give Hugging Face's ids") {
  gguf_builder b = sentencepiece(table_of(read_json("llama2")));
  b.add("tokenizer.ggml.bos_token_id", 1U).add("tokenizer.ggml.eos_token_id", 2U);
  CHECK(check_encodings(make(b), "llama2") > 20);
}

TEST_CASE("gguf tokenizer: scores give SentencePiece's ids, bytes where there is no token") {
  const json golden = read_json("gguf_sentencepiece");
  token_table table;
  table.texts = golden["tokens"].get<std::vector<std::string>>();
  table.scores = golden["scores"].get<std::vector<float>>();
  table.kinds = golden["token_type"].get<std::vector<std::int32_t>>();
  const tokenizer words = make(sentencepiece(table));
  REQUIRE(golden["encodings"].size() > 15);
  for (const json& encoding : golden["encodings"]) {
    const std::string text = encoding["text"];
    CAPTURE(text.substr(0, 60));
    const ids tokens = words.encode(text, false);
    CHECK(tokens == encoding["ids"].get<ids>());
    CHECK(replace_invalid_utf8(words.decode(tokens)) == encoding["decoded"].get<std::string>());
  }
}

TEST_CASE("gguf tokenizer: of neighbours that score alike the leftmost are joined first, whatever the pair") {
  std::mt19937_64 random(3);
  for (int round = 0; round < 300; ++round) {
    token_table table;
    table.texts = {"<unk>", "a", "b"};
    while (table.texts.size() < 14) {
      std::string text(2 + random() % 4, 'a');
      for (char& c : text) c = "ab"[random() % 2];
      if (std::find(table.texts.begin(), table.texts.end(), text) == table.texts.end()) table.texts.push_back(text);
    }
    table.kinds.assign(table.texts.size(), 1);
    table.kinds[0] = 2;
    for (std::size_t i = 0; i < table.texts.size(); ++i) table.scores.push_back(-static_cast<float>(random() % 4));
    const tokenizer words = make(sentencepiece(table).add("tokenizer.ggml.add_space_prefix", false));
    std::string text(30, 'a');
    for (char& c : text) c = "ab"[random() % 2];
    std::vector<std::string> parts;
    for (const char c : text) parts.emplace_back(1, c);
    for (;;) {  // the rule in its plainest form
      std::size_t best = parts.size();
      float best_score = 0;
      for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
        const auto token = std::find(table.texts.begin() + 1, table.texts.end(), parts[i] + parts[i + 1]);
        if (token == table.texts.end()) continue;
        const float score = table.scores[static_cast<std::size_t>(token - table.texts.begin())];
        if (best < parts.size() && score <= best_score) continue;
        best = i;
        best_score = score;
      }
      if (best == parts.size()) break;
      parts[best] += parts[best + 1];
      parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    }
    std::vector<std::string> found;
    for (const std::int32_t id : words.encode(text, false)) found.emplace_back(words.token(id));
    CHECK(found == parts);
  }
}

TEST_CASE("gguf tokenizer: bos and eos are put around a text as the file says, or as its kind does by default") {
  token_table table = table_of(read_json("digits"));
  const auto bos = static_cast<std::int32_t>(std::find(table.texts.begin(), table.texts.end(), "<|begin_of_text|>") -
                                             table.texts.begin());
  const auto with = [&](const char* pre) {
    gguf_builder b = byte_level(table, pre);
    b.add("tokenizer.ggml.bos_token_id", static_cast<std::uint32_t>(bos));
    return b.add("tokenizer.ggml.eos_token_id", static_cast<std::uint32_t>(bos + 1));
  };
  CHECK(make(with("gpt-2")).encode("", true).empty());
  CHECK(make(with("llama3")).encode("", true) == ids{bos});
  CHECK(make(with("llama3").add("tokenizer.ggml.add_bos_token", false)).encode("", true).empty());
  gguf_builder both = with("qwen2");
  both.add("tokenizer.ggml.add_bos_token", true).add("tokenizer.ggml.add_eos_token", true);
  CHECK(make(both).encode("", true) == ids{bos, bos + 1});
  CHECK(make(both).bos_id() == bos);
  CHECK(make(both).eos_id() == bos + 1);
  gguf_builder none = byte_level(table, "smollm");
  refused(none.add("tokenizer.ggml.add_bos_token", true), {"add_bos_token", "bos_token_id"});
}

TEST_CASE("gguf tokenizer: digits are split one by one, in threes, or not at all") {
  token_table table = table_of(read_json("digits"));
  table.texts.push_back("12");
  table.texts.push_back("1234");
  table.texts.push_back("34");
  table.kinds.resize(table.texts.size(), 1);
  for (const char* merge : {"1 2", "3 4", "12 34"}) table.merges.emplace_back(merge);
  const auto pieces = [&](const char* pre) {
    const tokenizer words = make(byte_level(table, pre));
    std::string joined;
    for (const std::int32_t id : words.encode("1234", false)) joined += std::string(words.token(id)) + "|";
    return joined;
  };
  CHECK(pieces("gpt-2") == "1234|");
  CHECK(pieces("llama-bpe") == "12|3|4|");
  for (const char* name : {"smollm", "qwen2", "tekken", "starcoder"}) CHECK(pieces(name) == "1|2|3|4|");
}

TEST_CASE("gguf tokenizer: unknown kinds and names, and lists at odds, are refused by name") {
  const token_table table{{"<unk>", "a", "b", "ab"}, {2, 1, 1, 1}, {"a b"}, {0, -1, -1, -2}};
  CHECK_NOTHROW(make(byte_level(table, "smollm")));
  CHECK_NOTHROW(make(sentencepiece(table)));
  refused(byte_level(table, "deepseek-r1-qwen"), {"tokenizer.ggml.pre", "\"deepseek-r1-qwen\"", "smollm", "qwen2"});
  refused(gguf_builder().add("tokenizer.ggml.model", "bert"), {"tokenizer.ggml.model", "\"bert\"", "gpt2"});
  refused(gguf_builder(), {"\"tokenizer.ggml.model\"", "missing"});
  const auto changed = [&](auto change, bool scored = false) {
    token_table copy = table;
    change(copy);
    return scored ? sentencepiece(copy) : byte_level(copy, "smollm");
  };
  refused(changed([](token_table& t) { t.texts.clear(), t.kinds.clear(); }), {"tokenizer.ggml.tokens"});
  refused(changed([](token_table& t) { t.kinds.pop_back(); }), {"tokenizer.ggml.token_type", "4 elements", "3"});
  refused(changed([](token_table& t) { t.kinds[1] = 7; }), {"token_type", "token 1", "7"});
  refused(changed([](token_table& t) { t.scores.pop_back(); }, true), {"tokenizer.ggml.scores", "4 elements", "3"});
  refused(changed([](token_table& t) { t.scores[2] = std::nanf(""); }, true), {"scores", "token 2"});
  refused(changed([](token_table& t) { t.texts[2] = "a"; }), {"\"a\"", "ids"});
  refused(changed([](token_table& t) { t.merges = {"a  b"}; }), {"merge 0", "\"a  b\""});
  refused(changed([](token_table& t) { t.merges = {"a"}; }), {"merge 0", "\"a\""});
  refused(changed([](token_table& t) { t.merges = {"a c"}; }), {"merge 0", "\"c\""});
  refused(changed([](token_table& t) { t.texts[1] = std::string(5000, 'x'); }), {"token 1", "5000", "4096"});
  refused(changed([](token_table& t) { t.texts[1] = std::string(200, 'x'); }, true), {"token 1", "200", "128"});
  refused(changed([](token_table& t) { t.texts[0] = std::string(600, 'x'); }), {"special token 0", "600", "512"});
  gguf_builder bos = byte_level(table, "smollm");
  refused(bos.add("tokenizer.ggml.bos_token_id", 4U), {"bos_token_id", "token 4", "4"});
  gguf_builder spaces = sentencepiece(table);
  refused(spaces.add("tokenizer.ggml.remove_extra_whitespaces", true), {"remove_extra_whitespaces"});
}

TEST_CASE("gguf tokenizer: damage of either kind is refused or gives a working tokenizer") {
  const token_table table{{"<unk>", "a", "b", "ab", "<0x0A>", word_mark, "<s>", "c|"},
                          {2, 1, 1, 1, 6, 1, 3, 4},
                          {"a b"},
                          {0, -1, -1, -2, 0, -3, 0, -4}};
  gguf_builder scored = sentencepiece(table);
  scored.add("tokenizer.ggml.bos_token_id", 6U);
  for (const std::string& file : {byte_level(table, "smollm").bytes(), scored.bytes()}) {
    const auto read = [](std::string_view text) {
      const gguf_file parsed = gguf_file::parse(as_bytes(text), "model.gguf");
      const tokenizer words = tokenizer::make(read_gguf_tokenizer(parsed), "model.gguf");
      words.decode(words.encode("ab<s> c|\n\xff", true));
    };
    CHECK(read_truncations(file, read).accepted == 0);
    const damage_count count = read_mutations(file, 5000, read);
    CHECK(count.refused > 0);
  }
}
