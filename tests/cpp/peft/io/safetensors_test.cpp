#include <budwood/peft/io/safetensors.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>

#include <cstring>
#include <random>

#include "temporary_folder.h"

using namespace budwood;
using namespace budwood::io;
using namespace budwood::io::testing;

namespace {

std::string little_endian(uint64_t value) {
  std::string bytes(8, '\0');
  for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>(value >> (8 * i) & 0xff);
  return bytes;
}

// A file of a header, as it is, and `data` zero bytes.
std::string file_of(const std::string& header, size_t data = 0) {
  return little_endian(header.size()) + header + std::string(data, '\0');
}

SafetensorsFile parse(const std::string& bytes) {
  return SafetensorsFile::parse(MappedFile::copy_of(bytes, "model.safetensors"));
}

std::string refusal(const std::string& bytes) {
  return message_of<Error>([&] { parse(bytes); });
}

// What the reference writer (safetensors 0.8.0) makes of b = F32 [1, -2], h = BF16 [0.5],
// a = I8 [[1, 2, 3]] with the metadata format=pt.
const std::string kReference =
    std::string("\xc8\0\0\0\0\0\0\0", 8) +
    R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
    R"("h":{"dtype":"BF16","shape":[1],"data_offsets":[8,10]},)"
    R"("a":{"dtype":"I8","shape":[1,3],"data_offsets":[10,13]}}    )" +
    std::string("\0\0\x80\x3f\0\0\0\xc0\0\x3f\x01\x02\x03", 13);

std::span<const std::byte> as_bytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

}  // namespace

TEST_CASE("a file of the reference writer is read") {
  const auto file = parse(kReference);
  REQUIRE(file.tensors().size() == 3);
  CHECK(file.metadata() == Metadata{{"format", "pt"}});
  const auto& a = file.at("a");
  CHECK(a.dtype == Dtype::i8);
  CHECK(a.shape == std::vector<int64_t>{1, 3});
  CHECK(a.bytes() == 3);
  CHECK(std::memcmp(a.data, "\x01\x02\x03", 3) == 0);
  float b[2];
  std::memcpy(b, file.at("b").data, 8);
  CHECK(b[0] == 1.0f);
  CHECK(b[1] == -2.0f);
  CHECK(file.tensors()[1].name == "h");
  CHECK(file.find("c") == nullptr);
  CHECK(contains(message_of<Error>([&] { file.at("c"); }), "model.safetensors has no tensor 'c'"));
}

TEST_CASE("a file is written byte for byte as the reference writer does") {
  TemporaryFolder folder;
  const std::string b("\0\0\x80\x3f\0\0\0\xc0", 8), h("\0\x3f", 2), a("\x01\x02\x03", 3);
  write_safetensors(folder / "x.safetensors",
                    {{{"a", Dtype::i8, {1, 3}}, as_bytes(a)},
                     {{"h", Dtype::bf16, {1}}, as_bytes(h)},
                     {{"b", Dtype::f32, {2}}, as_bytes(b)}},
                    {{"format", "pt"}});
  CHECK(slurp(folder / "x.safetensors") == kReference);
  CHECK(SafetensorsFile::open(folder / "x.safetensors").tensors().size() == 3);
}

TEST_CASE("names are escaped as the reference writer does") {
  TemporaryFolder folder;
  const std::string data(4, '\0');
  write_safetensors(folder / "x", {{{"z\x01\n\t\b", Dtype::f32, {1}}, as_bytes(data)},
                                   {{"a", Dtype::f32, {1}}, as_bytes(data)},
                                   {{"\xc3\xa9\"\\/\x7f", Dtype::f32, {1}}, as_bytes(data)}});
  const std::string expected =
      "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
      "\"z\\u0001\\n\\t\\b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]},"
      "\"\xc3\xa9\\\"\\\\/\x7f\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}";
  CHECK(slurp(folder / "x").substr(8, expected.size()) == expected);
  CHECK(SafetensorsFile::open(folder / "x").find("z\x01\n\t\b") != nullptr);
}

TEST_CASE("dtypes are laid out in the reference writer's order") {
  TemporaryFolder folder;
  const char* order[] = {"U64",     "I64",         "F64",         "C64",     "F32",
                         "U32",     "I32",         "BF16",        "F16",     "U16",
                         "I16",     "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3",
                         "F8_E5M2", "I8",          "U8",          "F4",      "BOOL"};
  std::vector<TensorSpec> specs;
  for (const char* name : order)
    specs.insert(specs.begin(), {std::string("t_") + name, *dtype_from_name(name), {4}});
  SafetensorsWriter writer(folder / "x", specs);
  for (size_t i = 0; i < specs.size(); ++i)
    CHECK(writer.order()[i].name == std::string("t_") + order[i]);
}

TEST_CASE("data may come in pieces, and only in its turn and size") {
  TemporaryFolder folder;
  const std::string data(16, 'x');
  SafetensorsWriter writer(
      folder / "x", {{"w", Dtype::f32, {4}}, {"e", Dtype::f32, {0, 3}}, {"v", Dtype::u8, {2}}});
  CHECK(contains(message_of<Error>([&] { writer.write("v", data.data(), 2); }),
                 "data for 'v', but it is the turn of 'w'"));
  CHECK(contains(message_of<Error>([&] { writer.write("w", data.data(), 17); }),
                 "only 16 are still to come"));
  writer.write("w", data.data(), 10);
  CHECK(contains(message_of<Error>([&] { writer.commit(); }), "'w' still lacks 6 of 16 bytes"));
  writer.write("w", data.data(), 6);
  writer.write("e", nullptr, 0);
  writer.write("v", data.data(), 2);
  CHECK(contains(message_of<Error>([&] { writer.write("y", data.data(), 1); }),
                 "every tensor is complete"));
  CHECK(entries(folder.path()) == 1);
  writer.commit();
  const auto file = SafetensorsFile::open(folder / "x");
  CHECK(file.at("w").bytes() == 16);
  CHECK(file.at("e").bytes() == 0);
}

TEST_CASE("what cannot be written is refused before anything is") {
  TemporaryFolder folder;
  const auto refused = [&](std::vector<TensorSpec> specs, Metadata metadata = {}) {
    const auto text =
        message_of<Error>([&] { SafetensorsWriter writer(folder / "x", specs, metadata); });
    CHECK(entries(folder.path()) == 0);
    return text;
  };
  CHECK(contains(refused({{"a", Dtype::u8, {1}}, {"a", Dtype::f32, {1}}, {"a", Dtype::u8, {2}}}),
                 "two tensors are called 'a'"));
  CHECK(contains(refused({{"", Dtype::u8, {1}}}), "cannot name a tensor"));
  CHECK(contains(refused({{"__metadata__", Dtype::u8, {1}}}), "cannot name a tensor"));
  CHECK(contains(refused({{"\xff", Dtype::u8, {1}}}), "not valid UTF-8"));
  CHECK(contains(refused({{"a", Dtype::u8, {1}}}, {{"k", "\xc0"}}), "not valid UTF-8"));
  CHECK(contains(refused({{"a", Dtype::u8, {-1}}}), "no size in whole bytes"));
  CHECK(contains(refused({{"a", Dtype::f4, {3}}}), "no size in whole bytes"));
  CHECK(contains(refused({{"a", Dtype::f64, {int64_t{1} << 40, int64_t{1} << 40}}}), "no size"));
  const std::string data(3, 'x');
  CHECK(contains(message_of<Error>([&] {
                   write_safetensors(folder / "x", {{{"a", Dtype::u8, {2}}, as_bytes(data)}});
                 }),
                 "3 bytes given, U8 [2] needs 2"));
}

TEST_CASE("headers that are no header are refused") {
  CHECK(contains(refusal(""), "0 bytes are too short"));
  CHECK(contains(refusal("1234567"), "7 bytes are too short"));
  CHECK(contains(refusal(little_endian(UINT64_MAX) + "{}"), "18446744073709551615 bytes"));
  CHECK(contains(refusal(little_endian(100000001) + "{}"), "at most 100000000"));
  CHECK(contains(refusal(little_endian(3) + "{}"), "truncated: the header needs 3 bytes"));
  CHECK(contains(refusal(kReference.substr(0, 100)), "truncated"));
  CHECK(contains(refusal(file_of("")), "not a JSON object"));
  CHECK(contains(refusal(file_of("[]")), "not a JSON object"));
  CHECK(contains(refusal(file_of("   ")), "not a JSON object"));
  CHECK(contains(refusal(file_of("\xef\xbb\xbf{}")), "not a JSON object"));
  CHECK(contains(refusal(file_of(std::string("{}\0\0\0", 5))), "NUL"));
  CHECK(contains(refusal(file_of("{} x")), "not valid JSON"));
  CHECK(contains(refusal(file_of("{\"a")), "not valid JSON"));
  CHECK(contains(refusal(file_of("{\"\xff\":1}")), "not valid JSON"));
  CHECK(contains(refusal(file_of("{\"\\ud800\":1}")), "not valid JSON"));
  CHECK(contains(refusal(file_of(std::string(500000, '{'))), "not valid JSON"));
}

TEST_CASE("entries with wrong fields are refused, naming tensor and field") {
  const auto entry = [](const std::string& fields, size_t data = 4) {
    return refusal(file_of("{\"w\":{" + fields + "}}", data));
  };
  const std::string d = R"("dtype":"F32")", s = R"("shape":[1])", o = R"("data_offsets":[0,4])";
  CHECK(entry(d + "," + s + "," + o).empty());
  CHECK(contains(entry(s + "," + o), "tensor 'w': dtype is missing"));
  CHECK(contains(entry(d + "," + o), "tensor 'w': shape is missing"));
  CHECK(contains(entry(d + "," + s), "tensor 'w': data_offsets is missing"));
  CHECK(contains(entry(R"("dtype":"F8_E4M3FN",)" + s + "," + o), "unknown dtype 'F8_E4M3FN'"));
  CHECK(contains(entry(R"("dtype":7,)" + s + "," + o), "dtype is 7, a string is needed"));
  CHECK(contains(entry(R"("shape":"1",)" + d + "," + o), "shape is '1', a list is needed"));
  CHECK(contains(entry(R"("shape":[1.0],)" + d + "," + o), "shape holds 1.0"));
  CHECK(contains(entry(R"("shape":[-1],)" + d + "," + o), "shape holds -1"));
  CHECK(contains(entry(R"("shape":[[1]],)" + d + "," + o), "shape holds a list"));
  CHECK(contains(entry(R"("shape":null,)" + d + "," + o), "shape is null"));
  CHECK(contains(entry(R"("shape":[9223372036854775808],)" + d + "," + o), "a size of 92233"));
  CHECK(contains(entry(R"("data_offsets":[0],)" + d + "," + s), "has 1 integers"));
  CHECK(contains(entry(R"("data_offsets":[0,4,4],)" + d + "," + s), "more than 2"));
  CHECK(contains(entry(R"("data_offsets":[0,4.0],)" + d + "," + s), "data_offsets holds 4.0"));
  CHECK(contains(entry(R"("data_offsets":[0,18446744073709551616],)" + d + "," + s),
                 "data_offsets holds 18446744073709551616"));
  CHECK(contains(entry(R"("data_offsets":{},)" + d + "," + s), "data_offsets is an object"));
  CHECK(contains(entry(d + "," + d + "," + s + "," + o), "dtype stands twice"));
  CHECK(contains(entry(o + "," + d + "," + s + "," + o), "data_offsets stands twice"));
  CHECK(contains(refusal(file_of(R"({"w":null})")), "tensor 'w': the entry is null"));
  CHECK(contains(refusal(file_of(R"({"w":[1]})")), "tensor 'w': the entry is a list"));
  CHECK(contains(refusal(file_of(R"({"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})")),
                 "empty name"));
  CHECK(contains(refusal(file_of(R"({"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)"
                                 R"("w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})")),
                 "the tensor name 'w' stands twice"));
}

TEST_CASE("metadata is text or null, once") {
  CHECK(parse(file_of(R"({"__metadata__":null})")).metadata().empty());
  CHECK(parse(file_of(R"({"__metadata__":{}})")).metadata().empty());
  CHECK(contains(refusal(file_of(R"({"__metadata__":{"a":1}})")), "'a' in __metadata__ is 1"));
  CHECK(contains(refusal(file_of(R"({"__metadata__":{"a":{}}})")), "a string is needed"));
  CHECK(contains(refusal(file_of(R"({"__metadata__":[]})")), "__metadata__ is a list"));
  CHECK(contains(refusal(file_of(R"({"__metadata__":{},"__metadata__":{}})")), "stands twice"));
  CHECK(contains(refusal(file_of(R"({"__metadata__":{"a":"1","a":"1"}})")), "'a' stands twice"));
}

TEST_CASE("data that does not tile the file is refused, naming what was found and wanted") {
  const auto two = [](const std::string& a, const std::string& b, size_t data) {
    return refusal(file_of(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + a +
                               R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}",
                           data));
  };
  CHECK(two("[0,4]", "[4,8]", 8).empty());
  CHECK(two("[4,8]", "[0,4]", 8).empty());
  CHECK(contains(two("[4,0]", "[4,8]", 8), "'a': data_offsets [4, 0] run backwards"));
  CHECK(contains(two("[0,4]", "[4,8]", 7), "[4, 8] end beyond the 7 bytes"));
  CHECK(contains(two("[1,5]", "[5,9]", 9), "'a': its data begins at 1, 0 was expected"));
  CHECK(contains(two("[0,4]", "[5,9]", 9), "'b': its data begins at 5, 4 was expected: there is"));
  CHECK(contains(two("[0,4]", "[3,7]", 7), "it overlaps another"));
  CHECK(contains(two("[0,4]", "[0,4]", 4), "it overlaps another"));
  CHECK(contains(two("[0,4]", "[4,8]", 9), "end at byte 8 of the data, the file holds 9"));
  CHECK(contains(two("[0,4]", "[4,7]", 7), "hold 3 bytes, U8 [4] needs 4"));
  CHECK(contains(refusal(file_of("{}", 1)), "end at byte 0 of the data, the file holds 1"));
  const auto shape = [](const std::string& dtype, const std::string& sizes, size_t bytes) {
    return refusal(file_of(R"({"w":{"dtype":")" + dtype + R"(","shape":)" + sizes +
                               R"(,"data_offsets":[0,)" + std::to_string(bytes) + "]}}",
                           bytes));
  };
  CHECK(contains(shape("U8", "[8589934592,8589934592]", 0), "more elements than 64 bits"));
  CHECK(contains(shape("U8", "[4611686018427387904,4]", 0), "more elements than 64 bits"));
  CHECK(contains(shape("F64", "[4611686018427387904]", 0), "not a whole number of bytes within"));
  CHECK(contains(shape("F4", "[3]", 2), "not a whole number of bytes"));
  CHECK(contains(shape("F6_E2M3", "[2]", 2), "not a whole number of bytes"));
  CHECK(shape("F4", "[4]", 2).empty());
  CHECK(shape("F6_E3M2", "[4]", 3).empty());
}

TEST_CASE("what the format leaves free is accepted") {
  CHECK(refusal(file_of("{}")).empty());
  CHECK(refusal(file_of("  {}  ")).empty());
  CHECK(refusal(file_of(R"({"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4)).empty());
  CHECK(refusal(file_of(R"({"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3],)"
                        R"("extra":{"dtype":[1,{"shape":null}],"x":1.5},"more":[[],{}]}})",
                        3))
            .empty());
  // Zero-size tensors share an offset; F64 data lies at an odd place.
  const auto file = parse(file_of(R"({"e":{"dtype":"F32","shape":[0,7],"data_offsets":[3,3]},)"
                                  R"("d":{"dtype":"F64","shape":[1],"data_offsets":[3,11]},)"
                                  R"("z":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},)"
                                  R"("y":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}})",
                                  11));
  CHECK(file.tensors().size() == 4);
  CHECK(file.tensors()[0].name == "z");
  CHECK(file.tensors()[3].name == "d");
}

TEST_CASE("a damaged file is read or refused, never worse") {
  std::mt19937 random(1);
  const auto pick = [&](size_t n) {
    return std::uniform_int_distribution<size_t>(0, n - 1)(random);
  };
  size_t parsed = 0, refused = 0;
  for (int round = 0; round < 6000; ++round) {
    std::string bytes = kReference;
    const size_t edits = round % 2 == 0 ? 1 : 1 + pick(3);
    for (size_t i = 0; i < edits; ++i) {
      const size_t at = pick(bytes.size());
      switch (pick(4)) {
        case 0:
          bytes[at] = static_cast<char>(pick(256));
          break;
        case 1:
          bytes[at] ^= static_cast<char>(1 << pick(8));
          break;
        case 2:
          bytes.erase(at, 1 + pick(9));
          break;
        case 3:
          bytes.insert(at, bytes.substr(pick(bytes.size()), pick(20)));
          break;
      }
      if (bytes.empty()) break;
    }
    if (round % 8 == 7) bytes.resize(pick(bytes.size() + 1));
    try {
      const auto file = parse(bytes);
      unsigned sum = 0;
      for (const auto& t : file.tensors())
        for (uint64_t i = 0; i < t.bytes(); ++i) sum += std::to_integer<unsigned>(t.data[i]);
      CHECK(sum < 256 * 300);
      ++parsed;
    } catch (const Error&) {
      ++refused;
    }
  }
  CHECK(parsed > 100);
  CHECK(refused > 3000);
}
