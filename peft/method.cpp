#include <ATen/CPUGeneratorImpl.h>
#include <fmt/format.h>

#include <budwood/peft/config.h>
#include <budwood/peft/method.h>
#include <budwood/quant/error.h>
#include <map>

namespace budwood {
namespace {

std::map<std::string, Method>& methods() {
  static std::map<std::string, Method> table;
  return table;
}

}  // namespace

bool register_method(const std::string& peft_type, Method method) {
  return methods().emplace(peft_type, std::move(method)).second;
}

const Method& method_of(const std::string& peft_type) {
  const auto it = methods().find(peft_type);
  if (it != methods().end()) return it->second;
  std::string known;
  for (const auto& [name, method] : methods()) known += (known.empty() ? "" : ", ") + name;
  throw Error("inject",
              fmt::format("method '{}' is not supported; supported: {}", peft_type, known));
}

void require_kind(const Place& place, SlotKind kind, const std::string& peft_type) {
  if (place.kind == kind) return;
  throw Error("inject",
              fmt::format("{} attaches to {} slots, and '{}' is one of kind {}", peft_type,
                          slot_kind_name(kind), place.path, slot_kind_name(place.kind)));
}

void refuse_config(const std::string& peft_type) {
  throw Error("inject",
              fmt::format("the configuration says peft_type {} and is of another method's kind",
                          peft_type));
}

at::Generator stream(uint64_t seed) {
  return at::make_generator<at::CPUGeneratorImpl>(seed);
}

}  // namespace budwood
