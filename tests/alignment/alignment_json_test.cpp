// Alignments as files: what is written comes back, and nothing else is taken for one.
#include "specattn/alignment_json.hpp"

#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <string>

#include "alignment/problem.hpp"

namespace alignment_testing {

using specattn::alignment;
using specattn::contract_error;
using specattn::from_json_text;

bool equal(const specattn::model_fingerprint& a, const specattn::model_fingerprint& b) {
  return a.name == b.name && a.matches(b) && a.weights == b.weights;
}

bool equal(const alignment& a, const alignment& b) {
  return equal(a.draft, b.draft) && equal(a.target, b.target) && a.signals.draft_layers == b.signals.draft_layers &&
         a.signals.draft_q_heads == b.signals.draft_q_heads && a.signals.windows == b.signals.windows &&
         a.signals.sinks == b.signals.sinks && a.signals.history == b.signals.history &&
         a.coefficients == b.coefficients && a.mixture_divergence == b.mixture_divergence &&
         a.layer_map == b.layer_map && a.divergence == b.divergence;
}

/// A directory of this test's own, gone with it.
struct scratch {
  std::filesystem::path directory;
  scratch() {
    std::random_device random;
    directory = std::filesystem::temp_directory_path() / ("specattn-alignment-" + std::to_string(random()));
    std::filesystem::create_directory(directory);
  }
  ~scratch() { std::filesystem::remove_all(directory); }
  std::string file(const char* name) const { return (directory / name).string(); }
};

std::string replaced(std::string text, const std::string& old, const std::string& with) {
  const auto at = text.find(old);
  REQUIRE(at != std::string::npos);
  return text.replace(at, old.size(), with);
}

void refused(const std::string& text, const char* part) {
  CHECK_THROWS_WITH_AS(from_json_text(text), doctest::Contains(part), contract_error);
}

TEST_CASE("alignment JSON: comes back to the bit, as text and as a file") {
  scratch here;
  for (const alignment& made : {small_alignment(), small_alignment().layer_map_only()}) {
    CHECK(equal(from_json_text(to_json_text(made)), made));
    save_alignment(made, here.file("a.json"));
    CHECK(equal(specattn::load_alignment(here.file("a.json")), made));
    CHECK(equal(specattn::load_alignment(here.file("a.json"), made.draft, made.target), made));
  }
  CHECK(std::distance(std::filesystem::directory_iterator(here.directory), {}) == 1);  // nothing is left beside it
}

TEST_CASE("alignment JSON: names of any bytes can be written") {
  alignment made = small_alignment();
  made.draft.name = "a \"quoted\" \xff name\n";
  CHECK(from_json_text(to_json_text(made)).draft.matches(made.draft));
}

TEST_CASE("alignment JSON: an inconsistent alignment is not written") {
  scratch here;
  alignment bad = small_alignment();
  bad.coefficients[0] = 2.0f;
  CHECK_THROWS_AS(save_alignment(bad, here.file("a.json")), contract_error);
  CHECK_FALSE(std::filesystem::exists(here.file("a.json")));
}

TEST_CASE("alignment JSON: no beginning of a document is taken for it") {
  const std::string text = to_json_text(small_alignment());
  const std::string whole = text.substr(0, text.find_last_of('}') + 1);
  for (std::size_t size = 0; size < whole.size(); ++size) {
    REQUIRE_THROWS_AS(from_json_text(std::string_view(whole).substr(0, size)), contract_error);
  }
  CHECK(equal(from_json_text(whole), small_alignment()));
}

TEST_CASE("alignment JSON: a damaged document is refused or consistent") {
  const std::string text = to_json_text(small_alignment());
  std::mt19937 random(17);
  int taken = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    std::string damaged = text;
    for (unsigned edits = 1 + random() % 4; edits > 0; --edits) {
      const std::size_t at = random() % damaged.size();
      switch (random() % 5) {
        case 0:
          damaged[at] = static_cast<char>(random());
          break;
        case 1:
          damaged.erase(at, 1 + random() % 20);
          break;
        case 2:
          damaged.insert(at, damaged.substr(random() % damaged.size(), random() % 30));
          break;
        case 3:
          damaged[at] = "0123456789-+.eE[]{},:\"tfn"[random() % 25];
          break;
        default:
          damaged.insert(at, 1 + random() % 3, "09[{\""[random() % 5]);
      }
      if (damaged.empty()) damaged = "{";
    }
    try {
      from_json_text(damaged).check();
      ++taken;
    } catch (const contract_error& error) {
      REQUIRE(std::string_view(error.what()).starts_with("alignment: "));
    }
  }
  CHECK(taken > 0);
  CHECK(taken < 1500);
}

TEST_CASE("alignment JSON: what is wrong is named") {
  const std::string text = to_json_text(small_alignment());
  refused("", "no JSON document");
  refused("[1, 2]", "no field 'specattn_alignment'");
  refused("{}", "no field 'specattn_alignment'");
  refused(replaced(text, "\"specattn_alignment\": 1", "\"specattn_alignment\": 2"), "format 2, this library reads 1");
  refused(replaced(text, "\"specattn_alignment\": 1", "\"specattn_alignment\": \"1\""), "is not an integer");
  refused(replaced(text, "\"layer_map\"", "\"layer_maps\""), "field 'layer_map' is missing");
  refused(replaced(text, "\"layers\": 3", "\"layers\": 3.5"), "field 'layers' is not an integer");
  refused(replaced(text, "\"layers\": 3", "\"layers\": -3"), "field 'layers' is -3, outside 1 … 32768");
  refused(replaced(text, "\"layers\": 3", "\"layers\": 18446744073709551615"),
          "field 'layers' is 9223372036854775807");
  refused(replaced(text, "\"layers\": 3", "\"layers\": 30000"), "field 'divergence' is no array of 120000 numbers");
  refused(replaced(text, "\"history\": true", "\"history\": 1"), "field 'history' is neither true nor false");
  refused(replaced(text, "\"sinks\": 4", "\"sinks\": -4"), "field 'sinks' is -4");
  refused(replaced(text, "\"name\": \"little\"", "\"name\": 5"), "field 'name' is not a string");
  refused(replaced(text, "\"weights\": \"77\"", "\"weights\": 77"), "field 'weights' is not a string");
  refused(replaced(text, "\"weights\": \"77\"", "\"weights\": \"0x4d\""), "not a hash");
  refused(replaced(text, "\"weights\": \"77\"", "\"weights\": \"99999999999999999999\""), "beyond 64 bits");
  refused(replaced(text, "\"layer_map\": [", "\"layer_map\": [0,"), "field 'layer_map' is no array of 4 numbers");
  refused(replaced(text, "\"divergence\": [", "\"divergence\": [null,"),
          "field 'divergence' is no array of 12 numbers");
  refused(replaced(text, "0.30000001192092896", "\"x\""), "field 'divergence' holds something that is no number");
  refused(replaced(text, "0.30000001192092896", "1e300"), "field 'divergence' holds");
  refused(replaced(text, "0.30000001192092896", "-1"), "divergence holds -1");
}

TEST_CASE("alignment JSON: deep and huge documents are refused without harm") {
  refused(std::string(1000000, '['), "no JSON document");
  refused(std::string(1000000, '[') + std::string(1000000, ']'), "no JSON document");
  std::string objects;
  for (int i = 0; i < 100000; ++i) objects += "{\"a\":";
  refused(objects, "no JSON document");
  const std::string text = to_json_text(small_alignment());
  refused(replaced(text, "\"history\": true",
                   "\"history\": true, \"deep\": " + std::string(50, '[') + std::string(50, ']')),
          "no JSON document");
  refused(replaced(replaced(text, "\"layers\": 3", "\"layers\": 32768"), "\"q_heads\": 2", "\"q_heads\": 32768"),
          "field 'divergence' is no array");
}

TEST_CASE("alignment JSON: one made for other models is refused, both named with what differs") {
  scratch here;
  const alignment made = small_alignment();
  save_alignment(made, here.file("a.json"));
  auto other = made.draft;
  other.name = "stranger";
  other.vocab = 51;
  const auto load = [&](const auto& draft, const auto& target) {
    specattn::load_alignment(here.file("a.json"), draft, target);
  };
  CHECK_THROWS_WITH_AS(load(other, made.target), doctest::Contains("is for the draft 'little'"), contract_error);
  CHECK_THROWS_WITH_AS(load(other, made.target), doctest::Contains("vocab 50"), contract_error);
  CHECK_THROWS_WITH_AS(load(other, made.target), doctest::Contains("this one is 'stranger'"), contract_error);
  CHECK_THROWS_WITH_AS(load(other, made.target), doctest::Contains("vocab 51"), contract_error);
  other = made.target;
  other.weights = 5;
  CHECK_THROWS_WITH_AS(load(made.draft, other), doctest::Contains("is for the target 'large'"), contract_error);
  CHECK_THROWS_WITH_AS(load(made.draft, other), doctest::Contains("weights 18364758544493064720"), contract_error);
}

TEST_CASE("alignment JSON: files that cannot be read or written are named, and what was there stays") {
  scratch here;
  const alignment made = small_alignment();
  CHECK_THROWS_WITH_AS(specattn::load_alignment(here.file("none.json")), doctest::Contains("none.json"),
                       contract_error);
  CHECK_THROWS_WITH_AS(specattn::load_alignment(here.directory.string()),
                       doctest::Contains(here.directory.string().c_str()), contract_error);
  CHECK_THROWS_WITH_AS(save_alignment(made, here.file("no/such/place.json")),
                       doctest::Contains("cannot be written: No such file"), contract_error);
  std::filesystem::create_directory(here.file("taken"));
  std::ofstream(here.file("taken/file")) << "x";
  CHECK_THROWS_WITH_AS(save_alignment(made, here.file("taken")), doctest::Contains("cannot be written"),
                       contract_error);
  CHECK(std::filesystem::exists(here.file("taken/file")));
  CHECK_FALSE(std::filesystem::exists(here.file("taken.partial")));
  std::ofstream(here.file("bad.json")) << "{\"specattn_alignment\": 1}";
  CHECK_THROWS_WITH_AS(specattn::load_alignment(here.file("bad.json")), doctest::Contains("bad.json"),
                       contract_error);
  if (std::filesystem::exists("/dev/full")) {
    std::filesystem::create_symlink("/dev/full", here.file("full.json.partial"));
    CHECK_THROWS_WITH_AS(save_alignment(made, here.file("full.json")), doctest::Contains("cannot be written"),
                         contract_error);
    CHECK_FALSE(std::filesystem::exists(here.file("full.json")));
  }
}

}  // namespace alignment_testing
