// Text -> words and how often each occurs. The regular expressions of tokenizer.json, spelled out by hand.
#include <algorithm>
#include <array>
#include <cstring>
#include <thread>

#include "bpe.h"
#include "bpe_words.h"
#include "character_classes.h"

namespace bpe {
namespace {

// The class of each character; made on first use.
const std::vector<uint8_t>& class_table() {
  static const std::vector<uint8_t> table = [] {
    std::vector<uint8_t> made(0x110000);
    const size_t ranges = sizeof kClassRanges / sizeof *kClassRanges;
    for (size_t r = 0; r < ranges; r++) {
      const size_t end = r + 1 < ranges ? kClassRanges[r + 1] >> 3 : made.size();
      std::fill(made.begin() + (kClassRanges[r] >> 3), made.begin() + end, uint8_t(kClassRanges[r] & 7));
    }
    return made;
  }();
  return table;
}

// One line of text, decoded. The matchers give the end of what their expression matches at `i`, or `i`.
struct Line {
  std::vector<uint32_t> c;   // characters
  std::vector<uint8_t> k;    // their classes
  std::vector<uint32_t> at;  // where each begins, and the end: bytes

  bool is(size_t i, size_t end, CharacterClass a) const { return i < end && k[i] == a; }
  bool letter(size_t i, size_t end) const { return is(i, end, kLetter); }
  bool newline(size_t i, size_t end) const { return i < end && (c[i] == '\r' || c[i] == '\n'); }
  // [^\s\p{L}\p{N}]
  bool sign(size_t i, size_t end) const { return i < end && k[i] != kSpace && k[i] != kLetter && k[i] != kNumber; }

  template <class Is>
  static size_t run(size_t i, Is is) {
    while (is(i)) i++;
    return i;
  }
  size_t newlines(size_t i, size_t end) const {
    return run(i, [&](size_t j) { return newline(j, end); });
  }
  // 's|'t|'re|'ve|'m|'ll|'d
  size_t contraction(size_t i, size_t end, bool any_case) const {
    if (c[i] != '\'') return i;
    auto is = [&](size_t j, char letter) {
      if (j >= end) return false;
      if (c[j] == uint32_t(letter)) return true;
      // U+017F is a long s.
      return any_case && (c[j] == uint32_t(letter) - 32 || (letter == 's' && c[j] == 0x17f));
    };
    for (char one : {'s', 't', 'm', 'd'}) if (is(i + 1, one)) return i + 2;
    for (const char* two : {"re", "ve", "ll"}) if (is(i + 1, two[0]) && is(i + 2, two[1])) return i + 3;
    return i;
  }
  // \s+(?!\S)|\s+
  size_t blank(size_t i, size_t end) const {
    const size_t j = run(i, [&](size_t at) { return is(at, end, kSpace); });
    return j == end || j - i < 2 ? j : j - 1;
  }
  // \s*[\r\n]+
  size_t line_ends(size_t i, size_t end) const {
    size_t after = i;
    for (size_t j = i; is(j, end, kSpace); j++) if (newline(j, end)) after = j + 1;
    return after;
  }
  // \p{N}{1,most}
  size_t digits(size_t i, size_t end, size_t most) const {
    size_t j = i;
    while (j - i < most && is(j, end, kNumber)) j++;
    return j;
  }
  // [一-龥぀-ゟ゠-ヿ]+
  size_t cjk(size_t i, size_t end) const {
    return run(i, [&](size_t j) {
      return j < end && ((c[j] >= 0x4e00 && c[j] <= 0x9fa5) || (c[j] >= 0x3040 && c[j] <= 0x30ff));
    });
  }
  // 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
  size_t gpt2(size_t i, size_t end) const {
    if (size_t j = contraction(i, end, false); j > i) return j;
    const size_t from = c[i] == ' ' ? i + 1 : i;
    for (auto kind : {kLetter, kNumber}) {
      if (size_t j = run(from, [&](size_t at) { return is(at, end, kind); }); j > from) return j;
    }
    if (size_t j = run(from, [&](size_t at) { return sign(at, end); }); j > from) return j;
    return blank(i, end);
  }
  // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,most}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
  size_t llama3(size_t i, size_t end, size_t most) const {
    if (size_t j = contraction(i, end, true); j > i) return j;
    auto letters = [&](size_t from) { return run(from, [&](size_t at) { return letter(at, end); }); };
    if (k[i] == kLetter) return letters(i);
    if (k[i] == kNumber) return digits(i, end, most);
    if (!newline(i, end) && letter(i + 1, end)) return letters(i + 1);
    const size_t from = c[i] == ' ' ? i + 1 : i;
    if (size_t j = run(from, [&](size_t at) { return sign(at, end); }); j > from) return newlines(j, end);
    if (size_t j = line_ends(i, end); j > i) return j;
    return blank(i, end);
  }
  // [!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
  size_t deepseek3(size_t i, size_t end) const {
    auto latin = [&](size_t at) { return at < end && ((c[at] | 32) >= 'a' && (c[at] | 32) <= 'z'); };
    auto word = [&](size_t at) { return at < end && (k[at] == kLetter || k[at] == kMark); };
    auto mark = [&](size_t at) { return at < end && (k[at] == kPunctuation || k[at] == kSymbol); };
    if (mark(i) && c[i] < 128 && latin(i + 1)) return run(i + 1, latin);
    if (word(i)) return run(i, word);
    if (!mark(i) && !newline(i, end) && word(i + 1)) return run(i + 1, word);
    const size_t from = c[i] == ' ' ? i + 1 : i;
    if (size_t j = run(from, mark); j > from) return newlines(j, end);
    if (size_t j = line_ends(i, end); j > i) return j;
    return blank(i, end);
  }
  size_t match(Split split, size_t i, size_t end) const {
    switch (split) {
      case Split::digit: return digits(i, end, 1);
      case Split::digits3: return digits(i, end, 3);
      case Split::cjk: return cjk(i, end);
      case Split::gpt2: return gpt2(i, end);
      case Split::llama3: return llama3(i, end, 3);
      case Split::qwen2: return llama3(i, end, 1);
      case Split::deepseek3: return deepseek3(i, end);
    }
    return i;
  }
  // Matches, and what lies between them, from `from` to `end`.
  template <class Each>
  void cut(const std::vector<Split>& splits, size_t stage, size_t from, size_t end, const Each& each) const {
    if (stage == splits.size()) return each(from, end);
    size_t rest = from;
    for (size_t i = from; i < end;) {
      const size_t j = match(splits[stage], i, end);
      if (j == i) {
        i++;
        continue;
      }
      if (rest < i) cut(splits, stage + 1, rest, i, each);
      cut(splits, stage + 1, i, j, each);
      rest = i = j;
    }
    if (rest < end) cut(splits, stage + 1, rest, end, each);
  }
};

// Decodes one line; gives the byte of what is not UTF-8, or -1.
int64_t decode(const uint8_t* s, size_t bytes, const uint8_t* classes, Line* line) {
  line->c.clear(), line->k.clear(), line->at.clear();
  for (size_t i = 0; i < bytes;) {
    uint32_t c = s[i];
    size_t length = 1;
    if (c >= 0x80) {
      length = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
      if (c < 0xc2 || c > 0xf4 || i + length > bytes) return int64_t(i);
      c &= 0x7f >> length;
      for (size_t j = 1; j < length; j++) {
        if ((s[i + j] & 0xc0) != 0x80) return int64_t(i);
        c = c << 6 | (s[i + j] & 0x3f);
      }
      const uint32_t least = length == 4 ? 0x10000 : length == 3 ? 0x800 : 0x80;
      if (c < least || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return int64_t(i);
    }
    line->c.push_back(c), line->k.push_back(classes[c]), line->at.push_back(uint32_t(i));
    i += length;
  }
  line->at.push_back(uint32_t(bytes));
  return -1;
}

int64_t count_lines(const uint8_t* text, size_t bytes, const std::vector<Split>& splits, WordCounts* counts) {
  const uint8_t* classes = class_table().data();
  Line line;
  for (size_t from = 0; from < bytes;) {
    auto end = static_cast<const uint8_t*>(std::memchr(text + from, '\n', bytes - from));
    const size_t length = end ? size_t(end - text) + 1 - from : bytes - from;
    if (int64_t bad = decode(text + from, length, classes, &line); bad >= 0) return int64_t(from) + bad;
    line.cut(splits, 0, 0, line.c.size(), [&](size_t a, size_t b) {
      counts->add(text + from + line.at[a], line.at[b] - line.at[a], 1);
    });
    from += length;
  }
  return -1;
}

}  // namespace

bool split_by_name(const std::string& name, Split* out) {
  const std::array<const char*, 7> names{"digit", "digits3", "cjk", "gpt2", "llama3", "qwen2", "deepseek3"};
  const auto found = std::find(names.begin(), names.end(), name);
  *out = Split(found - names.begin());
  return found != names.end();
}

Trainer::Trainer(std::vector<Split> splits) : splits_(std::move(splits)) {}
Trainer::~Trainer() = default;

int64_t Trainer::count(const uint8_t* text, size_t bytes, int threads) {
  threads = std::max(1, std::min<int>(threads, int(bytes >> 16)));
  while (counts_.size() < size_t(threads)) counts_.push_back(std::make_unique<WordCounts>());
  std::vector<size_t> cuts{0};
  for (int t = 1; t < threads; t++) {
    const size_t near = std::max(cuts.back(), bytes / threads * t);
    auto end = static_cast<const uint8_t*>(std::memchr(text + near, '\n', bytes - near));
    cuts.push_back(end ? size_t(end - text) + 1 : bytes);
  }
  cuts.push_back(bytes);
  std::vector<int64_t> bad(threads);
  std::vector<std::thread> workers;
  auto work = [&](int t) { bad[t] = count_lines(text + cuts[t], cuts[t + 1] - cuts[t], splits_, counts_[t].get()); };
  for (int t = 1; t < threads; t++) workers.emplace_back(work, t);
  work(0);
  for (auto& worker : workers) worker.join();
  for (int t = 0; t < threads; t++) if (bad[t] >= 0) return int64_t(cuts[t]) + bad[t];
  return -1;
}

const WordCounts& Trainer::all_words() {
  if (counts_.empty()) counts_.push_back(std::make_unique<WordCounts>());
  for (; counts_.size() > 1; counts_.pop_back()) {
    counts_.back()->each([&](const uint8_t* word, size_t bytes, uint64_t count) { counts_[0]->add(word, bytes, count); });
  }
  return *counts_[0];
}

}  // namespace bpe
