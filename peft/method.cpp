#include <fmt/format.h>

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

}  // namespace budwood
