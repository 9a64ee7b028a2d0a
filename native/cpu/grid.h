// Integer grids: which group a column belongs to, and how a value is rounded to a code.
#pragma once
#include "matrices.h"

namespace dc {

// The arguments of the ops that have "scale [zero] ... [column_group]" and "low high group".
struct Grid {
  Matrices<float> scale;
  const float* zero;
  int64_t zero_batch, zero_stride;
  const int32_t* column_group;
  int64_t column_group_batch;
  int64_t group;
  float low, high;

  Grid(const dc_tensor& scale_tensor, const dc_tensor& zero_tensor, const dc_tensor& column_group_tensor, int64_t low_,
       int64_t high_, int64_t group_)
      : scale(scale_tensor),
        zero(dc::data<float>(zero_tensor)),
        zero_batch(zero_tensor.rank == 3 ? zero_tensor.stride[0] : 0),
        zero_stride(zero_tensor.rank >= 2 ? zero_tensor.stride[zero_tensor.rank - 2] : 0),
        column_group(dc::data<int32_t>(column_group_tensor)),
        column_group_batch(column_group_tensor.rank == 2 ? column_group_tensor.stride[0] : 0),
        group(group_),
        low(float(low_)),
        high(float(high_)) {}
  int64_t group_of(int64_t e, int64_t column) const {
    return column_group ? column_group[e * column_group_batch + column] : column / group;
  }
  const float* scales(int64_t e, int64_t row) const { return scale.row(e, row); }
  const float* zeros(int64_t e, int64_t row) const { return zero ? zero + e * zero_batch + row * zero_stride : nullptr; }
  // 0, or failed with the reason: every column must have a group within the scales.
  int check(dc_context* c, int64_t batch, int64_t columns) const {
    if (!column_group && group <= 0) return fail(c, "group %lld", (long long)group);
    for (int64_t e = 0; e < (column_group_batch ? batch : 1); e++) {
      for (int64_t j = 0; j < columns; j++) {
        const int64_t g = group_of(e, j);
        if (g < 0 || g >= scale.columns)
          return fail(c, "column %lld has group %lld of %lld", (long long)j, (long long)g, (long long)scale.columns);
      }
    }
    return 0;
  }
};

// Round to nearest even on the grid; a value that is not a number becomes the lowest code.
static inline float code_of(float v, float scale, float zero, float low, float high) {
  const float q = v / scale + zero;
  return std::nearbyint(q > low ? (q < high ? q : high) : low) + 0.0f;  // -0 becomes 0
}

}  // namespace dc
