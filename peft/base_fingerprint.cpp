#include <budwood/peft/base_fingerprint.h>
#include <budwood/peft/io/text.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <bit>
#include <charconv>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

namespace budwood {
namespace {

constexpr int64_t kVersion = 1;
// Half a step of bfloat16 is 0.2 % of a number; four bits are 9 to 12 % off, K-quants of 2 to 3
// bits less than 30 %.
constexpr double kRounding = 0.004, kQuantised = 0.3;

uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint64_t hash_of(const std::string& text) {  // FNV-1a
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
  return hash;
}

std::string hex_of(const std::array<float, kSamples>& values) {
  std::string text;
  for (const float value : values) text += fmt::format("{:08x}", std::bit_cast<uint32_t>(value));
  return text;
}

std::array<float, kSamples> values_of(const std::string& hex) {
  std::array<float, kSamples> values{};
  if (hex.size() != 8 * kSamples)
    throw Error("base_fingerprint",
                fmt::format("{} digits of values, wanted {}", hex.size(), 8 * kSamples));
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits = 0;
    const char* begin = hex.data() + 8 * i;
    if (std::from_chars(begin, begin + 8, bits, 16).ptr != begin + 8)
      throw Error("base_fingerprint", "the values are not hexadecimal");
    values[i] = std::bit_cast<float>(bits);
  }
  return values;
}

}  // namespace

std::vector<std::pair<int64_t, int64_t>> sampled_places(const std::string& path, int64_t out,
                                                        int64_t in) {
  std::vector<std::pair<int64_t, int64_t>> places;
  if (out < 1 || in < 1) return places;
  uint64_t state = hash_of(path);
  for (int64_t i = 0; i < kSamples; ++i) {
    state = mixed(state);
    places.emplace_back(static_cast<int64_t>((state >> 32) % static_cast<uint64_t>(out)),
                        static_cast<int64_t>((state & 0xffffffffu) % static_cast<uint64_t>(in)));
  }
  return places;
}

std::string BaseFingerprint::to_json() const {
  nlohmann::ordered_json json = {{"version", kVersion}};
  json["weights"] = nlohmann::ordered_json::object();
  for (const auto& weight : weights)
    json["weights"][weight.path] = {{"shape", {weight.out, weight.in}},
                                    {"form", weight.form},
                                    {"packed", weight.packed},
                                    {"values", hex_of(weight.values)}};
  return json.dump();
}

BaseFingerprint BaseFingerprint::from_json(const std::string& text) {
  BaseFingerprint fingerprint;
  try {
    const auto json = io::parse_json(text, kBaseKey);
    const auto version = json.at("version").get<int64_t>();
    if (version < 1 || version > kVersion)
      throw Error("base_fingerprint", fmt::format("{} is of version {}, this program reads up to "
                                                  "{}",
                                                  kBaseKey, version, kVersion));
    for (const auto& [path, one] : json.at("weights").items())
      fingerprint.weights.push_back(
          {path, one.at("shape").at(0).get<int64_t>(), one.at("shape").at(1).get<int64_t>(),
           one.at("form").get<std::string>(), one.at("packed").get<bool>(),
           values_of(one.at("values").get<std::string>())});
  } catch (const nlohmann::json::exception& e) {
    throw Error("base_fingerprint", fmt::format("{}: {}", kBaseKey, e.what()));
  }
  return fingerprint;
}

std::string BaseFingerprint::digest() const {
  return fmt::format("{:016x}", hash_of(to_json()));
}

BaseComparison compare(const BaseFingerprint& trained, const BaseFingerprint& found) {
  std::map<std::string, const WeightSample*> there;
  for (const auto& weight : found.weights) there[weight.path] = &weight;
  BaseComparison comparison;
  double difference = 0, size = 0;
  bool packed = false, shapes = true;
  for (const auto& weight : trained.weights) {
    const auto it = there.find(weight.path);
    if (it == there.end()) continue;
    const auto& other = *it->second;
    if (comparison.trained_form.empty()) {
      comparison.trained_form = weight.form;
      comparison.found_form = other.form;
    }
    shapes &= weight.out == other.out && weight.in == other.in;
    packed |= weight.packed || other.packed;
    for (size_t i = 0; i < weight.values.size(); ++i) {
      const double a = weight.values[i], b = other.values[i];
      difference += (a - b) * (a - b);
      size += a * a;
    }
  }
  comparison.distance = difference > 0 ? std::sqrt(difference / size) : 0.0;
  if (!shapes || !(comparison.distance <= kQuantised))
    comparison.match = BaseMatch::different;
  else if (comparison.distance > kRounding)
    comparison.match = packed ? BaseMatch::quantised_form : BaseMatch::different;
  return comparison;
}

}  // namespace budwood
