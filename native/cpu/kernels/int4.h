// Products with packed 4-bit weights, one table per instruction set (kernels/int4.cc).
#pragma once
#include <cstdint>

namespace dc {

struct Int4Kernels {
  // One row of W against m <= 4 rows of x (f32, row stride ldx, padded with zeros to whole words): for each group g of
  // `group_words` words, y_i += scale_g (sum u x_i - zero_g sums_i,g), sums_i,g = sum x_i over the group.
  void (*dot)(float* y, const float* x, int64_t ldx, const float* sums, int64_t lds, int m, const uint32_t* words,
              int64_t word_count, int64_t group_words, const float* scale, const float* zero);
  // One row of W: w = (u - zero) scale for k columns, any group.
  void (*expand)(float* w, const uint32_t* words, int64_t k, int64_t group, const float* scale, const float* zero);
};

const Int4Kernels& int4_kernels();

}  // namespace dc
