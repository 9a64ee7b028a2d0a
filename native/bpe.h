// Byte-level BPE training (Sennrich et al. 2016; on bytes: Radford et al. 2019), merge for merge what the Hugging Face
// tokenizers library's BpeTrainer makes of the same text.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace bpe {

// How text is cut into words; several one after another cut finer. src/tokenizer/splits.ts has the same as regular
// expressions.
enum class Split : uint8_t { digit, digits3, cjk, gpt2, llama3, qwen2, deepseek3 };
// The Split of that name; false: there is none.
bool split_by_name(const std::string& name, Split* out);

struct Merge {
  int32_t left, right, merged;
};

class WordCounts;

class Trainer {
 public:
  explicit Trainer(std::vector<Split> splits);
  ~Trainer();

  // Counts the words of UTF-8 text, of each line (with its end) by itself. Gives the first byte that is not UTF-8, or
  // -1.
  int64_t count(const uint8_t* text, size_t bytes, int threads);
  // `tokens` have the first ids, `byte_ids` those of the 256 bytes. The most frequent pair first, of equally frequent
  // ones the one with the smaller ids, until there are `vocabulary` tokens or every pair is rarer than `min_frequency`.
  // A pair that was merged twice stands at its later place. Empty after `stop`.
  std::vector<Merge> merge(std::vector<std::string> tokens, const int32_t* byte_ids, size_t vocabulary,
                           int64_t min_frequency);

  std::atomic<uint32_t> made{0};  // tokens so far, for progress
  std::atomic<bool> stop{false};

 private:
  std::vector<Split> splits_;
  std::vector<std::unique_ptr<WordCounts>> counts_;  // one a thread
  const WordCounts& all_words();
};

}  // namespace bpe
