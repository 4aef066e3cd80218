#include <budwood/peft/io/gguf.h>
#include <budwood/quant/error.h>
#include <doctest/doctest.h>

#include <cstring>
#include <limits>
#include <random>

#include "temporary_folder.h"

using namespace budwood;
using namespace budwood::io;
using namespace budwood::io::testing;

namespace {

// Builds a file field by field, independent of the writer under test.
struct Bytes {
  std::string out;
  template <typename T>
  Bytes& put(T value) {
    out.append(reinterpret_cast<const char*>(&value), sizeof(T));
    return *this;
  }
  Bytes& raw(const std::string& text) {
    out += text;
    return *this;
  }
  Bytes& text(const std::string& text) { return put<uint64_t>(text.size()).raw(text); }
  Bytes& head(uint64_t tensors, uint64_t keys, uint32_t version = 3) {
    return raw("GGUF").put(version).put(tensors).put(keys);
  }
  Bytes& tensor(const std::string& name, const std::vector<uint64_t>& ne, uint32_t type,
                uint64_t offset) {
    text(name).put<uint32_t>(static_cast<uint32_t>(ne.size()));
    for (const auto n : ne) put(n);
    return put(type).put(offset);
  }
  Bytes& align(size_t to = 32) {
    out.resize((out.size() + to - 1) / to * to, '\0');
    return *this;
  }
};

// What gguf 0.19.0 writes for architecture llama, four keys and the tensors w = [[1,2,3],[4,5,6]]
// and n = [7]; 320 bytes.
std::string reference() {
  Bytes b;
  b.head(2, 4);
  b.text("general.architecture").put(8u).text("llama");
  b.text("llama.block_count").put(4u).put(1u);
  b.text("t.b").put(7u).raw("\x01");
  b.text("t.a").put(9u).put(8u).put<uint64_t>(2).text("x").text("yz");
  b.tensor("w", {3, 2}, 0, 0).tensor("n", {1}, 0, 32);
  CHECK(b.out.size() == 0xee);
  b.align();
  for (float v : {1.f, 2.f, 3.f, 4.f, 5.f, 6.f}) b.put(v);
  b.align().put(7.f).align();
  CHECK(b.out.size() == 320);
  return b.out;
}

GgufFile parse(const std::string& bytes) {
  return GgufFile::parse(MappedFile::copy_of(bytes, "model.gguf"));
}

std::string refusal(const std::string& bytes) {
  return message_of<Error>([&] { parse(bytes); });
}

// A file of one key whose value is given as raw bytes.
std::string with_value(const std::string& key, uint32_t type, const std::string& value) {
  return Bytes().head(0, 1).text(key).put(type).raw(value).out;
}

}  // namespace

TEST_CASE("a file of the reference writer is read") {
  const auto file = parse(reference());
  CHECK(file.version() == 3);
  CHECK(file.alignment() == 32);
  CHECK(file.metadata().size() == 4);
  CHECK(file.metadata()[1].first == "llama.block_count");
  CHECK(file.get_string("general.architecture") == "llama");
  CHECK(file.get_u32("llama.block_count") == 1);
  CHECK(file.get_bool("t.b"));
  CHECK(file.get_strings("t.a") == std::vector<std::string>{"x", "yz"});
  REQUIRE(file.tensors().size() == 2);
  const auto& w = file.at("w");
  CHECK(w.shape == std::vector<int64_t>{2, 3});
  CHECK(w.type == GgmlType::f32);
  CHECK(w.bytes == 24);
  float values[6];
  std::memcpy(values, w.data, 24);
  CHECK(values[0] == 1.0f);
  CHECK(values[5] == 6.0f);
  CHECK(file.at("n").shape == std::vector<int64_t>{1});
  CHECK(file.find("v") == nullptr);
  CHECK(contains(message_of<Error>([&] { file.at("v"); }), "model.gguf has no tensor 'v'"));
}

TEST_CASE("a file is written byte for byte as the reference writer does") {
  TemporaryFolder folder;
  const float w[] = {1, 2, 3, 4, 5, 6}, n = 7;
  GgufWriter writer(folder / "x.gguf",
                    {{"general.architecture", std::string("llama")},
                     {"llama.block_count", uint32_t{1}},
                     {"t.b", true},
                     {"t.a", GgufArray(std::vector<std::string>{"x", "yz"})}},
                    {{"w", GgmlType::f32, {2, 3}}, {"n", GgmlType::f32, {1}}});
  CHECK(contains(message_of<Error>([&] { writer.write("n", &n, 4); }), "it is the turn of 'w'"));
  writer.write("w", w, 8);
  CHECK(contains(message_of<Error>([&] { writer.commit(); }), "'w' still lacks 16 of 24 bytes"));
  CHECK(contains(message_of<Error>([&] { writer.write("w", w, 24); }), "only 16 are still"));
  writer.write("w", w + 2, 16);
  writer.write("n", &n, 4);
  CHECK(contains(message_of<Error>([&] { writer.write("n", &n, 4); }), "every tensor is complete"));
  writer.commit();
  CHECK(slurp(folder / "x.gguf") == reference());
  CHECK(GgufFile::open(folder / "x.gguf").tensors().size() == 2);
}

TEST_CASE("every kind of value comes back as it was written") {
  TemporaryFolder folder;
  const GgufMetadata metadata = {
      {"u8", uint8_t{200}},
      {"i8", int8_t{-5}},
      {"u16", uint16_t{60000}},
      {"i16", int16_t{-300}},
      {"u32", uint32_t{4000000000}},
      {"i32", int32_t{-70000}},
      {"f32", 1.5f},
      {"bool", false},
      {"text", std::string("a\0b\xff", 4)},
      {"u64", uint64_t{1} << 40},
      {"i64", int64_t{-1} << 40},
      {"f64", 0.1},
      {"general.alignment", uint32_t{64}},
      {"[u8]", GgufArray(std::vector<uint8_t>{1, 2})},
      {"[i32]", GgufArray(std::vector<int32_t>{-1, 2})},
      {"[f32]", GgufArray(std::vector<float>{0.5f})},
      {"[bool]", GgufArray(std::vector<bool>{true, false, true})},
      {"[text]", GgufArray(std::vector<std::string>{"", "x"})},
      {"[u64]", GgufArray(std::vector<uint64_t>{1, UINT64_MAX})},
      {"[f64]", GgufArray(std::vector<double>{})},
  };
  GgufWriter writer(
      folder / "x", metadata,
      {{"e", GgmlType::f32, {0, 4}}, {"s", GgmlType::f32, {}}, {"q", GgmlType::q4_0, {2, 64}}});
  writer.write("s", "1234", 4);
  writer.write("q", std::string(72, 'q').data(), 72);
  writer.commit();
  const auto file = GgufFile::open(folder / "x");
  CHECK(file.metadata() == metadata);
  CHECK(file.alignment() == 64);
  CHECK(file.at("q").bytes == 72);
  CHECK(file.at("q").offset == 64);
  CHECK(file.at("q").data[71] == std::byte{'q'});
  CHECK(file.at("s").shape.empty());
  CHECK(std::filesystem::file_size(folder / "x") % 64 == 0);
}

TEST_CASE("a file that is read piece by piece says what a mapped one says") {
  TemporaryFolder folder;
  // Longer than what is fetched at once, so that fields and texts lie across the seams.
  std::vector<std::string> words;
  for (int i = 0; i < 200000; ++i) words.push_back("word " + std::to_string(i));
  GgufWriter writer(folder / "x",
                    {{"words", GgufArray(words)},
                     {"numbers", GgufArray(std::vector<float>(400000, 1.5f))},
                     {"last", std::string("key")}},
                    {{"a", GgmlType::f32, {3}}, {"b", GgmlType::q8_0, {2, 32}}});
  writer.write("a", "0123456789ab", 12);
  writer.write("b", std::string(68, 'b').data(), 68);
  writer.commit();
  const auto mapped = GgufFile::open(folder / "x");
  const auto pieces = GgufFile::open(folder / "x", Access::headers);
  CHECK(pieces.metadata() == mapped.metadata());
  CHECK(pieces.path() == mapped.path());
  REQUIRE(pieces.tensors().size() == 2);
  CHECK(pieces.at("b").data == nullptr);
  std::string bytes(5, ' ');
  for (const auto* file : {&mapped, &pieces}) {
    file->at("a").read(7, bytes.data(), 5);
    CHECK(bytes == "789ab");
    file->at("b").read(63, bytes.data(), 5);
    CHECK(bytes == "bbbbb");
    CHECK(contains(message_of<Error>([&] { file->at("a").read(8, bytes.data(), 5); }),
                   "'a' has 12 bytes, 5 at 8"));
  }
  for (const int64_t size : {5'000'000, 1 << 20, 20, 3}) {
    std::filesystem::resize_file(folder / "x", static_cast<uintmax_t>(size));
    const auto refused = [&](Access access) {
      return message_of<Error>([&] { GgufFile::open(folder / "x", access); });
    };
    CHECK(refused(Access::headers) == refused(Access::mapped));
    CHECK(!refused(Access::headers).empty());
  }
}

TEST_CASE("getters convert integers that fit and name the key otherwise") {
  TemporaryFolder folder;
  GgufWriter writer(folder / "x",
                    {{"small", uint8_t{7}},
                     {"negative", int32_t{-1}},
                     {"large", uint64_t{1} << 32},
                     {"float", 2.5f},
                     {"double", 2.5},
                     {"text", std::string("t")},
                     {"list", GgufArray(std::vector<uint16_t>{1, 2})},
                     {"huge", GgufArray(std::vector<uint64_t>{UINT64_MAX})}},
                    {});
  writer.commit();
  const auto file = GgufFile::open(folder / "x");
  CHECK(file.get_u32("small") == 7);
  CHECK(file.get_u64("large") == uint64_t{1} << 32);
  CHECK(file.get_f32("float") == 2.5f);
  CHECK(file.get_f32("double") == 2.5f);
  CHECK(file.get_integers("list") == std::vector<int64_t>{1, 2});
  CHECK(file.get_u32("none", 9) == 9);
  CHECK(file.get_string("none", "absent") == "absent");
  CHECK(file.get_bool("none", true));
  CHECK(file.get_f32("none", 0.5f) == 0.5f);
  const auto text = [&](auto&& body) { return message_of<Error>(body); };
  CHECK(contains(text([&] { file.get_u32("none"); }), "has no key 'none'"));
  CHECK(contains(text([&] { file.get_u32("negative"); }), "'negative' is -1, which does not fit"));
  CHECK(contains(text([&] { file.get_u32("large"); }), "'large' is 4294967296"));
  CHECK(contains(text([&] { file.get_u32("float"); }), "'float' is of type f32, u32 is needed"));
  CHECK(contains(text([&] { file.get_u32("list", 3); }), "'list' is of type array of u16"));
  CHECK(contains(text([&] { file.get_string("small"); }), "is of type u8, string is needed"));
  CHECK(contains(text([&] { file.get_strings("list"); }), "array of string is needed"));
  CHECK(contains(text([&] { file.get_integers("huge"); }), "does not fit 64 bits"));
  CHECK(contains(text([&] { file.get_f32("small"); }), "f32 is needed"));
  CHECK(contains(text([&] { file.get_bool("small"); }), "bool is needed"));
}

TEST_CASE("what is no GGUF file, or one of another version or byte order, is refused") {
  CHECK(contains(refusal(""), "truncated"));
  CHECK(contains(refusal("GGU"), "truncated"));
  CHECK(contains(refusal("PK\x03\x04" + std::string(40, '\0')), "begins with 'PK\\x03\\x04'"));
  for (const uint32_t version : {0u, 1u, 4u})
    CHECK(contains(refusal(Bytes().head(0, 0, version).out),
                   "version " + std::to_string(version) + ", supported are 2 and 3"));
  CHECK(contains(refusal(Bytes().head(0, 0, 0x03000000).out), "big-endian"));
  CHECK(refusal(Bytes().head(0, 0, 2).out).empty());
  CHECK(contains(refusal(Bytes().head(0, 1000).out), "counts 1000 keys in 0 bytes"));
  CHECK(contains(refusal(Bytes().head(UINT64_MAX, 0).out), "tensors in 0 bytes"));
}

TEST_CASE("damaged metadata is refused, naming the key") {
  const auto u64 = [](uint64_t v) { return Bytes().put(v).out; };
  CHECK(contains(refusal(Bytes().head(0, 1).text("").put(4u).put(1u).raw("xxxx").out), "empty"));
  CHECK(contains(refusal(with_value("\xff", 4, "1234")), "not valid UTF-8"));
  CHECK(contains(refusal(with_value("k", 13, "12345678")), "'k' is of the unknown type 13"));
  CHECK(contains(refusal(with_value("k", 8, u64(100))), "a text of 100 bytes"));
  CHECK(contains(refusal(with_value("k", 8, u64(UINT64_MAX))), "a text of"));
  CHECK(contains(refusal(with_value("k", 7, "\x02")), "'k' is a bool of value 2"));
  CHECK(contains(refusal(with_value("k", 10, "1234")), "truncated"));
  const auto array = [&](uint32_t type, uint64_t count, const std::string& data = "") {
    return refusal(with_value("k", 9, Bytes().put(type).put(count).raw(data).out));
  };
  CHECK(contains(array(9, 1, std::string(20, '\0')), "an array of arrays"));
  CHECK(contains(array(77, 1, "x"), "unknown type 77"));
  CHECK(contains(array(4, (uint64_t{1} << 30) + 1), "at most 1073741824"));
  CHECK(contains(array(4, uint64_t{1} << 30), "truncated or damaged"));
  CHECK(contains(array(8, uint64_t{1} << 30), "texts"));
  CHECK(contains(array(7, uint64_t{1} << 30), "bools"));
  CHECK(contains(array(7, 2, std::string("\x01\x07", 2)), "a bool of value 7"));
  CHECK(contains(array(10, UINT64_MAX / 8 + 2), "at most"));
  CHECK(array(4, 0).empty());
  const auto twice = Bytes().head(0, 2).text("k").put(4u).put(1u).text("k").put(4u).put(1u).out;
  CHECK(contains(refusal(twice), "the key 'k' stands twice"));
  const std::string a = "general.alignment";
  CHECK(contains(refusal(with_value(a, 10, u64(32))), "general.alignment is of type u64"));
  CHECK(contains(refusal(with_value(a, 4, Bytes().put(0u).out)), "general.alignment is 0"));
  CHECK(contains(refusal(with_value(a, 4, Bytes().put(48u).out)), "general.alignment is 48"));
  CHECK(contains(refusal(with_value("split.count", 2, Bytes().put(uint16_t{3}).out)),
                 "one of 3 parts"));
  CHECK(refusal(with_value("split.count", 2, Bytes().put(uint16_t{1}).out)).empty());
}

TEST_CASE("damaged tensor infos are refused, naming the tensor") {
  const auto one = [](const std::string& name, const std::vector<uint64_t>& ne, uint32_t type,
                      uint64_t offset, size_t data) {
    return refusal(
        Bytes().head(1, 0).tensor(name, ne, type, offset).align().raw(std::string(data, 'd')).out);
  };
  CHECK(one("w", {32}, 8, 0, 34).empty());
  CHECK(one("w", {32, 2}, 8, 0, 68).empty());
  CHECK(contains(one("w", {32}, 8, 0, 33), "'w': its 34 bytes at offset 0 end beyond the 33"));
  CHECK(contains(one("w", {32}, 8, 32, 66), "'w': its data is at offset 32, 0 was expected"));
  CHECK(
      contains(one("w", {33}, 8, 0, 68), "'w': rows of 33 elements, Q8_0 needs a multiple of 32"));
  CHECK(contains(one("w", {1}, 31, 0, 68), "'w': unknown ggml type 31"));
  CHECK(contains(one("w", {1, 1, 1, 1, 1}, 0, 0, 4), "'w': 5 dimensions"));
  CHECK(contains(one("w", {uint64_t{1} << 63}, 0, 0, 4), "a size of 9223372036854775808"));
  CHECK(contains(one("w", {uint64_t{1} << 33, uint64_t{1} << 33}, 0, 0, 4), "more elements"));
  CHECK(contains(one("w", {uint64_t{1} << 62}, 0, 0, 4), "more bytes"));
  CHECK(contains(one("", {1}, 0, 0, 4), "empty name"));
  CHECK(contains(one(std::string(64, 'n'), {1}, 0, 0, 4), "a name of 64 bytes"));
  CHECK(one(std::string(63, 'n'), {1}, 0, 0, 4).empty());
  // A type that cannot be decoded is still listed.
  CHECK(one("w", {256}, 16, 0, 66).empty());
  const auto two = [](uint64_t second, const std::string& name) {
    return refusal(Bytes()
                       .head(2, 0)
                       .tensor("a", {1}, 0, 0)
                       .tensor(name, {1}, 0, second)
                       .align()
                       .raw(std::string(64, 'd'))
                       .out);
  };
  CHECK(two(32, "b").empty());
  CHECK(contains(two(4, "b"), "'b': its data is at offset 4, 32 was expected"));
  CHECK(contains(two(0, "b"), "32 was expected"));
  CHECK(contains(two(32, "a"), "the tensor name 'a' stands twice"));
  CHECK(contains(refusal(Bytes().head(1, 0).tensor("w", {1}, 0, 0).out), "truncated"));
}

TEST_CASE("what cannot be written is refused before anything is") {
  TemporaryFolder folder;
  const auto refused = [&](GgufMetadata metadata, std::vector<GgufTensorSpec> tensors) {
    const auto text =
        message_of<Error>([&] { GgufWriter writer(folder / "x", metadata, tensors); });
    CHECK(entries(folder.path()) == 0);
    return text;
  };
  CHECK(contains(refused({{"k", true}, {"k", true}}, {}), "'k' stands twice"));
  CHECK(contains(refused({{"", true}}, {}), "empty"));
  CHECK(contains(refused({{"k", GgufArray(std::monostate())}}, {}), "without elements' type"));
  CHECK(contains(refused({{"general.alignment", uint32_t{3}}}, {}), "power of two"));
  CHECK(contains(refused({}, {{"w", GgmlType::q4_k, {128}}}), "multiple of 256"));
  CHECK(contains(refused({}, {{"w", GgmlType::f32, {-1}}}), "no size"));
  CHECK(contains(refused({}, {{"w", GgmlType::f32, {1, 1, 1, 1, 1}}}), "more than 4 dimensions"));
  CHECK(contains(refused({}, {{std::string(64, 'n'), GgmlType::f32, {1}}}), "has 64 bytes"));
  CHECK(
      contains(refused({}, {{"w", GgmlType::f32, {1}}, {"w", GgmlType::f32, {1}}}), "two tensors"));
}

TEST_CASE("a damaged file is read or refused, never worse") {
  std::mt19937 random(2);
  const auto pick = [&](size_t n) {
    return std::uniform_int_distribution<size_t>(0, n - 1)(random);
  };
  const std::string whole = reference();
  size_t parsed = 0, refused = 0;
  for (int round = 0; round < 6000; ++round) {
    std::string bytes = whole;
    const size_t edits = round % 2 == 0 ? 1 : 1 + pick(4);
    for (size_t i = 0; i < edits; ++i) {
      const size_t at = pick(bytes.size());
      switch (pick(5)) {
        case 0:
          bytes[at] = static_cast<char>(pick(256));
          break;
        case 1:
          bytes[at] ^= static_cast<char>(1 << pick(8));
          break;
        case 2:
          bytes[at] = static_cast<char>(pick(2) * 255);
          break;
        case 3:
          bytes.erase(at, 1 + pick(9));
          break;
        case 4:
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
        for (uint64_t i = 0; i < t.bytes; ++i) sum += std::to_integer<unsigned>(t.data[i]);
      CHECK(sum < 256 * 400);
      ++parsed;
    } catch (const Error&) {
      ++refused;
    }
  }
  CHECK(parsed > 500);
  CHECK(refused > 1500);
}

TEST_CASE("a type that cannot be decoded is refused by name, with those that can") {
  require_decodable(GgmlType::q6_k, "w", "x.gguf");
  const auto text = message_of<Error>([] { require_decodable(GgmlType::iq2_xs, "w", "x.gguf"); });
  CHECK(contains(text, "x.gguf: tensor 'w' is of type IQ2_XS; supported are F32, F16, Q4_0"));
  CHECK(contains(text, "Q6_K, BF16"));
}
