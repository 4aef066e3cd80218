#include <budwood/peft/io/text.h>
#include <budwood/peft/json.h>
#include <budwood/peft/pattern.h>
#include <budwood/peft/targets.h>
#include <budwood/quant/error.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <set>
#include <unordered_set>

namespace budwood {
namespace {

using List = std::vector<std::string>;
using Set = std::unordered_set<std::string>;

constexpr size_t kReduceFrom = 20;  // PEFT leaves shorter lists alone
constexpr size_t kMaxSuggested = 20;

// Calls `see` with what follows each dot of a path, the longest first, until it returns true.
template <class F>
bool any_suffix(const std::string& path, F&& see) {
  for (size_t dot = path.find('.'); dot != std::string::npos; dot = path.find('.', dot + 1))
    if (see(path.substr(dot + 1))) return true;
  return false;
}

bool ends_with_any(const std::string& path, const Set& names) {
  return any_suffix(path, [&](const std::string& suffix) { return names.contains(suffix); });
}

std::string leaf_of(const std::string& path) {
  return path.substr(path.rfind('.') + 1);
}

bool is_all_linear(const Names& names) {
  const auto* text = std::get_if<std::string>(&names);
  if (!text) return false;
  std::string lower = *text;
  for (auto& c : lower)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return lower == "all-linear";
}

// What exclude_modules and modules_to_save take out.
class Exclusion {
 public:
  Exclusion(const Names& exclude, const std::optional<List>& modules_to_save) {
    if (const auto* text = std::get_if<std::string>(&exclude); text && !text->empty())
      regex_.emplace(*text);
    if (const auto* list = std::get_if<List>(&exclude)) names_ = Set(list->begin(), list->end());
    for (const auto& name : modules_to_save.value_or(List{}))
      saved_.emplace_back("(^|.*\\.)", name, "($|\\..*)");
  }

  bool named(const std::string& path) const {
    if (regex_) return regex_->full_match(path);
    return names_.contains(path) || ends_with_any(path, names_);
  }
  bool holds(const std::string& path) const {
    return named(path) || std::any_of(saved_.begin(), saved_.end(),
                                      [&](const Pattern& p) { return p.match_at_start(path); });
  }
  bool has_names() const { return regex_ || !names_.empty(); }

 private:
  std::optional<Pattern> regex_;
  Set names_;
  std::vector<Pattern> saved_;
};

// layers_to_transform with layers_pattern.
class LayerFilter {
 public:
  LayerFilter(const Layers& layers, const Names& layers_pattern) {
    if (const auto* one = std::get_if<int64_t>(&layers)) wanted_ = {*one};
    if (const auto* list = std::get_if<std::vector<int64_t>>(&layers))
      wanted_.insert(list->begin(), list->end());
    List names;
    if (const auto* text = std::get_if<std::string>(&layers_pattern); text && !text->empty())
      names = {*text};
    if (const auto* list = std::get_if<List>(&layers_pattern)) names = *list;
    for (const auto& name : names)
      patterns_.emplace_back("(?:^|.*?\\.)", name, "\\.(?P<idx>\\d+)\\.");
    if (names.empty()) patterns_.emplace_back(".*?\\.[^.]*\\.(?P<idx>\\d+)\\.");
  }

  const std::set<int64_t>& wanted() const { return wanted_; }
  bool passes(const std::string& path) const {
    if (wanted_.empty()) return true;
    const auto index = layer_of(path);
    return index && wanted_.contains(*index);
  }
  std::optional<int64_t> layer_of(const std::string& path) const {
    for (const auto& pattern : patterns_) {
      if (!pattern.match_at_start(path)) continue;
      const auto digits = pattern.group_at_start(path, "idx");
      int64_t index = 0;
      if (!digits) return {};
      const char* end = digits->data() + digits->size();
      const auto read = std::from_chars(digits->data(), end, index);
      if (read.ec != std::errc() || read.ptr != end) return {};
      return index;
    }
    return {};
  }

 private:
  std::set<int64_t> wanted_;
  std::vector<Pattern> patterns_;
};

class Matcher {
 public:
  Matcher(const AdapterConfig& config, const std::vector<ModuleInfo>& modules,
          const std::string& model_type, const std::optional<std::string>& task_type,
          Strictness strictness)
      : config_(config),
        modules_(modules),
        rules_(rules_of(config)),
        strictness_(strictness),
        exclusion_(rules_.exclude_modules, config.modules_to_save),
        filter_(rules_.layers_to_transform, rules_.layers_pattern) {
    resolve(model_type, task_type);
    match();
    count_targets();
    count_patterns();
    count_layers();
    check_exclusion();
  }

  TargetReport take() { return std::move(report_); }

 private:
  static TargetRules rules_of(const AdapterConfig& config) {
    if (auto rules = config.target_rules()) return *std::move(rules);
    throw Error("match_targets", fmt::format("{} does not choose modules", config.peft_type));
  }

  [[noreturn]] static void refuse(const std::string& fact) { throw Error("match_targets", fact); }
  void complain(const std::string& fact) {
    if (strictness_ == Strictness::strict) refuse(fact);
    report_.warnings.push_back(fact);
  }

  void resolve(const std::string& model_type, const std::optional<std::string>& task_type) {
    auto& names = report_.target_modules = rules_.target_modules;
    if (std::holds_alternative<std::monostate>(names)) {
      const auto defaults = default_target_modules(config_.peft_type, model_type);
      if (!defaults)
        refuse(
            fmt::format("target_modules is not given, and there is no default for the model type "
                        "{}; name them, for example \"all-linear\"",
                        io::in_quotes(model_type)));
      names = *defaults;
    } else if (is_all_linear(names)) {
      names = all_linear(model_type, task_type);
    } else {
      written_ = true;
    }
    const auto* list = std::get_if<List>(&names);
    if (!list) return;
    entries_ = *list;
    std::set<std::string> distinct(list->begin(), list->end());
    // IA3 must keep target_modules and feedforward_modules alike.
    if (distinct.size() < kReduceFrom || config_.peft_type == "IA3") return;
    const Set own(distinct.begin(), distinct.end());
    List others;
    for (const auto& m : modules_)
      if (!own.contains(m.path) && !ends_with_any(m.path, own)) others.push_back(m.path);
    auto reduced = minimal_suffixes(entries_, others);
    if (reduced.size() < distinct.size()) names = std::move(reduced);
  }

  List all_linear(const std::string& model_type,
                  const std::optional<std::string>& task_type) const {
    const auto has = [&](const std::string& path) {
      return std::any_of(modules_.begin(), modules_.end(), [&](auto& m) { return m.path == path; });
    };
    const bool has_output = std::any_of(modules_.begin(), modules_.end(),
                                        [](const auto& m) { return m.is_output_embedding; });
    std::string head;
    if (!has_output && !model_type.empty() && task_type == "SEQ_CLS")
      head = has("score") ? "score" : "classifier";
    List paths;
    for (const auto& m : modules_)
      if ((m.kind == ModuleKind::linear || m.kind == ModuleKind::conv1d) &&
          !m.is_output_embedding && (head.empty() || m.path != head))
        paths.push_back(m.path);
    return paths;
  }

  void match() {
    std::optional<Pattern> regex;
    Set names;
    if (const auto* text = std::get_if<std::string>(&report_.target_modules)) regex.emplace(*text);
    if (const auto* list = std::get_if<List>(&report_.target_modules))
      names = Set(list->begin(), list->end());
    for (const auto& m : modules_) {
      if (m.path.empty() || exclusion_.holds(m.path)) continue;
      const bool hit = regex ? regex->full_match(m.path)
                             : names.contains(m.path) ||
                                   (ends_with_any(m.path, names) && filter_.passes(m.path));
      if (!hit) continue;
      if (m.kind == ModuleKind::other)
        refuse(
            fmt::format("target_modules selects {}, which is neither a Linear, a Conv1D, a "
                        "convolution nor an Embedding; name the layers inside it",
                        io::in_quotes(m.path)));
      report_.matched.push_back(m.path);
    }
    if (report_.matched.empty())
      refuse(fmt::format("target_modules {} selects none of {} modules{}; their names end in {}",
                         shown_names(rules_.target_modules), modules_.size(),
                         filter_.wanted().empty() ? "" : " in the layers of layers_to_transform",
                         available()));
  }

  void count_targets() {
    if (const auto* text = std::get_if<std::string>(&report_.target_modules)) {
      report_.hits.push_back({"target_modules", *text, count(report_.matched)});
      return;
    }
    std::map<std::string, int64_t> hits;
    for (const auto& entry : entries_) hits.emplace(entry, 0);
    for (const auto& path : report_.matched) {
      const auto hit = [&](const std::string& name) {
        if (const auto it = hits.find(name); it != hits.end()) ++it->second;
        return false;
      };
      hit(path);
      any_suffix(path, hit);
    }
    for (const auto& [entry, n] : hits) {
      report_.hits.push_back({"target_modules", entry, n});
      // Entries that were not written one by one need not all hit.
      if (n == 0 && written_) complain(missed_target(entry));
    }
  }

  void count_patterns() {
    for (const auto& [option, text] : rules_.patterns) {
      const Pattern pattern("(.*\\.)?(", text, ")$");
      PatternHits hits{option, text, 0};
      for (const auto& path : report_.matched) hits.hits += pattern.match_at_start(path);
      if (hits.hits == 0)
        complain(fmt::format(
            "the {} entry {} matches none of the {} targeted modules; their names "
            "end in {}",
            option, io::in_quotes(text), report_.matched.size(), joined(leaves(report_.matched))));
      report_.hits.push_back(std::move(hits));
    }
  }

  void count_layers() {
    for (const auto wanted : filter_.wanted()) {
      PatternHits hits{"layers_to_transform", std::to_string(wanted), 0};
      for (const auto& path : report_.matched) hits.hits += filter_.layer_of(path) == wanted;
      if (hits.hits == 0)
        complain(fmt::format("layers_to_transform has {}, but no target is in that layer", wanted));
      report_.hits.push_back(std::move(hits));
    }
  }

  void check_exclusion() {
    const auto excluded = [&](const ModuleInfo& m) { return exclusion_.named(m.path); };
    if (exclusion_.has_names() && std::none_of(modules_.begin(), modules_.end(), excluded))
      report_.warnings.push_back(
          fmt::format("exclude_modules {} matches no module", shown_names(rules_.exclude_modules)));
  }

  std::string missed_target(const std::string& entry) const {
    const Set name{entry};
    int64_t taken_out = 0, other_layer = 0;
    for (const auto& m : modules_) {
      if (m.path != entry && !ends_with_any(m.path, name)) continue;
      ++(exclusion_.holds(m.path) ? taken_out : other_layer);
    }
    const auto start = fmt::format("the target_modules entry {} ", io::in_quotes(entry));
    if (taken_out > 0)
      return start + fmt::format(
                         "stands for {} modules, but exclude_modules or modules_to_save takes "
                         "them out",
                         taken_out);
    if (other_layer > 0)
      return start + fmt::format(
                         "stands for {} modules, but none in the layers of "
                         "layers_to_transform",
                         other_layer);
    return start +
           fmt::format("matches none of {} modules; the nearest name is '{}'; names end in {}",
                       modules_.size(), nearest_name(leaf_of(entry), adaptable_leaves()),
                       available());
  }

  static int64_t count(const List& list) { return static_cast<int64_t>(list.size()); }
  static List leaves(const List& paths) {
    std::set<std::string> names;
    for (const auto& path : paths) names.insert(leaf_of(path));
    return {names.begin(), names.end()};
  }
  List adaptable_leaves() const {
    List paths;
    for (const auto& m : modules_)
      if (m.kind != ModuleKind::other) paths.push_back(m.path);
    return leaves(paths);
  }
  std::string available() const { return joined(adaptable_leaves()); }
  static std::string joined(List names) {
    const bool cut = names.size() > kMaxSuggested;
    if (cut) names.resize(kMaxSuggested);
    return fmt::format("{}{}", fmt::join(names, ", "), cut ? ", ..." : "");
  }
  static std::string shown_names(const Names& names) {
    if (const auto* text = std::get_if<std::string>(&names)) return io::in_quotes(*text);
    const auto* list = std::get_if<List>(&names);
    return list ? fmt::format("[{}]", joined(*list)) : "(the model's default)";
  }

  const AdapterConfig& config_;
  const std::vector<ModuleInfo>& modules_;
  TargetRules rules_;
  Strictness strictness_;
  Exclusion exclusion_;
  LayerFilter filter_;
  List entries_;          // as resolved, before the reduction
  bool written_ = false;  // target_modules comes from the config itself
  TargetReport report_;
};

}  // namespace

TargetReport match_targets(const AdapterConfig& config, const std::vector<ModuleInfo>& modules,
                           const std::string& model_type,
                           const std::optional<std::string>& task_type, Strictness strictness) {
  config.validate(strictness);
  return Matcher(config, modules, model_type, task_type, strictness).take();
}

TargetReport match_targets(const AdapterConfig& config, const std::vector<ModuleInfo>& modules,
                           const std::string& model_type, Strictness strictness) {
  return match_targets(config, modules, model_type, config.task_type, strictness);
}

void validate_targets(const TargetRules& rules, const std::string& peft_type) {
  const auto refuse = [&](const char* fact) { throw Error(peft_type + " config", fact); };
  const auto* regex = std::get_if<std::string>(&rules.target_modules);
  const bool has_layers = !std::holds_alternative<std::monostate>(rules.layers_to_transform);
  const bool has_pattern = !std::holds_alternative<std::monostate>(rules.layers_pattern);
  if (regex && has_layers)
    refuse("layers_to_transform cannot be used when target_modules is a text");
  if (regex && has_pattern) refuse("layers_pattern cannot be used when target_modules is a text");
  const auto* text = std::get_if<std::string>(&rules.layers_pattern);
  const auto* list = std::get_if<List>(&rules.layers_pattern);
  const bool is_empty = (text && text->empty()) || (list && list->empty());
  if (has_pattern && !is_empty && !has_layers)
    refuse("layers_pattern needs layers_to_transform as well");
  if (regex && !is_all_linear(rules.target_modules)) Pattern{*regex};
  if (const auto* exclude = std::get_if<std::string>(&rules.exclude_modules)) Pattern{*exclude};
  LayerFilter(rules.layers_to_transform, rules.layers_pattern);
}

std::vector<std::string> minimal_suffixes(const std::vector<std::string>& targets,
                                          const std::vector<std::string>& others) {
  // A path as its ends, the shortest first.
  const auto ends_of = [](const std::string& path) {
    List ends;
    any_suffix(path, [&](const std::string& suffix) { return ends.push_back(suffix), false; });
    std::reverse(ends.begin(), ends.end());
    ends.push_back(path);
    return ends;
  };
  Set taken;
  for (const auto& path : others)
    for (auto& end : ends_of(path)) taken.insert(std::move(end));
  std::set<List> ordered;
  for (const auto& path : targets) ordered.insert(ends_of(path));
  Set required;
  for (const auto& ends : ordered) {
    const bool covered = std::any_of(ends.begin(), ends.end() - 1,
                                     [&](auto& end) { return required.contains(end); });
    if (covered) continue;
    const auto free = std::find_if(ends.begin(), ends.end(), [&](const std::string& end) {
      return !required.contains(end) && !taken.contains(end);
    });
    if (free != ends.end()) required.insert(*free);
  }
  const auto& result = required.empty() ? Set(targets.begin(), targets.end()) : required;
  std::set<std::string> sorted(result.begin(), result.end());
  return {sorted.begin(), sorted.end()};
}

}  // namespace budwood
