// The normal form C, which Qwen's tokenizers ask for: texts that have it are read as they stand, others refused.
#include "text/nfc.hpp"

#include <doctest/doctest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "damaged_input.hpp"
#include "input_error.hpp"
#include "text/tokenizer.hpp"

using namespace mini_llm;

TEST_CASE("nfc: texts in the form pass") {
  for (const char* text :
       {"", "plain ASCII", "na\u00efve caf\u00e9 \u1ec7 \u00d8", "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u304c\u30d7",
        "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
        "\u0939\u093f\u0928\u094d\u0926\u0940", "broken \xff\xc3 bytes", "\u05e9\u05b8\u05c1",
        "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\ufe0f \U0010ffff"}) {
    CAPTURE(text);
    CHECK_NOTHROW(require_nfc(text));
  }
}

TEST_CASE("nfc: what the form may change is refused by character and place") {
  const auto message = [](const char* text) { return refusal([&] { require_nfc(text); }); };
  CHECK(message("cafe\u0301").find("U+0301 at byte 4 of a stretch of 6 bytes") != std::string::npos);
  CHECK(message("\u212b").find("U+212B at byte 0") != std::string::npos);  // Angstrom sign: a letter's second place
  CHECK(message("\u1100\u1161").find("U+1161 at byte 3") != std::string::npos);        // parts of a Hangul syllable
  CHECK(message("x\uf900").find("U+F900 at byte 1") != std::string::npos);             // a compatibility ideograph
  CHECK(message("\u05e9\u05c1\u05b8").find("U+05B8 at byte 4") != std::string::npos);  // marks out of order
  CHECK(message("\U0002fa1d").find("U+2FA1D at byte 0") != std::string::npos);
}

TEST_CASE("nfc: a tokenizer that normalizes so reads what it leaves as it is, as without it") {
  const std::string plain = read_all(source_path("tests/mini_llm/data/llama3.json"));
  nlohmann::json file = nlohmann::json::parse(plain);
  file["normalizer"] = {{"type", "NFC"}};
  const tokenizer normalizing = tokenizer::parse(file.dump(), {});
  const std::string text = "It's na\u00efve, caf\u00e9 12345\n";
  CHECK(normalizing.encode(text, true) == tokenizer::parse(plain, {}).encode(text, true));
  CHECK(refusal([&] { normalizing.encode("e\u0301", true); }).find("U+0301 at byte 1") != std::string::npos);
}
