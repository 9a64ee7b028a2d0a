// Rows of strided tensors of any dtype, as fp32.
#pragma once
#include <vector>

#include "cpu.h"
#include "kernels/elementwise.h"

namespace dc {

// The same view with its dimensions at the right end: dim[3] is the last one, leading lengths are 1.
static inline dc_tensor aligned(const dc_tensor& t) {
  dc_tensor a = t;
  const int rank = t.rank < 0 ? 0 : t.rank;
  for (int d = 0; d < 4; d++) {
    const int from = d - (4 - rank);
    a.dim[d] = from < 0 ? 1 : t.dim[from];
    a.stride[d] = from < 0 ? 0 : t.stride[from];
  }
  a.rank = 4;
  return a;
}
// Of an aligned view: number of rows, and where row r begins (in elements).
static inline int64_t row_count(const dc_tensor& a) { return a.dim[0] * a.dim[1] * a.dim[2]; }
static inline int64_t row_at(const dc_tensor& a, int64_t r) {
  const int64_t i2 = r % a.dim[2], r1 = r / a.dim[2], i1 = r1 % a.dim[1], i0 = r1 / a.dim[1];
  return i0 * a.stride[0] + i1 * a.stride[1] + i2 * a.stride[2];
}
static inline char* element(const dc_tensor& t, int64_t offset) {
  return static_cast<char*>(t.data) + offset * int64_t(dtype_size(t.dtype));
}
static inline bool is_float(int dtype) { return dtype == DC_F32 || dtype == DC_BF16 || dtype == DC_F16; }

// One number of any dtype. Writing to a narrower one rounds to nearest even; integers saturate, NaN becomes 0 there.
double read_number(const void* p, int dtype);
void write_number(void* p, int dtype, double value);

// n elements from element `offset`, `stride` apart <-> fp32.
void load_strided(float* dst, const dc_tensor& t, int64_t offset, int64_t stride, int64_t n);
void store_strided(const dc_tensor& t, int64_t offset, int64_t stride, const float* src, int64_t n);

// A row as fp32 without a copy where it already is.
class RowReader {
 public:
  const float* row(const dc_tensor& t, int64_t offset, int64_t stride, int64_t n) {
    if (t.dtype == DC_F32 && (stride == 1 || n <= 1)) return data<float>(t) + offset;
    if (int64_t(buffer_.size()) < n) buffer_.resize(size_t(n));
    load_strided(buffer_.data(), t, offset, stride, n);
    return buffer_.data();
  }

 private:
  std::vector<float> buffer_;
};

// place i32 [T,k] of the expert ops: the row of y that holds choice j of token t.
struct Places {
  const dc_tensor& place;
  int32_t operator()(int64_t t, int64_t j) const { return data<int32_t>(place)[t * place.stride[0] + j * place.stride[1]]; }
  int check(dc_context* c, int64_t rows) const {
    for (int64_t t = 0; t < place.dim[0]; t++)
      for (int64_t j = 0; j < place.dim[1]; j++)
        if ((*this)(t, j) < 0 || (*this)(t, j) >= rows)
          return fail(c, "place[%ld, %ld] = %d of %ld rows", long(t), long(j), (*this)(t, j), long(rows));
    return 0;
  }
};

// Grain for parallel_for over rows of `width` elements: pieces of some 16k elements.
static inline int64_t row_grain(int64_t width) { return width >= 16384 ? 1 : 16384 / (width > 0 ? width : 1); }

}  // namespace dc
