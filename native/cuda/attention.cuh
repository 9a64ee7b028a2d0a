// What the attention kernels share: which keys a query sees, tiles in shared memory, tensor-core products.
#pragma once
#include <cuda_pipeline.h>

#include "cuda.cuh"

namespace dc {

struct View4 {  // [B, S, H, D], last stride 1
  void* data;
  int64_t b, s, h;
  explicit View4(const dc_tensor& t) : data(t.data), b(t.stride[0]), s(t.stride[1]), h(t.stride[2]) {}
};

struct Problem {
  int B, S, T, H, G, D, DV;  // G = query heads per key head
  int causal, window, offset;
  float scale, cap;
  const int32_t* lengths;
  const float* sinks;
  float* lse;
  // Keys that query s may see: [first, last)
  __device__ int last(int b, int s) const {
    int end = lengths ? min(T, lengths[b]) : T;
    return causal ? min(end, s + offset + 1) : end;
  }
  __device__ int first(int s) const { return window > 0 ? max(0, s + offset - window + 1) : 0; }
  __device__ float score(float dot) const {
    const float x = dot * scale;
    return cap > 0 ? cap * tanhf(x / cap) : x;
  }
};

inline Problem problem_of(const dc_call* call, const dc_tensor& q, const dc_tensor& k, int DV, const dc_tensor& lengths) {
  Problem p = {};
  p.B = int(q.dim[0]), p.S = int(q.dim[1]), p.T = int(k.dim[1]), p.H = int(q.dim[2]), p.G = int(q.dim[2] / k.dim[2]), p.D = int(q.dim[3]), p.DV = DV;
  p.causal = int(call->i[0]), p.window = int(call->i[1]), p.offset = int(call->i[2]);
  p.scale = float(call->f[0]);
  p.lengths = data<int32_t>(lengths);
  return p;
}

inline bool sixteen(const dc_tensor& t) {  // rows that start on 16 bytes
  const int64_t size = dtype_size(t.dtype);
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride[0] * size % 16 == 0 && t.stride[1] * size % 16 == 0 && t.stride[2] * size % 16 == 0;
}

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* p) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(p));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* p) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(p));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
template <class T>
__device__ __forceinline__ uint32_t pack2(float a, float b) {
  T pair[2] = {from_float<T>(a), from_float<T>(b)};
  return *reinterpret_cast<uint32_t*>(pair);
}

// A tile of `rows` x D values into shared memory, 16 bytes at a time; rows at and beyond `limit` become zeros.
template <class T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(T (*tile)[D + 8], const T* base, int64_t stride, int first, int limit, int columns) {
  constexpr int PIECES = D / 8;
  for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
    const int r = i / PIECES, c = i % PIECES * 8;
    T* to = &tile[r][c];
    if (first + r < limit && c < columns) __pipeline_memcpy_async(to, base + (first + r) * stride + c, 16);
    else *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace dc
