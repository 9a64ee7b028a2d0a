// Products with packed 4-bit weights, one table per instruction set (kernels/int4.cc).
#pragma once
#include <cstdint>

namespace dc {

struct Int4Kernels {
  // Words of a block. x lies in blocks: their first columns, their second, ... their eighth; with zeros behind the end.
  int64_t block;
  // One row of W against m <= 8 rows of x (f32, row stride ldx): y_i = sum u x_i scale - sum offset_g sums_i,g. There is
  // a scale for each `group_words` words, which are whole blocks, or (group_words 0) one for each word; offset_g = zero_g
  // scale_g, sums_i,g = sum x_i over group g. These have zeros behind their end as well, up to a multiple of `block`.
  void (*dot)(float* y, const float* x, int64_t ldx, const float* sums, int64_t lds, int m, const uint32_t* words,
              int64_t word_count, int64_t group_words, const float* scale, int64_t groups, const float* offset);
  // One row of W: w = (u - zero) scale for k columns, any group.
  void (*expand)(float* w, const uint32_t* words, int64_t k, int64_t group, const float* scale, const float* zero);
};

const Int4Kernels& int4_kernels();

}  // namespace dc
