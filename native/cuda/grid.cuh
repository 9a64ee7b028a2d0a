// What the ops on integer grids share: rows of matrices and of batches, grids, rounding; the sweep.
#pragma once
#include "cuda.cuh"

namespace dc {

__device__ __forceinline__ float code_of(float v, float scale, float zero, float low, float high) {
  const float q = rintf(__fadd_rn(__fdiv_rn(v, scale), zero));  // no fused multiply: the CPU rounds twice too
  return (q >= low ? (q <= high ? q : high) : low) + 0.f;       // a code has no -0
}
static __device__ __noinline__ float code_slowly(float v, float scale, float zero, float low, float high) { return code_of(v, scale, zero, low, high); }
// The same without the division, except next to a tie, where the last bit decides.
__device__ __forceinline__ float code_near(float v, float scale, float inverse, float zero, float low, float high) {
  const float u = fmaf(v, inverse, zero), q = rintf(u);
  if (fabsf(fabsf(u - q) - 0.5f) < 2e-4f) return code_slowly(v, scale, zero, low, high);
  return fminf(fmaxf(q, low), high) + 0.f;
}

// A matrix, or one of a batch: element (e, n, j) of a tensor of rank 2 or 3 with rows of stride 1.
struct Rows {
  void* data;
  int dtype;
  int64_t batch, row;
  explicit Rows(const dc_tensor& t)
      : data(t.data), dtype(t.dtype), batch(t.rank == 3 ? t.stride[0] : 0), row(t.rank == 3 ? t.stride[1] : t.stride[0]) {}
  __device__ int64_t at(int64_t e, int64_t n) const { return e * batch + n * row; }
};
struct Grid {
  Rows scale, zero;
  const int32_t* column_group;
  int64_t column_batch, group;
  float low, high;
  __device__ int64_t group_of(int64_t e, int64_t j) const { return column_group ? column_group[e * column_batch + j] : j / group; }
  __device__ float scale_at(int64_t e, int64_t n, int64_t g) const { return static_cast<const float*>(scale.data)[scale.at(e, n) + g]; }
  __device__ float zero_at(int64_t e, int64_t n, int64_t g) const { return zero.data ? static_cast<const float*>(zero.data)[zero.at(e, n) + g] : 0.f; }
};
struct Shape {
  int64_t batch, rows, columns;
  explicit Shape(const dc_tensor& t)
      : batch(t.rank == 3 ? t.dim[0] : 1), rows(t.rank == 3 ? t.dim[1] : t.dim[0]), columns(t.rank == 3 ? t.dim[2] : t.dim[1]) {}
};

inline Grid grid_of(const dc_call* call, int scale, int zero, int column_group, int64_t low, int64_t high, int64_t group) {
  return {Rows(call->t[scale]), Rows(call->t[zero]), data<int32_t>(call->t[column_group]), call->t[column_group].rank == 2 ? call->t[column_group].stride[0] : 0, group, float(low), float(high)};
}

inline Rows from_row(Rows r, int64_t e, int64_t first, int64_t size) {
  r.data = static_cast<char*>(r.data) + (e * r.batch + first * r.row) * size;
  return r;
}
// Rows at a time: as many as take some hundred MB of work memory, all parts alike.
inline int64_t chunk_rows(int64_t per_row, int64_t rows) {
  int64_t most = (int64_t(512) << 20) / (per_row < 1 ? 1 : per_row);
  most = most < 64 ? 64 : most;
  const int64_t chunk = ceil_div(ceil_div(rows, ceil_div(rows, most)), 64) * 64;
  return chunk < rows ? chunk : rows;
}

// v_j = W_j + (pending_j + sum_{i<j} (W_i - Q_i) R_ij) / R_jj, codes_j and Q_j what v_j rounds to; columns with R_jj <= 0
// keep W's. `given`: pending is there (and a v that is no number keeps W's), `error` grows by sum_j R_jj ((v_j - W_j)^2 -
// (v_j - Q_j)^2); else pending counts as zero, and error is as in ldlq. `complete`: afterwards pending has grown by
// (W - Q) R, all of R. Q may lie where W or, unless `complete`, where pending lies. Scratch slots 0 and 1.
int sweep(dc_context* c, Rows codes, Rows Q, Rows pending, Rows W, Rows R, const Grid& grid, const dc_tensor* error, const Shape& shape, bool given, bool complete);
// G [:, 0..K] += (W - Q) H for symmetric H, bf16x3. Scratch slots 0 and 1.
int add_gradient(dc_context* c, Rows G, Rows W, Rows Q, Rows H, const Shape& shape);

}  // namespace dc
