// Words -> merges: a heap of pairs, each with the words in which it came up.
#include <algorithm>
#include <unordered_map>

#include "bpe.h"
#include "bpe_words.h"

namespace bpe {
namespace {

using Pair = uint64_t;  // ids of left << 32 | right: ordered as the two ids are
constexpr Pair pair_of(int32_t left, int32_t right) { return Pair(uint32_t(left)) << 32 | uint32_t(right); }

// How often each pair occurs, and the words in which it has come up since the last `drain`.
class Pairs {
 public:
  struct Seen {
    Pair pair;
    int64_t count;
    std::vector<uint32_t> words;
  };
  Pairs() : places_(1 << 16) {}
  uint32_t index(Pair pair) {
    if (2 * (seen_.size() + 1) > places_.size()) grow();
    for (size_t i = mixed(pair) & (places_.size() - 1);; i = (i + 1) & (places_.size() - 1)) {
      if (places_[i] == 0) {
        seen_.push_back({pair, 0, {}});
        return (places_[i] = uint32_t(seen_.size())) - 1;
      }
      if (seen_[places_[i] - 1].pair == pair) return places_[i] - 1;
    }
  }
  void less(Pair pair, int64_t count) { seen_[index(pair)].count -= count; }
  void more(Pair pair, int64_t count, uint32_t word) {
    const uint32_t i = index(pair);
    seen_[i].count += count;
    auto& words = seen_[i].words;
    if (words.empty()) fresh_.push_back(i);
    if (words.empty() || words.back() != word) words.push_back(word);
  }
  const Seen& operator[](uint32_t i) const { return seen_[i]; }
  template <class Each>
  void drain(const Each& call) {
    for (uint32_t i : fresh_) {
      call(i, std::move(seen_[i].words));
      seen_[i].words = {};
    }
    fresh_.clear();
  }

 private:
  std::vector<Seen> seen_;
  std::vector<uint32_t> places_, fresh_;
  void grow() {
    places_.assign(places_.size() * 2, 0);
    for (size_t s = 0; s < seen_.size(); s++) {
      size_t i = mixed(seen_[s].pair) & (places_.size() - 1);
      while (places_[i] != 0) i = (i + 1) & (places_.size() - 1);
      places_[i] = uint32_t(s + 1);
    }
  }
};

struct Candidate {
  int64_t count;
  Pair pair;
  uint32_t index;  // in Pairs
  std::vector<uint32_t> words;
  bool operator<(const Candidate& other) const {
    return count != other.count ? count < other.count : pair > other.pair;
  }
};

struct Words {
  std::vector<int32_t> ids;      // all words, one behind the other
  std::vector<size_t> from;      // where each begins
  std::vector<uint32_t> length;  // shrinks with each merge
  std::vector<int64_t> count;
};

// Puts `merged` for each left, right of word `w`.
void merge_word(Words& words, uint32_t w, const Merge& m, Pairs& pairs) {
  int32_t* id = &words.ids[words.from[w]];
  const uint32_t length = words.length[w];
  const int64_t count = words.count[w];
  uint32_t made = 0;
  for (uint32_t i = 0; i < length; i++) {
    if (id[i] != m.left || i + 1 >= length || id[i + 1] != m.right) {
      id[made++] = id[i];
      continue;
    }
    if (made > 0) {
      pairs.less(pair_of(id[made - 1], m.left), count);
      pairs.more(pair_of(id[made - 1], m.merged), count, w);
    }
    if (i + 2 < length) {
      pairs.less(pair_of(m.right, id[i + 2]), count);
      pairs.more(pair_of(m.merged, id[i + 2]), count, w);
    }
    id[made++] = m.merged;
    i++;
  }
  words.length[w] = made;
}

}  // namespace

std::vector<Merge> Trainer::merge(std::vector<std::string> tokens, const int32_t* byte_ids, size_t vocabulary,
                                  int64_t min_frequency) {
  Words words;
  all_words().each([&](const uint8_t* word, size_t bytes, uint64_t count) {
    if (bytes < 2) return;
    words.from.push_back(words.ids.size());
    words.length.push_back(uint32_t(bytes));
    words.count.push_back(int64_t(count));
    for (size_t i = 0; i < bytes; i++) words.ids.push_back(byte_ids[word[i]]);
  });
  std::unordered_map<std::string, int32_t> ids;
  for (const auto& token : tokens) ids.emplace(token, int32_t(ids.size()));

  Pairs pairs;
  for (uint32_t w = 0; w < words.from.size(); w++) {
    const int32_t* id = &words.ids[words.from[w]];
    for (uint32_t i = 0; i + 1 < words.length[w]; i++) pairs.more(pair_of(id[i], id[i + 1]), words.count[w], w);
  }
  std::vector<Candidate> heap;
  auto enqueue = [&](uint32_t index, std::vector<uint32_t> seen) {
    const auto& [pair, count, unused] = pairs[index];
    if (count <= 0) return;
    heap.push_back({count, pair, index, std::move(seen)});
    std::push_heap(heap.begin(), heap.end());
  };
  pairs.drain(enqueue);

  std::vector<Merge> merges;
  while (tokens.size() < vocabulary && !heap.empty() && !stop) {
    std::pop_heap(heap.begin(), heap.end());
    Candidate& top = heap.back();
    const int64_t count = pairs[top.index].count;
    if (top.count != count) {  // its neighbours were merged meanwhile
      top.count = count;
      std::push_heap(heap.begin(), heap.end());
      continue;
    }
    if (count < 1 || count < min_frequency) break;
    const int32_t left = int32_t(top.pair >> 32), right = int32_t(uint32_t(top.pair));
    std::string token = tokens[left] + tokens[right];
    const auto [known, is_new] = ids.emplace(token, int32_t(tokens.size()));
    if (is_new) tokens.push_back(std::move(token));
    merges.push_back({left, right, known->second});
    const std::vector<uint32_t> where = std::move(top.words);
    heap.pop_back();
    for (uint32_t w : where) merge_word(words, w, merges.back(), pairs);
    pairs.drain(enqueue);
    made = uint32_t(tokens.size());
  }
  if (stop) return {};
  // A pair comes up again where its token can be made in two ways; the library ranks it by the later time.
  std::unordered_map<Pair, size_t> last;
  for (size_t i = 0; i < merges.size(); i++) last[pair_of(merges[i].left, merges[i].right)] = i;
  size_t kept = 0;
  for (size_t i = 0; i < merges.size(); i++) {
    if (last[pair_of(merges[i].left, merges[i].right)] == i) merges[kept++] = merges[i];
  }
  merges.resize(kept);
  return merges;
}

}  // namespace bpe
