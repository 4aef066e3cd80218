#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace budwood {

/// Where virtual tokens stand among the tokens of a sequence.
///
/// Written as a text: "front", "after_bos", "end" or the index of the token before which they go,
/// counted in the sequence without padding; with several groups each has its count, as
/// "front:4,7:2,end:8". "end" is the end of the prompt: while training, before the first token that
/// is predicted with a loss.
struct Placement {
  struct Group {
    int64_t at = 0;  ///< token index; kEnd = the end of the prompt
    int64_t count = 0;
    bool operator==(const Group&) const = default;
  };
  static constexpr int64_t kEnd = -1;

  std::vector<Group> groups;  ///< in the order of the virtual tokens

  /// Throws Error for a text that means nothing and for counts that do not add up to `tokens`.
  static Placement parse(const std::string& text, int64_t tokens);
  bool only_front() const;
};

/// Sequences with virtual tokens among theirs.
struct Inserted {
  /// For each row of the result: the row of the input, or -1 - v for virtual token v.
  std::vector<int64_t> rows;
  std::vector<int64_t> cu;  ///< of the result
};

/// Lays the virtual tokens of `placements` (one after the other, numbered through) into sequences
/// [cu[s], cu[s + 1]). `prompt` as in Sequences. Groups at one place keep their order. Throws Error
/// for a place outside a sequence, naming sequence, place and length.
Inserted insert_virtual_tokens(const std::vector<const Placement*>& placements,
                               const std::vector<int64_t>& cu, const std::vector<int64_t>& prompt);

}  // namespace budwood
