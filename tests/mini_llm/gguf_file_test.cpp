#include "gguf_file.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <string>
#include <vector>

#include "damaged_input.hpp"
#include "gguf_builder.hpp"
#include "input_error.hpp"

using namespace mini_llm;

namespace {

gguf_file read(const std::string& file) { return gguf_file::parse(as_bytes(file), "model.gguf"); }

void check_names(const std::string& message, std::initializer_list<const char*> words) {
  CAPTURE(message);
  CHECK(message.starts_with("model.gguf: "));
  CHECK(message.size() < 600);
  for (const char* word : words) {
    CAPTURE(word);
    CHECK(message.find(word) != std::string::npos);
  }
}

void refused(const std::string& file, std::initializer_list<const char*> words) {
  check_names(refusal([&] { read(file); }), words);
}
void refused(const gguf_builder& file, std::initializer_list<const char*> words) { refused(file.bytes(), words); }

template <class T>
std::string raw(T value) {
  return gguf_builder::raw(value);
}

/// One tensor "t" of this description and 64 bytes of data.
gguf_builder tensor(const std::vector<std::uint64_t>& extents, std::uint32_t type, std::uint64_t offset = 0) {
  return gguf_builder().describe_tensor("t", extents, type, offset).append(std::string(64, '\1'));
}

constexpr std::uint64_t huge = std::numeric_limits<std::uint64_t>::max();

}  // namespace

TEST_CASE("gguf: metadata of every type are those of the file") {
  gguf_builder builder;
  builder.add_raw("u8", gguf_type::u8, raw(std::uint8_t{200})).add_raw("i8", gguf_type::i8, raw(std::int8_t{-3}));
  builder.add_raw("u16", gguf_type::u16, raw(std::uint16_t{60000}))
      .add_raw("i16", gguf_type::i16, raw(short{-30000}));
  builder.add("u32", std::uint32_t{4000000000}).add_raw("i32", gguf_type::i32, raw(std::int32_t{-7}));
  builder.add_raw("u64", gguf_type::u64, raw(std::uint64_t{1} << 40)).add_raw("huge", gguf_type::u64, raw(huge));
  builder.add_raw("i64", gguf_type::i64, raw(std::int64_t{-1} << 40)).add("f32", 1e-5F).add("yes", true);
  builder.add_raw("f64", gguf_type::f64, raw(0.25)).add("text", "caf\u00e9").add("empty", std::vector<std::string>{});
  builder.add("texts", std::vector<std::string>{"a", "", "bc"}).add("floats", std::vector<float>{1, -2});
  builder.add("ints", std::vector<std::int32_t>{1, -1});
  const std::string bytes = builder.bytes();
  const gguf_file file = read(bytes);
  CHECK(file.at("u8").integer(0, 255) == 200);
  CHECK(file.at("i8").integer(-128, 0) == -3);
  CHECK(file.at("u16").integer(0, 65535) == 60000);
  CHECK(file.at("i16").integer(-32768, 0) == -30000);
  CHECK(file.at("u32").integer(0, INT64_MAX) == 4000000000);
  CHECK(file.at("i32").integer(-7, -7) == -7);
  CHECK(file.at("u64").integer(0, INT64_MAX) == std::int64_t{1} << 40);
  CHECK(file.at("i64").number(-1e15, 0) == -0x1p40);
  CHECK(file.at("f32").number(0, 1) == 1e-5);
  CHECK(file.at("f64").number(0, 1) == 0.25);
  CHECK(file.at("yes").boolean());
  CHECK(file.at("text").text() == "caf\u00e9");
  CHECK(file.at("empty").texts().empty());
  CHECK(file.at("texts").texts() == std::vector<std::string_view>{"a", "", "bc"});
  CHECK(file.at("floats").floats() == std::vector<float>{1, -2});
  CHECK(file.at("ints").integers() == std::vector<std::int32_t>{1, -1});
  CHECK_FALSE(file.find("absent"));
  check_names(refusal([&] { file.at("absent"); }), {"\"absent\"", "missing"});
  check_names(refusal([&] { file.at("huge").integer(0, INT64_MAX); }), {"huge: ", "18446744073709551615 (uint64)"});
  check_names(refusal([&] { file.at("u8").integer(0, 7); }), {"u8: ", "0 to 7", "200 (uint8)"});
  check_names(refusal([&] { file.at("f32").integer(0, 7); }), {"f32: ", "1e-05", "float32"});
  check_names(refusal([&] { file.at("f64").number(1, 2); }), {"f64: ", "from 1 to 2", "0.25"});
  check_names(refusal([&] { file.at("text").number(1, 2); }), {"text: ", "\"caf"});
  check_names(refusal([&] { file.at("u8").text(); }), {"string expected"});
  check_names(refusal([&] { file.at("u8").boolean(); }), {"true or false"});
  check_names(refusal([&] { file.at("ints").texts(); }), {"an array of 2 of type int32"});
  check_names(refusal([&] { file.at("texts").floats(); }), {"an array of 3 of type string"});
  check_names(refusal([&] { file.at("floats").integers(); }), {"float32"});
}

TEST_CASE("gguf: tensors are views of the file, aligned, with their dimensions outermost first") {
  gguf_builder builder;
  builder.add_tensor("a", {64, 2}, 8, std::string(136, '\1')).add_tensor("b", {3}, 0, std::string(12, '\2'));
  for (const bool other_alignment : {false, true}) {
    if (other_alignment) builder.add("general.alignment", std::uint32_t{8});
    const std::string bytes = builder.bytes();
    const gguf_file file = read(bytes);
    REQUIRE(file.tensors().size() == 2);
    const gguf_tensor& a = file.tensors().at("a");
    CHECK(a.type->name == "Q8_0");
    CHECK(a.shape == std::vector<std::int64_t>{2, 64});
    CHECK(a.bytes.size() == 136);
    if (other_alignment) continue;  // the builder pads to 32 bytes
    CHECK(a.bytes.front() == std::byte{1});
    CHECK(a.bytes.back() == std::byte{1});
    CHECK(file.tensors().at("b").bytes.front() == std::byte{2});
  }
}

TEST_CASE("gguf: what is no GGUF file, or one of another version or byte order, is refused by name") {
  refused("", {"not a GGUF file"});
  refused("GGU", {"not a GGUF file", "\"GGU\""});
  refused("PK\x03\x04....", {"not a GGUF file", "\"PK"});
  refused("GGUF", {"version", "4 bytes are needed", "0 are left"});
  for (const std::uint32_t version : {0U, 1U, 4U, 0x10003U}) {
    refused("GGUF" + raw(version) + std::string(16, '\0'), {"version", std::to_string(version).c_str(), "2 and 3"});
  }
  refused("GGUF" + raw(std::uint32_t{0x03000000}) + std::string(16, '\0'), {"big-endian"});
  const std::string least = "GGUF" + raw(std::uint32_t{2}) + std::string(16, '\0');
  const gguf_file empty = read(least);
  CHECK(empty.values().empty());
  CHECK(empty.tensors().empty());
}

TEST_CASE("gguf: absurd counts and lengths are refused with their values before memory is taken for them") {
  const std::string head = "GGUF" + raw(std::uint32_t{3});
  refused(head + raw(huge) + raw(std::uint64_t{0}), {"tensor_count", "18446744073709551615"});
  refused(head + raw(std::uint64_t{0}) + raw(huge), {"metadata_kv_count", "18446744073709551615"});
  refused(head + raw(std::uint64_t{0}) + raw(std::uint64_t{70000}) + std::string(1000000, '\0'),
          {"metadata_kv_count", "70000", "65536"});
  refused(head + raw(std::uint64_t{70000}) + raw(std::uint64_t{0}) + std::string(2000000, '\0'),
          {"tensor_count", "70000", "65536"});
  const auto one = [&](const std::string& rest) {
    return head + raw(std::uint64_t{0}) + raw(std::uint64_t{1}) + rest;
  };
  refused(one(raw(huge) + std::string(20, 'x')), {"key of metadata 0", "18446744073709551615", "65535"});
  refused(one(raw(std::uint64_t{1000}) + std::string(20, 'x')), {"key of metadata 0", "1000", "20 are left"});
  const std::string key = gguf_builder::raw_text("k");
  refused(one(key + raw(std::uint32_t{13}) + std::string(8, '\0')), {"type of \"k\"", "13"});
  refused(one(key + raw(std::uint32_t{8}) + raw(huge)), {"value of \"k\"", "18446744073709551615"});
  refused(one(key + raw(std::uint32_t{10}) + std::string(7, '\0')), {"value of \"k\"", "8 bytes", "7 are left"});
  const auto array = [&](std::uint32_t type, std::uint64_t count, const std::string& rest) {
    return one(key + raw(std::uint32_t{9}) + raw(type) + raw(count) + rest);
  };
  refused(array(9, 1, std::string(100, '\0')), {"\"k\"", "arrays"});
  refused(array(77, 1, std::string(100, '\0')), {"\"k\"", "77"});
  refused(array(4, huge, std::string(100, '\0')), {"\"k\"", "18446744073709551615", "100 bytes"});
  refused(array(8, std::uint64_t{1} << 61, std::string(100, '\0')), {"\"k\"", "2305843009213693952"});
  refused(array(8, 3, gguf_builder::raw_text("ab") + raw(std::uint64_t{99}) + std::string(20, 'x')),
          {"element 1", "\"k\"", "99 bytes", "20 are left"});
  refused(array(8, 2, gguf_builder::raw_text("abcdefgh")), {"length of element 1", "0 are left"});
}

TEST_CASE("gguf: a tensor's rank, dimensions, type and place are checked") {
  CHECK_NOTHROW(read(tensor({16}, 0).bytes()));
  refused(tensor({}, 0), {"\"t\"", "0 dimensions"});
  refused(tensor({1, 1, 1, 1, 1}, 0), {"\"t\"", "5 dimensions"});
  refused(tensor({4, 0}, 0), {"dimension 1", "is 0"});
  refused(tensor({huge}, 0), {"dimension 0", "18446744073709551615"});
  refused(tensor({17}, 0), {"\"t\"", "68 bytes at offset 0", "64 bytes"});
  refused(tensor({8}, 0, 64), {"32 bytes at offset 64"});
  refused(tensor({8}, 0, huge - 31), {"offset 18446744073709551584", "past the end"});
  refused(tensor({8}, 0, 33), {"offset 33", "alignment 32"});
  refused(tensor({33}, 8), {"33 elements", "32", "Q8_0"});
  refused(tensor({std::uint64_t{1} << 62, 4}, 0), {"[4, 4611686018427387904]", "F32"});
  refused(tensor({std::uint64_t{1} << 32, std::uint64_t{1} << 32}, 12), {"[4294967296, 4294967296]", "Q4_K"});
  refused(tensor({32}, 20), {"\"t\"", "IQ4_NL", "Q4_0"});
  refused(tensor({32}, 10), {"Q2_K"});
  refused(tensor({32}, 39), {"MXFP4"});
  refused(tensor({32}, 12345), {"number 12345"});
  gguf_builder named;
  refused(named.describe_tensor(std::string(65, 'n'), {1}, 0, 0), {"name of tensor 0", "65 bytes", "64"});
}

TEST_CASE("gguf: keys, tensors and data that are there twice are refused") {
  refused(gguf_builder().add("k", true).add("k", false), {"\"k\"", "twice"});
  gguf_builder twice = tensor({8}, 0);
  refused(twice.describe_tensor("t", {8}, 0, 32), {"\"t\"", "twice"});
  gguf_builder overlapping = tensor({16}, 0);
  refused(overlapping.describe_tensor("u", {8}, 0, 32), {"\"t\"", "\"u\"", "overlap"});
}

TEST_CASE("gguf: the alignment is a power of two, within bounds") {
  for (const std::uint32_t alignment : {0U, 3U, 48U, 1U << 17, ~0U}) {
    gguf_builder builder = tensor({8}, 0);
    refused(builder.add("general.alignment", alignment), {"general.alignment", std::to_string(alignment).c_str()});
  }
  gguf_builder text = tensor({8}, 0);
  refused(text.add("general.alignment", "32"), {"general.alignment", "\"32\""});
}

TEST_CASE("gguf: a file is known by its name or its beginning") {
  const scratch_directory directory;
  directory.write("a.gguf", "x");
  directory.write("b", "GGUF....");
  directory.write("c", "GGU");
  CHECK(is_gguf_file(directory.path() / "a.gguf"));
  CHECK(is_gguf_file(directory.path() / "b"));
  CHECK_FALSE(is_gguf_file(directory.path() / "c"));
  CHECK_FALSE(is_gguf_file(directory.path()));
  CHECK_FALSE(is_gguf_file(directory.path() / "absent.gguf"));
  CHECK(refusal([&] { gguf_file::open(directory.path() / "a.gguf"); }).find("a.gguf: is not a GGUF") !=
        std::string::npos);
}
