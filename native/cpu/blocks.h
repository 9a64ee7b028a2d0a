// GGML's quantized blocks (ggml-common.h) as integer grids: where scales, minima and codes stand in a block's bytes.
#pragma once
#include "cpu.h"

namespace dc {

constexpr int kMostGroups = 16;

struct BlockFormat {
  int values, bytes;  // of one block
  int groups;         // of equal size, each with a grid of its own
  int low, high;      // codes
  bool minimum;       // value = scale code - minimum; else scale code
  int scale_low, scale_high;  // integers that a group's scale (and minimum) is stored as, times d (and dmin); both 0: the
                              // group's scale is d itself, its minimum -m
};
// NULL: not a block of integer grids.
const BlockFormat* block_format(int64_t encoding);

// What a block's head holds: the effective scale of group g is d * scale[g], its minimum dmin * minimum[g] (d and dmin
// alone where the format has no integers).
struct BlockHead {
  float d = 0, dmin = 0;  // numbers that f16 holds
  int scale[kMostGroups] = {}, minimum[kMostGroups] = {};
};
void write_head(int64_t encoding, uint8_t* block, const BlockHead& head);
BlockHead read_head(int64_t encoding, const uint8_t* block);
// codes [values], each in low..high.
void write_codes(int64_t encoding, uint8_t* block, const int8_t* codes);

}  // namespace dc
