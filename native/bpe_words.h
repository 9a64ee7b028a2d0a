// Words and how often each occurs: a hash table whose words lie one behind the other.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace bpe {

inline uint64_t mixed(uint64_t x) {
  x *= 0x9e3779b97f4a7c15u;
  return x ^ x >> 32;
}

class WordCounts {
 public:
  void add(const uint8_t* word, size_t bytes, uint64_t count) {
    if (2 * (entries_.size() + 1) > places_.size()) grow();
    const uint64_t hash = hashed(word, bytes);
    for (size_t i = hash & (places_.size() - 1);; i = (i + 1) & (places_.size() - 1)) {
      if (places_[i] == 0) {
        entries_.push_back({hash, bytes_.size(), bytes, count});
        bytes_.insert(bytes_.end(), word, word + bytes);
        places_[i] = uint32_t(entries_.size());
        return;
      }
      Entry& entry = entries_[places_[i] - 1];
      if (entry.hash == hash && entry.bytes == bytes && !std::memcmp(&bytes_[entry.at], word, bytes)) {
        entry.count += count;
        return;
      }
    }
  }
  size_t size() const { return entries_.size(); }
  template <class Each>
  void each(const Each& call) const {
    for (const Entry& entry : entries_) call(&bytes_[entry.at], entry.bytes, entry.count);
  }

 private:
  struct Entry {
    uint64_t hash, at, bytes, count;
  };
  std::vector<Entry> entries_;
  std::vector<uint8_t> bytes_;
  std::vector<uint32_t> places_;  // number of the entry + 1; a power of two of them

  static uint64_t hashed(const uint8_t* word, size_t bytes) {
    uint64_t hash = bytes;
    for (; bytes >= 8; bytes -= 8, word += 8) {
      uint64_t x;
      std::memcpy(&x, word, 8);
      hash = mixed(hash ^ x);
    }
    uint64_t x = 0;
    std::memcpy(&x, word, bytes);
    return mixed(hash ^ x);
  }
  void grow() {
    places_.assign(places_.empty() ? 1 << 12 : places_.size() * 2, 0);
    for (size_t e = 0; e < entries_.size(); e++) {
      size_t i = entries_[e].hash & (places_.size() - 1);
      while (places_[i] != 0) i = (i + 1) & (places_.size() - 1);
      places_[i] = uint32_t(e + 1);
    }
  }
};

}  // namespace bpe
