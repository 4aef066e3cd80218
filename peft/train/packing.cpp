#include <fmt/format.h>

#include <budwood/peft/train/sampler.h>
#include <budwood/quant/error.h>
#include <algorithm>
#include <map>

// Which rows go into which window: the part of Sampler that runs once.
namespace budwood::train {

void SampleOptions::validate() const {
  const auto fail = [](const char* field, const auto& value, const char* wanted) {
    throw Error("SampleOptions", fmt::format("{} is {}, wanted {}", field, value, wanted));
  };
  if (sequence_length < 1) fail("sequence_length", sequence_length, "at least 1");
  if (batch_size < 1) fail("batch_size", batch_size, "at least 1");
  if (packing != "concat" && packing != "pack" && packing != "none")
    fail("packing", fmt::format("\"{}\"", packing), "\"concat\", \"pack\" or \"none\"");
  if (long_rows != "truncate" && long_rows != "split")
    fail("long_rows", fmt::format("\"{}\"", long_rows), "\"truncate\" or \"split\"");
}

void Sampler::add_window(const Piece* pieces, size_t count) {
  pieces_.insert(pieces_.end(), pieces, pieces + count);
  windows_.push_back(static_cast<int64_t>(pieces_.size()));
  for (size_t p = 0; p < count; ++p) {
    report_.tokens += pieces[p].length;
    report_.longest = std::max(report_.longest, pieces[p].length);
  }
}

void Sampler::plan_concat() {
  // Every token but the very first is a label exactly once.
  int64_t left = data_->tokens() - 1;
  int64_t row = 0, token = 0;
  while (left > 0) {
    const Piece piece{row, token, std::min(options_.sequence_length, left)};
    left -= piece.length;
    int64_t counted = 0;
    for (int64_t need = piece.length; need > 0;) {
      const auto size = static_cast<int64_t>(data_->ids(row).size());
      const int64_t step = std::min(need, size - 1 - token);
      counted += data_->counted(row, token + 1, token + 1 + step);
      token += step;
      need -= step;
      if (need > 0) {  // the next label is the first token of the next row
        counted += data_->counts(++row, 0);
        token = 0;
        --need;
      }
    }
    if (counted > 0) add_window(&piece, 1);
    report_.counted += counted;
  }
}

void Sampler::plan_rows() {
  const int64_t most = options_.sequence_length;
  std::vector<Piece> pieces;
  for (int64_t row = 0; row < data_->rows(); ++row) {
    const auto inputs = static_cast<int64_t>(data_->ids(row).size()) - 1;
    const bool split = options_.long_rows == "split";
    const int64_t used = split ? inputs : std::min(inputs, most);
    const int64_t counted = data_->counted(row, 1, used + 1);
    if (inputs > used) {
      ++report_.truncated_rows;
      report_.dropped_tokens += inputs - used;
    }
    if (counted == 0) {
      ++report_.skipped_rows;
      continue;
    }
    if (inputs > most && split) ++report_.split_rows;
    report_.counted += counted;
    for (int64_t begin = 0; begin < used; begin += most) {
      const Piece piece{row, begin, std::min(most, used - begin)};
      if (data_->counted(row, begin + 1, begin + 1 + piece.length) > 0) pieces.push_back(piece);
    }
  }
  if (options_.packing == "none")
    for (const auto& piece : pieces) add_window(&piece, 1);
  else
    best_fit(std::move(pieces));
}

// Best fit, long pieces first: each goes into the window whose free room it leaves smallest.
void Sampler::best_fit(std::vector<Piece> pieces) {
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.length > b.length; });
  std::vector<std::vector<Piece>> windows;
  std::multimap<int64_t, size_t> room;  // free inputs -> window
  for (const auto& piece : pieces) {
    auto it = room.lower_bound(piece.length);
    size_t w = windows.size();
    int64_t left = options_.sequence_length;
    if (it == room.end()) {
      windows.emplace_back();
    } else {
      left = it->first;
      w = it->second;
      room.erase(it);
    }
    windows[w].push_back(piece);
    room.emplace(left - piece.length, w);
  }
  // Windows in the order of the data, as far as that goes.
  const auto earlier = [](const Piece& a, const Piece& b) {
    return a.row != b.row ? a.row < b.row : a.begin < b.begin;
  };
  for (auto& window : windows) std::sort(window.begin(), window.end(), earlier);
  std::sort(windows.begin(), windows.end(),
            [&](const auto& a, const auto& b) { return earlier(a[0], b[0]); });
  for (const auto& window : windows) add_window(window.data(), window.size());
}

std::string SampleReport::summary() const {
  auto text =
      fmt::format("{} rows -> {} windows with {} sequences, {} tokens, {} of them predicted", rows,
                  windows, sequences, tokens, counted);
  if (truncated_rows)
    text += fmt::format("\n{} rows were too long and lost {} tokens at their end", truncated_rows,
                        dropped_tokens);
  if (split_rows) text += fmt::format("\n{} rows were too long and were split", split_rows);
  if (skipped_rows)
    text += fmt::format("\n{} rows were skipped: none of their tokens is to be predicted",
                        skipped_rows);
  return text;
}

}  // namespace budwood::train
