// What the CUDA ops share: the context with its stream and libraries, errors, views, number formats.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <mutex>
#include <string>

#include "backend.h"
#include "libraries.h"

struct dc_context {
  int device = 0;
  int multiprocessors = 0;
  size_t shared_limit = 0;  // bytes of shared memory one block may have
  int capability = 0;       // 90 for sm_90
  cudaStream_t stream = nullptr;
  dc::Libraries* libraries = nullptr;  // cuBLAS
  void* blas = nullptr;                // cublasHandle_t
  void* scratch[4] = {};               // grow-only work memory, see scratch()
  size_t scratch_bytes[4] = {};
  std::string error;
};

// collective.cu
extern "C" {
dc_group* dc_cuda_join(dc_context* const* ranks, int n, char* error, size_t error_bytes);
void dc_cuda_part(dc_group*);
int dc_cuda_collective(dc_group*, int kind, const dc_tensor* const* x, int tensors, char* error, size_t error_bytes);
}

namespace dc {

int fail(dc_context* c, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Work memory that lives until the next call with the same slot; NULL with the error set.
void* scratch(dc_context* c, int slot, size_t bytes);
// Held while a collective is launched on all its GPUs, and around what may wait for a GPU within the driver.
std::mutex& launches();
// 0 when the last launch was accepted.
int launched(dc_context* c, const char* what);

#define DC_CUDA(call)                                                                          \
  do {                                                                                         \
    cudaError_t code_ = (call);                                                                \
    if (code_ != cudaSuccess) return dc::fail(c, "%s: %s", #call, cudaGetErrorString(code_));  \
  } while (0)

inline bool present(const dc_tensor& t) { return t.data != nullptr; }
__host__ __device__ inline int64_t count(const dc_tensor& t) { return t.dim[0] * t.dim[1] * t.dim[2] * t.dim[3]; }
template <class T>
inline T* data(const dc_tensor& t) {
  return static_cast<T*>(t.data);
}
inline size_t dtype_size(int dtype) {
  static const uint8_t size[] = {4, 2, 2, 8, 1, 1, 2, 2, 4, 4, 8, 8, 1, 1, 1};
  return size[dtype];
}
inline bool contiguous(const dc_tensor& t) {
  int64_t step = 1;
  for (int d = 3; d >= 0; d--) {
    if (t.dim[d] != 1 && t.stride[d] != step) return false;
    step *= t.dim[d];
  }
  return true;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline unsigned grid_for(dc_context* c, int64_t n, int per_block) {
  const int64_t blocks = ceil_div(n, per_block), most = int64_t(c->multiprocessors) * 32;
  return unsigned(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// A float element whose type is known at run time only.
__device__ __forceinline__ float load(const void* p, int dtype, int64_t i) {
  return dtype == DC_F32 ? static_cast<const float*>(p)[i]
                         : dtype == DC_BF16 ? to_float(static_cast<const bf16*>(p)[i]) : to_float(static_cast<const f16*>(p)[i]);
}
__device__ __forceinline__ void store(void* p, int dtype, int64_t i, float x) {
  if (dtype == DC_F32) static_cast<float*>(p)[i] = x;
  else if (dtype == DC_BF16) static_cast<bf16*>(p)[i] = from_float<bf16>(x);
  else static_cast<f16*>(p)[i] = from_float<f16>(x);
}

// Offset of element `i` (row-major count over dim) of a strided tensor.
__device__ __forceinline__ int64_t offset_of(const dc_tensor& t, int64_t i) {
  int64_t at = 0;
#pragma unroll
  for (int d = 3; d >= 0; d--) {
    if (t.dim[d] == 1) continue;
    at += (i % t.dim[d]) * t.stride[d];
    i /= t.dim[d];
  }
  return at;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}
// Over the whole block (at most 1024 threads), same value in every thread. `shared` has 33 floats.
__device__ __forceinline__ float block_sum(float x, float* shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = warp_sum(lane < warps ? shared[lane] : 0.f);
    if (lane == 0) shared[32] = x;
  }
  __syncthreads();
  return shared[32];
}
__device__ __forceinline__ float block_max(float x, float* shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  x = warp_max(x);
  __syncthreads();
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = warp_max(lane < warps ? shared[lane] : -INFINITY);
    if (lane == 0) shared[32] = x;
  }
  __syncthreads();
  return shared[32];
}

// Calls f with a value of the float type that `dtype` names.
#define DC_FLOAT(dtype, T, ...)                                         \
  switch (dtype) {                                                      \
    case DC_F32: { using T = float; __VA_ARGS__; break; }               \
    case DC_BF16: { using T = dc::bf16; __VA_ARGS__; break; }           \
    case DC_F16: { using T = dc::f16; __VA_ARGS__; break; }             \
    default: return dc::fail(c, "dtype %d is not a float type", dtype); \
  }

// Shared by the ops: C = alpha A B + beta C on row-major or transposed views (gemm.cu).
int gemm(dc_context* c, const dc_tensor& C, const dc_tensor& A, const dc_tensor& B, double alpha, double beta, int precision);
int copy(dc_context* c, const dc_tensor& dst, const dc_tensor& src);
int zero(dc_context* c, const dc_tensor& dst);

inline dc_tensor matrix(void* data, int dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride = 1) {
  return {data, dtype, 2, {rows, columns, 1, 1}, {row_stride, column_stride, 0, 0}};
}

}  // namespace dc
