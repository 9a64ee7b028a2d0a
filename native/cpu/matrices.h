// Views of dc_tensors as (batches of) matrices with dense rows.
#pragma once
#include "cpu.h"

namespace dc {

template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, stride;  // stride: elements from row to row
  T* row(int64_t r) const { return data + r * stride; }
};

// A tensor of rank <= 2 is one matrix (rank 1: one row), of rank 3 a batch of them.
template <class T>
struct Matrices {
  T* data;
  int64_t batch, rows, columns, batch_stride, stride;
  explicit Matrices(const dc_tensor& t) {
    const int lead = t.rank >= 3 ? 1 : 0, r = t.rank >= 2 ? lead : -1;
    data = static_cast<T*>(t.data);
    batch = lead ? t.dim[0] : 1;
    batch_stride = lead ? t.stride[0] : 0;
    rows = r < 0 ? 1 : t.dim[r];
    stride = r < 0 ? 0 : t.stride[r];
    columns = t.dim[r + 1];
  }
  Matrix<T> operator[](int64_t e) const { return {data + e * batch_stride, rows, columns, stride}; }
  T* row(int64_t e, int64_t r) const { return data + e * batch_stride + r * stride; }
};

// True where the last dimension lies dense, as the ops over matrices need it. Absent tensors are.
static inline bool dense_rows(const dc_tensor& t) {
  if (!present(t) || t.rank == 0) return true;
  return t.dim[t.rank - 1] <= 1 || t.stride[t.rank - 1] == 1;
}

// The element of a per-row tensor, [N] or [E,N].
template <class T>
static inline T* per_row(const dc_tensor& t, int64_t e, int64_t r) {
  return static_cast<T*>(t.data) + (t.rank == 2 ? e * t.stride[0] + r * t.stride[1] : r * t.stride[0]);
}

// n elements of a float tensor's row <-> fp32.
static inline void load_row(float* out, const void* row, int dtype, int64_t n) {
  if (dtype == DC_F32) {
    std::memcpy(out, row, size_t(n) * 4);
  } else if (dtype == DC_BF16) {
    const auto* h = static_cast<const uint16_t*>(row);
    for (int64_t i = 0; i < n; i++) out[i] = bf16_to_float(h[i]);
  } else {
    const auto* h = static_cast<const uint16_t*>(row);
    for (int64_t i = 0; i < n; i++) out[i] = f16_to_float(h[i]);
  }
}
static inline void store_row(void* row, int dtype, const float* values, int64_t n) {
  if (dtype == DC_F32) {
    std::memcpy(row, values, size_t(n) * 4);
  } else if (dtype == DC_BF16) {
    auto* h = static_cast<uint16_t*>(row);
    for (int64_t i = 0; i < n; i++) h[i] = float_to_bf16(values[i]);
  } else {
    auto* h = static_cast<uint16_t*>(row);
    for (int64_t i = 0; i < n; i++) h[i] = float_to_f16(values[i]);
  }
}
static inline void* row_of(const dc_tensor& t, int64_t e, int64_t r) {  // of a rank 1, 2 or 3 tensor
  const int lead = t.rank >= 3 ? 1 : 0;
  const int64_t at = (lead ? e * t.stride[0] : 0) + (t.rank >= 2 ? r * t.stride[lead] : 0);
  return static_cast<char*>(t.data) + at * int64_t(dtype_size(t.dtype));
}

}  // namespace dc
