#include "model/safetensors.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "damaged_input.hpp"
#include "input_error.hpp"
#include "mapped_file.hpp"

using namespace mini_llm;

namespace {

/// A safetensors file of this header and data.
std::string file_of(const std::string& header, const std::string& data) {
  const std::uint64_t size = header.size();
  std::string file(sizeof size, '\0');
  std::memcpy(file.data(), &size, sizeof size);
  return file + header + data;
}

std::string good_header() {
  return R"({"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},)"
         R"( "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},)"
         R"( "c": {"dtype": "U8", "shape": [], "data_offsets": [22, 23]},)"
         R"( "d": {"dtype": "I64", "shape": [4, 0], "data_offsets": [23, 23]}})";
}

std::string good_file() { return file_of(good_header(), std::string(23, '\1')); }

safetensors_file read(const std::string& file) { return safetensors_file::parse(as_bytes(file), "file.safetensors"); }

/// The refusal of a file with one tensor "t" described by `entry` and eight bytes of data.
std::string refusal_of(const std::string& entry) {
  const std::string file = file_of("{\"t\": " + entry + "}", std::string(8, '\0'));
  return refusal([&] { read(file); });
}

void check_names(const std::string& message, std::initializer_list<const char*> words) {
  CAPTURE(message);
  CHECK(message.starts_with("file.safetensors: "));
  for (const char* word : words) {
    CAPTURE(word);
    CHECK(message.find(word) != std::string::npos);
  }
}

}  // namespace

TEST_CASE("safetensors: names, types, shapes and bytes are those of the file") {
  const std::string file = good_file();
  const safetensors_file parsed = read(file);
  REQUIRE(parsed.tensors().size() == 4);
  const stored_tensor& a = *parsed.find("a");
  CHECK(a.type == dtype::f32);
  CHECK(a.shape == std::vector<std::int64_t>{2, 2});
  CHECK(a.bytes.size() == 16);
  CHECK(a.bytes.data() == as_bytes(file).data() + 8 + good_header().size());
  CHECK(parsed.find("b")->size() == 3);
  CHECK(parsed.find("c")->size() == 1);
  CHECK(parsed.find("c")->shape.empty());
  CHECK(parsed.find("d")->size() == 0);
  CHECK(parsed.find("__metadata__") == nullptr);
  CHECK(parsed.find("e") == nullptr);
}

TEST_CASE("safetensors: the embedded model opens from disk and outlives the object it was copied from") {
  safetensors_file copy = [] {
    const auto file = safetensors_file::open(source_path("examples/models/books-1m/model.safetensors"));
    return safetensors_file(file);
  }();
  REQUIRE(copy.tensors().size() > 10);
  const stored_tensor& embedding = *copy.find("model.embed_tokens.weight");
  CHECK(embedding.type == dtype::bf16);
  CHECK(embedding.shape == std::vector<std::int64_t>{4096, 128});
  std::vector<float> values(embedding.size());
  read_floats(embedding, values);
  CHECK(std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); }));
}

TEST_CASE("read_floats: f16, bf16 and f32 convert exactly, from any alignment") {
  const std::vector<std::pair<std::uint16_t, float>> halves{
      {0x0000, 0.0F},           {0x8000, -0.0F},    {0x3c00, 1.0F},
      {0xc000, -2.0F},          {0x7bff, 65504.F},  {0x0001, 0x1p-24F},
      {0x83ff, -0x3ffp-24F},    {0x0400, 0x1p-14F}, {0x7c00, std::numeric_limits<float>::infinity()},
      {0x3555, 0.333251953125F}};
  std::string data(1, 'x');  // puts the elements on odd addresses
  for (const auto& [bits, value] : halves) data.append(reinterpret_cast<const char*>(&bits), 2);
  stored_tensor tensor{dtype::f16, {static_cast<std::int64_t>(halves.size())}, as_bytes(data).subspan(1)};
  std::vector<float> out(halves.size());
  read_floats(tensor, out);
  for (std::size_t i = 0; i < out.size(); ++i) {
    CHECK(out[i] == halves[i].second);
    CHECK(std::signbit(out[i]) == std::signbit(halves[i].second));
  }
  tensor.type = dtype::bf16;
  read_floats(tensor, out);
  CHECK(out[2] == 0.0078125F);
  CHECK(out[3] == -2.0F);
  tensor.type = dtype::i16;
  CHECK(refusal([&] { read_floats(tensor, out); }).find("I16") != std::string::npos);
  tensor.type = dtype::f16;
  CHECK_THROWS_AS(read_floats(tensor, std::span(out).first(1)), std::invalid_argument);
  std::uint16_t nan = 0x7e01;
  tensor = {dtype::f16, {}, std::as_bytes(std::span(&nan, 1))};
  read_floats(tensor, std::span(out).first(1));
  CHECK(std::isnan(out[0]));
}

TEST_CASE("safetensors: absurd header lengths are refused with the length") {
  for (const std::uint64_t length : {std::uint64_t{1000}, std::uint64_t{200'000'000}, std::uint64_t{1} << 63,
                                     std::numeric_limits<std::uint64_t>::max()}) {
    std::string file = good_file();
    std::memcpy(file.data(), &length, sizeof length);
    check_names(refusal([&] { read(file); }), {"header length", std::to_string(length).c_str()});
  }
  check_names(refusal([] { read("1234567"); }), {"too short", "7 bytes"});
  check_names(refusal([] { read(std::string(8, '\0')); }), {"byte"});
}

TEST_CASE("safetensors: shape, type and byte range must agree, inside the file") {
  check_names(refusal_of(R"({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]})"), {"\"t\"", "[3]", "12", "8"});
  check_names(refusal_of(R"({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]})"), {"past the end", "4 to 12"});
  check_names(refusal_of(R"({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]})"), {"before it begins"});
  check_names(refusal_of(R"({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]})"), {"shape[0]", "-2"});
  check_names(refusal_of(R"({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]})"), {"shape[0]", "2.0"});
  check_names(refusal_of(R"({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]})"), {"data_offsets[0]", "-8"});
  check_names(refusal_of(R"({"dtype": "F32", "shape": [2], "data_offsets": [0]})"), {"data_offsets"});
  check_names(refusal_of(R"({"dtype": "F32", "shape": [2]})"), {"data_offsets", "missing"});
  check_names(refusal_of(R"({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]})"), {"array"});
  check_names(refusal_of("[]"), {"object"});
}

TEST_CASE("safetensors: a type that the format got later is read as bytes, and no reason to refuse the file") {
  const safetensors_file parsed =
      read(file_of(R"({"t": {"dtype": "F31", "shape": [2], "data_offsets": [0, 7]}})", std::string(7, '\1')));
  const stored_tensor& tensor = *parsed.find("t");
  CHECK(tensor.type == dtype::unknown);
  CHECK(tensor.type_text == "F31");
  CHECK(tensor.size() == 7);
  check_names(refusal_of(R"({"dtype": "F31", "shape": [2], "data_offsets": [0, 9]})"), {"past the end"});
  std::vector<float> values(7);
  CHECK(refusal([&] { read_floats(tensor, values); }).find("cannot be used as weights") != std::string::npos);
}

TEST_CASE("safetensors: shapes whose size overflows are refused, also where a later zero would hide it") {
  check_names(refusal_of(R"({"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]})"),
              {"too many elements", "4611686018427387904"});
  check_names(refusal_of(R"({"dtype": "F64", "shape": [2305843009213693952], "data_offsets": [0, 0]})"),
              {"too many elements"});
  check_names(refusal_of(R"({"dtype": "U8", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]})"),
              {"too many elements"});
  check_names(refusal_of(R"({"dtype": "U8", "shape": [4294967296, 4294967296, 0], "data_offsets": [0, 0]})"),
              {"too many elements"});
  check_names(refusal_of(R"({"dtype": "U8", "shape": [18446744073709551615], "data_offsets": [0, 8]})"),
              {"shape[0]"});
  check_names(refusal_of(R"({"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,8],"data_offsets":[0,8]})"),
              {"17 dimensions"});
}

TEST_CASE("safetensors: overlapping tensors and repeated names are refused") {
  const std::string data(8, '\0');
  const auto with = [&](const std::string& header) { return refusal([&] { read(file_of(header, data)); }); };
  check_names(with(R"({"x": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},)"
                   R"( "y": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}})"),
              {"\"x\"", "\"y\"", "overlap"});
  check_names(with(R"({"x": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},)"
                   R"( "y": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]}})"),
              {"overlap"});
  check_names(with(R"({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},)"
                   R"( "x": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}})"),
              {"\"x\"", "twice"});
}

TEST_CASE("safetensors: bytes that no tensor uses are tolerated") {
  const std::string header = R"({"x": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]}})";
  CHECK(read(file_of(header, std::string(9, '\0'))).find("x")->size() == 2);
  CHECK(read(file_of("{}   ", {})).find("x") == nullptr);
}

TEST_CASE("safetensors: deep nesting in the header is refused, not followed") {
  const std::string deep(500'000, '[');
  check_names(refusal([&] { read(file_of(deep, {})); }), {"nested"});
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  check_names(refusal([&] { read(file_of(objects, {})); }), {"nested"});
}

TEST_CASE("safetensors: every truncation is refused and 3000 mutations are refused or read within bounds") {
  const auto touch = [](std::string_view text) {
    unsigned sum = 0;
    const safetensors_file file = safetensors_file::parse(as_bytes(text), "file.safetensors");
    for (const auto& [name, tensor] : file.tensors()) {
      for (const std::byte byte : tensor.bytes) sum += std::to_integer<unsigned>(byte);
      CHECK(tensor.size() * size_bytes(tensor.type) == tensor.bytes.size());
    }
    CHECK(sum < 1U << 30);
  };
  const std::string file = good_file();
  CHECK(read_truncations(file, touch).accepted == 0);
  const damage_count count = read_mutations(file, 3000, touch);
  CHECK(count.refused > 0);
  CHECK(count.accepted > 0);
}

TEST_CASE("mapped_file: what cannot be mapped is refused by name; an empty file is empty") {
  const scratch_directory directory;
  directory.write("empty", "");
  directory.write("three", "abc");
  CHECK(mapped_file(directory.path() / "empty").bytes().empty());
  CHECK(mapped_file(directory.path() / "three", 3).text() == "abc");
  CHECK(refusal([&] { mapped_file(directory.path() / "three", 2); }).find("3 bytes") != std::string::npos);
  CHECK(refusal([&] { mapped_file(directory.path() / "absent"); }).find("absent: cannot open") != std::string::npos);
  CHECK(refusal([&] { mapped_file{directory.path()}; }).find("not a regular file") != std::string::npos);
  directory.write("pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0f0f\nsize 2525440\n");
  const std::string pointer = refusal([&] { mapped_file(directory.path() / "pointer"); });
  CHECK(pointer.find("pointer: is a Git LFS pointer") != std::string::npos);
  CHECK(pointer.find("git lfs pull") != std::string::npos);
  mapped_file a(directory.path() / "three");
  mapped_file b(std::move(a));
  CHECK(b.text() == "abc");
  a = std::move(b);
  CHECK(a.text() == "abc");
}
