// What the attention kernels share: which keys a query sees, tiles in shared memory, tensor-core products.
#pragma once
#include "mma.cuh"

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
