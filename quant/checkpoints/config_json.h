#pragma once

#include <fmt/format.h>

#include <budwood/quant/error.h>
#include <nlohmann/json.hpp>
#include <string>

/// Reading `quantization_config`; for the sources beside this file only.
namespace budwood::quant {

/// The members of one configuration, read with Errors that name the member.
class ConfigJson {
 public:
  ConfigJson(const char* method, const std::string& text)
      : method_(method), json_(nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false)) {
    if (!json_.is_object()) refuse("is not a JSON object");
    const auto found = get<std::string>("quant_method", method);
    if (found != method) refuse(fmt::format("quant_method is '{}'", found));
  }

  template <class T>
  T get(const char* key, T fallback) const {
    const auto it = json_.find(key);
    if (it == json_.end() || it->is_null()) return fallback;
    const auto kind = nlohmann::json(fallback).type();
    // Texts hold counts as either kind of integer.
    const bool fits =
        it->is_number_integer() ? nlohmann::json(fallback).is_number_integer() : it->type() == kind;
    if (!fits) refuse(fmt::format("{} is {}; wanted {}", key, it->dump(), kind_name(kind)));
    return it->get<T>();
  }
  bool has(const char* key) const { return json_.contains(key) && !json_.at(key).is_null(); }
  const nlohmann::json& operator[](const char* key) const { return json_.at(key); }

  [[noreturn]] void refuse(const std::string& fact) const {
    throw Error(fmt::format("{}_config", method_), "quantization_config: " + fact);
  }

 private:
  static const char* kind_name(nlohmann::json::value_t kind) {
    switch (kind) {
      case nlohmann::json::value_t::boolean:
        return "true or false";
      case nlohmann::json::value_t::string:
        return "a text";
      default:
        return "an integer";
    }
  }
  const char* method_;
  nlohmann::json json_;
};

}  // namespace budwood::quant
