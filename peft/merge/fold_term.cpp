#include <budwood/peft/merge/fold_term.h>

#include <utility>

namespace budwood {
namespace {

std::map<std::string, FoldMethod>& methods() {
  static std::map<std::string, FoldMethod> all;
  return all;
}

}  // namespace

bool register_fold(const std::string& peft_type, FoldMethod method) {
  return methods().emplace(peft_type, std::move(method)).second;
}

const FoldMethod* find_fold(const std::string& peft_type) {
  const auto it = methods().find(peft_type);
  return it == methods().end() ? nullptr : &it->second;
}

}  // namespace budwood
