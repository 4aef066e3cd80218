#include <budwood/peft/placement.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <sstream>

namespace budwood {
namespace {

[[noreturn]] void refuse(const std::string& fact) {
  throw Error("placement", fact);
}

int64_t number(const std::string& text, const std::string& whole) {
  int64_t value = -1;
  const auto [end, fault] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (fault != std::errc() || end != text.data() + text.size() || value < 0)
    refuse(
        fmt::format("'{}' has '{}' where a number of 0 or more is wanted, as in \"front\", "
                    "\"after_bos\", \"end\", \"7\" or \"front:4,7:2,end:8\"",
                    whole, text));
  return value;
}

int64_t place_of(const std::string& text, const std::string& whole) {
  if (text == "front") return 0;
  if (text == "after_bos") return 1;
  if (text == "end") return Placement::kEnd;
  return number(text, whole);
}

}  // namespace

Placement Placement::parse(const std::string& text, int64_t tokens) {
  Placement placement;
  std::stringstream parts(text);
  int64_t sum = 0;
  for (std::string part; std::getline(parts, part, ',');) {
    const auto colon = part.find(':');
    const auto at = place_of(part.substr(0, colon), text);
    const auto count = colon == std::string::npos ? tokens : number(part.substr(colon + 1), text);
    placement.groups.push_back({at, count});
    sum += count;
  }
  if (placement.groups.empty()) refuse("an empty text says no place");
  if (sum != tokens)
    refuse(fmt::format("the groups of '{}' hold {} virtual tokens, and num_virtual_tokens is {}",
                       text, sum, tokens));
  return placement;
}

bool Placement::only_front() const {
  return std::all_of(groups.begin(), groups.end(), [](const Group& g) { return g.at == 0; });
}

Inserted insert_virtual_tokens(const std::vector<const Placement*>& placements,
                               const std::vector<int64_t>& cu, const std::vector<int64_t>& prompt) {
  Inserted result;
  result.cu.push_back(0);
  struct Put {
    int64_t at, first, count;
  };
  for (size_t s = 0; s + 1 < cu.size(); ++s) {
    const int64_t length = cu[s + 1] - cu[s];
    const int64_t end = prompt.empty() ? length : prompt[s];
    std::vector<Put> puts;
    int64_t number = 0;
    for (const auto* placement : placements)
      for (const auto& group : placement->groups) {
        const int64_t at = group.at == Placement::kEnd ? end : group.at;
        if (at > length)
          throw Error("virtual tokens", fmt::format("sequence {} has {} tokens, and virtual tokens "
                                                    "are to stand before its token {}",
                                                    s, length, at));
        puts.push_back({at, number, group.count});
        number += group.count;
      }
    std::stable_sort(puts.begin(), puts.end(),
                     [](const Put& a, const Put& b) { return a.at < b.at; });
    auto put = puts.begin();
    for (int64_t i = 0; i <= length; ++i) {
      for (; put != puts.end() && put->at == i; ++put)
        for (int64_t v = 0; v < put->count; ++v) result.rows.push_back(-1 - (put->first + v));
      if (i < length) result.rows.push_back(cu[s] + i);
    }
    result.cu.push_back(static_cast<int64_t>(result.rows.size()));
  }
  return result;
}

}  // namespace budwood
