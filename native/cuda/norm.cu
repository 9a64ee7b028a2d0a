// Element-wise ops, reductions, norms, softmax, rope, losses; with their backward rules.
#include "numbers.cuh"

namespace dc {
namespace {

#define GRID_STRIDE(i, n) \
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < (n); i += int64_t(gridDim.x) * blockDim.x)

__device__ float unary_value(int kind, float x, float a, float b) {
  switch (kind) {
    case DC_NEG: return -x;
    case DC_ABS: return fabsf(x);
    case DC_SQUARE: return x * x;
    case DC_SQRT: return sqrtf(x);
    case DC_RSQRT: return 1.f / sqrtf(x);
    case DC_EXP: return expf(x);
    case DC_LOG: return logf(x);
    case DC_SIGMOID: return 1.f / (1.f + expf(-x));
    case DC_SILU: return x / (1.f + expf(-x));
    case DC_GELU: return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
    case DC_GELU_TANH: return 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case DC_RELU: return x < 0 ? 0.f : x;
    case DC_TANH: return tanhf(x);
    case DC_SOFTPLUS: return x > 20.f ? x : log1pf(expf(x));
    case DC_SOFTCAP: return a * tanhf(x / a);
    case DC_AFFINE: return a * x + b;
    case DC_RECIPROCAL: return 1.f / x;
    case DC_RELU2: return x < 0 ? 0.f : x * x;
    case DC_CLAMP: return x < a ? a : x > b ? b : x;
    case DC_IS_NONFINITE: return isfinite(x) ? 0.f : 1.f;
  }
  return x;
}
// d unary / dx, where there is one.
__host__ __device__ constexpr bool has_slope(int kind) {
  return kind == DC_NEG || kind == DC_ABS || kind == DC_SQUARE || kind == DC_EXP || kind == DC_SIGMOID || kind == DC_SILU || kind == DC_GELU || kind == DC_GELU_TANH ||
         kind == DC_RELU || kind == DC_RELU2 || kind == DC_TANH || kind == DC_SOFTPLUS;
}
__device__ float unary_slope(int kind, float x) {
  const float s = 1.f / (1.f + expf(-x));
  switch (kind) {
    case DC_NEG: return x == x ? -1.f : x;
    case DC_ABS: return x > 0 ? 1.f : x < 0 ? -1.f : x;
    case DC_SQUARE: return x + x;
    case DC_EXP: return expf(x);
    case DC_SIGMOID: return s * (1.f - s);
    case DC_SILU: return s * (1.f + x * (1.f - s));
    case DC_SOFTPLUS: return s;
    case DC_GELU: return 0.5f * (1.f + erff(x * 0.70710678118654752f)) + x * 0.3989422804014327f * expf(-0.5f * x * x);
    case DC_GELU_TANH: {
      const float t = tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x));
      return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * 0.79788456080286536f * (1.f + 3 * 0.044715f * x * x);
    }
    case DC_RELU: return x > 0 ? 1.f : x == x ? 0.f : x;
    case DC_RELU2: return x < 0 ? 0.f : x + x;
    default: {
      const float t = tanhf(x);
      return 1.f - t * t;
    }
  }
}

__global__ void unary_any(dc_tensor y, dc_tensor x, int kind, float a, float b, int64_t n, bool dense, bool floats) {
  GRID_STRIDE(i, n) {
    const int64_t to = dense ? i : offset_of(y, i), from = dense ? i : offset_of(x, i);
    if (floats) store(y.data, y.dtype, to, unary_value(kind, load(x.data, x.dtype, from), a, b));
    else write_number(y.data, y.dtype, to, unary_value(kind, float(read_number(x.data, x.dtype, from)), a, b));
  }
}

// Four neighbours, from element `at`: what memory gives at once. See fours().
__device__ __forceinline__ float4 load4(const void* p, int dtype, int64_t at) {
  if (dtype == DC_F32) return *reinterpret_cast<const float4*>(static_cast<const float*>(p) + at);
  const uint2 u = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p) + at);
  if (dtype == DC_BF16) return {__uint_as_float(u.x << 16), __uint_as_float(u.x & 0xFFFF0000u), __uint_as_float(u.y << 16), __uint_as_float(u.y & 0xFFFF0000u)};
  const float2 a = __half22float2(reinterpret_cast<const __half2&>(u.x)), b = __half22float2(reinterpret_cast<const __half2&>(u.y));
  return {a.x, a.y, b.x, b.y};
}
template <class T>
__device__ __forceinline__ void store4_as(void* p, int64_t at, float4 x) {
  struct alignas(4 * sizeof(T)) Four {
    T x, y, z, w;
  };
  *reinterpret_cast<Four*>(static_cast<T*>(p) + at) = {from_float<T>(x.x), from_float<T>(x.y), from_float<T>(x.z), from_float<T>(x.w)};
}
__device__ __forceinline__ void store4(void* p, int dtype, int64_t at, float4 x) {
  if (dtype == DC_F32) store4_as<float>(p, at, x);
  else if (dtype == DC_BF16) store4_as<bf16>(p, at, x);
  else store4_as<f16>(p, at, x);
}

template <class T>
__device__ T binary_value(int kind, T p, T q) {
  switch (kind) {
    case DC_ADD: return p + q;
    case DC_SUB: return p - q;
    case DC_MUL: return p * q;
    case DC_DIV: return p / q;
    case DC_MAX: return p != p ? p : p > q ? p : q;
    case DC_MIN: return p != p ? p : p < q ? p : q;
    default: return p == q ? T(1) : T(0);
  }
}
__global__ void binary_any(dc_tensor y, dc_tensor a, dc_tensor b, int kind, double alpha, int64_t n, bool dense, bool floats) {
  GRID_STRIDE(i, n) {
    const int64_t ai = dense ? i : offset_of(a, i), bi = dense ? i : offset_of(b, i), yi = dense ? i : offset_of(y, i);
    if (floats) store(y.data, y.dtype, yi, binary_value(kind, load(a.data, a.dtype, ai), __fmul_rn(float(alpha), load(b.data, b.dtype, bi))));
    else write_number(y.data, y.dtype, yi, binary_value(kind, read_number(a.data, a.dtype, ai), __dmul_rn(alpha, read_number(b.data, b.dtype, bi))));
  }
}

__global__ void binary_fours(dc_tensor y, dc_tensor a, dc_tensor b, int kind, float alpha, int64_t n, bool dense) {
  GRID_STRIDE(i, n / 4) {
    const int64_t ai = dense ? 4 * i : offset_of(a, 4 * i), bi = dense ? 4 * i : offset_of(b, 4 * i), yi = dense ? 4 * i : offset_of(y, 4 * i);
    const float4 p = load4(a.data, a.dtype, ai), q = load4(b.data, b.dtype, bi);
    const auto f = [&](float u, float v) { return binary_value(kind, u, __fmul_rn(alpha, v)); };
    store4(y.data, y.dtype, yi, {f(p.x, q.x), f(p.y, q.y), f(p.z, q.z), f(p.w, q.w)});
  }
}

struct Best {
  float value;
  int index;
};
// A NaN wins over numbers; the first of equals.
__device__ Best better(Best a, Best b, bool most) {
  if (b.index < 0) return a;
  if (a.index < 0) return b;
  const bool na = a.value != a.value, nb = b.value != b.value;
  if (na || nb) return na && nb ? (a.index < b.index ? a : b) : na ? a : b;
  return (most ? b.value > a.value : b.value < a.value) || (b.value == a.value && b.index < a.index) ? b : a;
}

// src [outer, n, inner] contiguous; a warp per output when inner is 1, else a thread per output (coalesced).
__device__ float reduce_start(int kind) { return kind == DC_RMAX ? -INFINITY : kind == DC_RMIN ? INFINITY : 0.f; }
__device__ float reduce_step(int kind, float sum, float x) {
  switch (kind) {
    case DC_RMAX: return x > sum || x != x ? x : sum;
    case DC_RMIN: return x < sum || x != x ? x : sum;
    case DC_ABSMAX: return fabsf(x) > sum || x != x ? fabsf(x) : sum;
    case DC_SUMSQ: return sum + x * x;
    default: return sum + x;
  }
}
__global__ void reduce_columns(dc_tensor dst, dc_tensor src, int kind, int64_t n, int64_t inner, int64_t outputs) {
  GRID_STRIDE(o, outputs) {
    const int64_t base = o / inner * n * inner + o % inner;
    if (kind == DC_ARGMAX || kind == DC_ARGMIN) {
      Best best{0, -1};
      for (int64_t j = 0; j < n; j++) best = better(best, {load(src.data, src.dtype, base + j * inner), int(j)}, kind == DC_ARGMAX);
      static_cast<int32_t*>(dst.data)[o] = best.index;
      continue;
    }
    float sum = reduce_start(kind), low = 0;  // compensated sums: columns may be long
    for (int64_t j = 0; j < n; j++) {
      const float x = load(src.data, src.dtype, base + j * inner);
      if (kind == DC_SUM || kind == DC_MEAN || kind == DC_SUMSQ) {
        const float v = (kind == DC_SUMSQ ? x * x : x) - low, t = sum + v;
        low = (t - sum) - v;
        sum = t;
      } else {
        sum = reduce_step(kind, sum, x);
      }
    }
    store(dst.data, dst.dtype, o, kind == DC_MEAN ? sum / float(n) : sum);
  }
}
// Columns that are long: 16 threads each, for 32 of them beside each other.
__global__ void __launch_bounds__(512) reduce_tall(dc_tensor dst, dc_tensor src, int kind, int64_t n, int64_t inner, int64_t outputs) {
  __shared__ float part[16][32];
  const int64_t o = blockIdx.x * 32ll + threadIdx.x;
  const bool sums = kind == DC_SUM || kind == DC_MEAN || kind == DC_SUMSQ;
  float sum = reduce_start(kind), low = 0;
  if (o < outputs) {
    const int64_t base = o / inner * n * inner + o % inner;
#pragma unroll 4
    for (int64_t j = threadIdx.y; j < n; j += 16) {
      const float x = load(src.data, src.dtype, base + j * inner);
      if (sums) {
        const float v = (kind == DC_SUMSQ ? x * x : x) - low, t = sum + v;
        low = (t - sum) - v;
        sum = t;
      } else {
        sum = reduce_step(kind, sum, x);
      }
    }
  }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || o >= outputs) return;
  for (int k = 1; k < 16; k++) sum = sums ? sum + part[k][threadIdx.x] : reduce_step(kind, sum, part[k][threadIdx.x]);
  store(dst.data, dst.dtype, o, kind == DC_MEAN ? sum / float(n) : sum);
}
__global__ void reduce_rows(dc_tensor dst, dc_tensor src, int kind, int64_t n) {
  __shared__ float shared[33];
  __shared__ Best bests[32];
  const int64_t base = blockIdx.x * n;
  if (kind == DC_ARGMAX || kind == DC_ARGMIN) {
    Best best{0, -1};
    for (int64_t j = threadIdx.x; j < n; j += blockDim.x) best = better(best, {load(src.data, src.dtype, base + j), int(j)}, kind == DC_ARGMAX);
    for (int d = 16; d; d >>= 1) best = better(best, {__shfl_xor_sync(~0u, best.value, d), __shfl_xor_sync(~0u, best.index, d)}, kind == DC_ARGMAX);
    if ((threadIdx.x & 31) == 0) bests[threadIdx.x >> 5] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (unsigned w = 1; w < blockDim.x / 32; w++) best = better(best, bests[w], kind == DC_ARGMAX);
      static_cast<int32_t*>(dst.data)[blockIdx.x] = best.index;
    }
    return;
  }
  float sum = reduce_start(kind);
  if (kind == DC_SUM || kind == DC_MEAN || kind == DC_SUMSQ) {
    float low = 0;  // compensated: rows may be long
    for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
      const float x = load(src.data, src.dtype, base + j), v = (kind == DC_SUMSQ ? x * x : x) - low, t = sum + v;
      low = (t - sum) - v;
      sum = t;
    }
    sum = block_sum(sum, shared);
  } else {
    for (int64_t j = threadIdx.x; j < n; j += blockDim.x) sum = reduce_step(kind, sum, load(src.data, src.dtype, base + j));
    const bool missing = __syncthreads_or(sum != sum);  // fmaxf would lose it
    sum = kind == DC_RMIN ? -block_max(-sum, shared) : block_max(sum, shared);
    if (missing) sum = NAN;
  }
  if (threadIdx.x == 0) store(dst.data, dst.dtype, blockIdx.x, kind == DC_MEAN ? sum / float(n) : sum);
}

// --- norms: one block a row -----------------------------------------------------------------------------------------

__global__ void rmsnorm_rows(dc_tensor y, dc_tensor x, dc_tensor w, float* rstd, float eps, float offset) {
  __shared__ float shared[33];
  const int64_t r = blockIdx.x, C = x.dim[1];
  float sum = 0;
  for (int64_t j = threadIdx.x; j < C; j += blockDim.x) {
    const float v = load(x.data, x.dtype, r * x.stride[0] + j);
    sum += v * v;
  }
  sum = block_sum(sum, shared);
  const float scale = 1.f / sqrtf(sum / float(C) + eps);
  if (rstd && threadIdx.x == 0) rstd[r] = scale;
  for (int64_t j = threadIdx.x; j < C; j += blockDim.x) {
    const float g = w.data ? load(w.data, w.dtype, j * w.stride[0]) + offset : 1.f;
    store(y.data, y.dtype, r * y.stride[0] + j, load(x.data, x.dtype, r * x.stride[0] + j) * scale * g);
  }
}
// dx = rstd (g - xhat mean(g xhat)), g = dy (w + offset), xhat = x rstd.
__global__ void rmsnorm_dx(dc_tensor dx, dc_tensor dy, dc_tensor x, dc_tensor w, const float* rstd, float offset) {
  __shared__ float shared[33];
  const int64_t r = blockIdx.x, C = x.dim[1];
  const float scale = rstd[r];
  float dot = 0;
  for (int64_t j = threadIdx.x; j < C; j += blockDim.x) {
    const float g = load(dy.data, dy.dtype, r * dy.stride[0] + j) * (w.data ? load(w.data, w.dtype, j * w.stride[0]) + offset : 1.f);
    dot += g * load(x.data, x.dtype, r * x.stride[0] + j) * scale;
  }
  dot = block_sum(dot, shared) / float(C);
  for (int64_t j = threadIdx.x; j < C; j += blockDim.x) {
    const float g = load(dy.data, dy.dtype, r * dy.stride[0] + j) * (w.data ? load(w.data, w.dtype, j * w.stride[0]) + offset : 1.f);
    store(dx.data, dx.dtype, r * dx.stride[0] + j, scale * (g - load(x.data, x.dtype, r * x.stride[0] + j) * scale * dot));
  }
}
// A block per 32 columns walks all rows in a fixed order: deterministic.
__global__ void rmsnorm_dw(dc_tensor dw, dc_tensor dy, dc_tensor x, const float* rstd) {
  __shared__ float part[8][33];
  const int64_t j = blockIdx.x * 32ll + threadIdx.x;
  float sum = 0;
  if (j < x.dim[1])
    for (int64_t r = threadIdx.y; r < x.dim[0]; r += 8)
      sum += load(dy.data, dy.dtype, r * dy.stride[0] + j) * load(x.data, x.dtype, r * x.stride[0] + j) * rstd[r];
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && j < x.dim[1]) {
    for (int k = 1; k < 8; k++) sum += part[k][threadIdx.x];
    store(dw.data, dw.dtype, j * dw.stride[0], load(dw.data, dw.dtype, j * dw.stride[0]) + sum);
  }
}
__global__ void layernorm_rows(dc_tensor y, dc_tensor x, dc_tensor w, dc_tensor b, float eps) {
  __shared__ float shared[33];
  const int64_t r = blockIdx.x, C = x.dim[1];
  float sum = 0;
  for (int64_t j = threadIdx.x; j < C; j += blockDim.x) sum += load(x.data, x.dtype, r * x.stride[0] + j);
  const float mean = block_sum(sum, shared) / float(C);
  float square = 0;
  for (int64_t j = threadIdx.x; j < C; j += blockDim.x) {
    const float v = load(x.data, x.dtype, r * x.stride[0] + j) - mean;
    square += v * v;
  }
  const float scale = 1.f / sqrtf(block_sum(square, shared) / float(C) + eps);
  for (int64_t j = threadIdx.x; j < C; j += blockDim.x) {
    const float v = (load(x.data, x.dtype, r * x.stride[0] + j) - mean) * scale;
    store(y.data, y.dtype, r * y.stride[0] + j, v * (w.data ? load(w.data, w.dtype, j * w.stride[0]) : 1.f) + (b.data ? load(b.data, b.dtype, j * b.stride[0]) : 0.f));
  }
}

// --- gated activations ------------------------------------------------------------------------------------------------

__device__ __forceinline__ float swiglu_value(int kind, float limit, float g, float u) {
  if (limit > 0) g = fminf(g, limit), u = fminf(fmaxf(u, -limit), limit);
  return unary_value(kind, g, 0, 0) * u;
}
__global__ void swiglu_any(dc_tensor y, dc_tensor gate, dc_tensor up, int kind, float limit, int64_t n, bool dense) {
  GRID_STRIDE(i, n) {
    const float g = load(gate.data, gate.dtype, dense ? i : offset_of(gate, i)), u = load(up.data, up.dtype, dense ? i : offset_of(up, i));
    store(y.data, y.dtype, dense ? i : offset_of(y, i), swiglu_value(kind, limit, g, u));
  }
}
__global__ void swiglu_fours(dc_tensor y, dc_tensor gate, dc_tensor up, int kind, float limit, int64_t n, bool dense) {
  GRID_STRIDE(i, n / 4) {
    const float4 g = load4(gate.data, gate.dtype, dense ? 4 * i : offset_of(gate, 4 * i)), u = load4(up.data, up.dtype, dense ? 4 * i : offset_of(up, 4 * i));
    const auto f = [&](float a, float b) { return swiglu_value(kind, limit, a, b); };
    store4(y.data, y.dtype, dense ? 4 * i : offset_of(y, 4 * i), {f(g.x, u.x), f(g.y, u.y), f(g.z, u.z), f(g.w, u.w)});
  }
}
__global__ void swiglu_grad(dc_tensor dgate, dc_tensor dup, dc_tensor dy, dc_tensor gate, dc_tensor up, int kind, float limit, int64_t n) {
  GRID_STRIDE(i, n) {
    const float g0 = load(gate.data, gate.dtype, offset_of(gate, i)), u0 = load(up.data, up.dtype, offset_of(up, i));
    float g = g0, u = u0, gm = 1, um = 1;
    if (limit > 0) {
      if (g0 > limit) g = limit, gm = 0;
      if (u0 > limit) u = limit, um = 0;
      if (u0 < -limit) u = -limit, um = 0;
    }
    const float d = load(dy.data, dy.dtype, offset_of(dy, i));
    store(dgate.data, dgate.dtype, offset_of(dgate, i), gm * d * u * unary_slope(kind, g));
    store(dup.data, dup.dtype, offset_of(dup, i), um * d * unary_value(kind, g, 0, 0));
  }
}

// --- softmax and losses: one block a row ------------------------------------------------------------------------------

struct Online {  // running maximum and sum of exp(x - maximum)
  float top, sum;
};
__device__ Online merge(Online a, Online b) {
  const float top = fmaxf(a.top, b.top);
  if (top == -INFINITY) return {top, 0};
  return {top, a.sum * expf(a.top - top) + b.sum * expf(b.top - top)};
}
__device__ Online block_online(Online v, Online* shared) {
  for (int d = 16; d; d >>= 1) v = merge(v, {__shfl_xor_sync(~0u, v.top, d), __shfl_xor_sync(~0u, v.sum, d)});
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
  __syncthreads();
  v = shared[0];
  for (unsigned w = 1; w < blockDim.x / 32; w++) v = merge(v, shared[w]);
  return v;
}
// log-sum-exp of scale * row
__device__ Online row_online(const dc_tensor& x, int64_t r, float scale, Online* shared) {
  Online v{-INFINITY, 0};
  for (int64_t j = threadIdx.x; j < x.dim[1]; j += blockDim.x) v = merge(v, {scale * load(x.data, x.dtype, r * x.stride[0] + j * x.stride[1]), 1.f});
  return block_online(v, shared);
}

__global__ void softmax_rows(dc_tensor y, dc_tensor x, float scale) {
  __shared__ Online shared[32];
  const int64_t r = blockIdx.x;
  const Online v = row_online(x, r, scale, shared);
  for (int64_t j = threadIdx.x; j < x.dim[1]; j += blockDim.x)
    store(y.data, y.dtype, r * y.stride[0] + j * y.stride[1], expf(scale * load(x.data, x.dtype, r * x.stride[0] + j * x.stride[1]) - v.top) / v.sum);
}
__global__ void softmax_grad(dc_tensor dx, dc_tensor dy, dc_tensor y, float scale) {
  __shared__ float shared[33];
  const int64_t r = blockIdx.x;
  float dot = 0;
  for (int64_t j = threadIdx.x; j < y.dim[1]; j += blockDim.x)
    dot += load(dy.data, dy.dtype, r * dy.stride[0] + j * dy.stride[1]) * load(y.data, y.dtype, r * y.stride[0] + j * y.stride[1]);
  dot = block_sum(dot, shared);
  for (int64_t j = threadIdx.x; j < y.dim[1]; j += blockDim.x)
    store(dx.data, dx.dtype, r * dx.stride[0] + j * dx.stride[1],
          scale * load(y.data, y.dtype, r * y.stride[0] + j * y.stride[1]) * (load(dy.data, dy.dtype, r * dy.stride[0] + j * dy.stride[1]) - dot));
}

__device__ Best block_best(Best best, Best* shared) {
  for (int d = 16; d; d >>= 1) best = better(best, {__shfl_xor_sync(~0u, best.value, d), __shfl_xor_sync(~0u, best.index, d)}, true);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = best;
  __syncthreads();
  best = shared[0];
  for (unsigned w = 1; w < blockDim.x / 32; w++) best = better(best, shared[w], true);
  return best;
}

__global__ void cross_entropy_rows(float* loss, dc_tensor logits, const int32_t* targets, float* lse, int32_t* top) {
  __shared__ Online shared[32];
  __shared__ Best bests[32];
  const int64_t r = blockIdx.x;
  Online v{-INFINITY, 0};
  Best best{0, -1};
  for (int64_t j = threadIdx.x; j < logits.dim[1]; j += blockDim.x) {
    const float x = load(logits.data, logits.dtype, r * logits.stride[0] + j * logits.stride[1]);
    v = merge(v, {x, 1.f});
    best = better(best, {x, int(j)}, true);
  }
  v = block_online(v, shared);
  best = block_best(best, bests);
  if (threadIdx.x != 0) return;
  const float total = v.top + logf(v.sum);
  const int target = targets[r];
  loss[r] = target < 0 ? 0.f : total - load(logits.data, logits.dtype, r * logits.stride[0] + target * logits.stride[1]);
  if (lse) lse[r] = total;
  if (top) top[r] = best.index;
}
__global__ void cross_entropy_grad(dc_tensor d, dc_tensor logits, const int32_t* targets, const float* lse, float scale) {
  const int64_t r = blockIdx.x;
  const int target = targets[r];
  for (int64_t j = threadIdx.x; j < logits.dim[1]; j += blockDim.x) {
    const float p = expf(load(logits.data, logits.dtype, r * logits.stride[0] + j * logits.stride[1]) - lse[r]);
    store(d.data, d.dtype, r * d.stride[0] + j * d.stride[1], target < 0 ? 0.f : scale * (p - (j == target ? 1.f : 0.f)));
  }
}

__global__ void kl_rows(float* kl, dc_tensor p, dc_tensor q, float* same) {
  __shared__ Online shared[32];
  __shared__ Best bests[32];
  __shared__ float sums[33];
  const int64_t r = blockIdx.x;
  const Online a = row_online(p, r, 1.f, shared), b = row_online(q, r, 1.f, shared);
  const float la = a.top + logf(a.sum);
  // log p - log q = (x - y) - apart: one rounding fewer than by two logarithms
  const float apart = float((double(a.top) - double(b.top)) + log(double(a.sum) / double(b.sum)));
  float sum = 0;
  Best bp{0, -1}, bq{0, -1};
  for (int64_t j = threadIdx.x; j < p.dim[1]; j += blockDim.x) {
    const float x = load(p.data, p.dtype, r * p.stride[0] + j * p.stride[1]), y = load(q.data, q.dtype, r * q.stride[0] + j * q.stride[1]);
    const float probability = expf(x - la);
    if (probability > 0) sum += probability * ((x - y) - apart);
    bp = better(bp, {x, int(j)}, true);
    bq = better(bq, {y, int(j)}, true);
  }
  sum = block_sum(sum, sums);
  bp = block_best(bp, bests);
  bq = block_best(bq, bests);
  if (threadIdx.x == 0) {
    kl[r] = sum;
    if (same) same[r] = bp.index == bq.index ? 1.f : 0.f;
  }
}
__global__ void kl_grad(dc_tensor dq, dc_tensor p, dc_tensor q, float scale) {
  __shared__ Online shared[32];
  const int64_t r = blockIdx.x;
  const Online a = row_online(p, r, 1.f, shared), b = row_online(q, r, 1.f, shared);
  for (int64_t j = threadIdx.x; j < p.dim[1]; j += blockDim.x) {
    const float x = load(p.data, p.dtype, r * p.stride[0] + j * p.stride[1]), y = load(q.data, q.dtype, r * q.stride[0] + j * q.stride[1]);
    store(dq.data, dq.dtype, r * dq.stride[0] + j * dq.stride[1], scale * (expf(y - b.top) / b.sum - expf(x - a.top) / a.sum));
  }
}

// --- rope ---------------------------------------------------------------------------------------------------------------

__global__ void rope_any(dc_tensor y, dc_tensor x, const float* cos, const float* sin, int64_t cos_row, int64_t sin_row, dc_tensor positions,
                         int half, bool interleaved, bool from_end, float sign) {
  const int64_t D = x.dim[3], n = count(x) / D;
  const int64_t first = from_end ? D - 2 * half : 0;
  const int64_t pairs = D - half;  // `half` rotated pairs, then the channels that pass through
  GRID_STRIDE(i, n * pairs) {
    const int64_t row = i / pairs, k = i % pairs;
    const int64_t h = row % x.dim[2], s = row / x.dim[2] % x.dim[1], b = row / x.dim[2] / x.dim[1];
    const int64_t xi = b * x.stride[0] + s * x.stride[1] + h * x.stride[2], yi = b * y.stride[0] + s * y.stride[1] + h * y.stride[2];
    if (k >= half) {
      const int64_t j = from_end ? k - half : k + half;
      store(y.data, y.dtype, yi + j * y.stride[3], load(x.data, x.dtype, xi + j * x.stride[3]));
      continue;
    }
    const int64_t position = static_cast<const int32_t*>(positions.data)[b * positions.stride[0] + s * positions.stride[1]];
    const float co = cos[position * cos_row + k], si = sign * sin[position * sin_row + k];
    const int64_t j0 = first + (interleaved ? 2 * k : k), j1 = interleaved ? j0 + 1 : j0 + half;
    const float u = load(x.data, x.dtype, xi + j0 * x.stride[3]), v = load(x.data, x.dtype, xi + j1 * x.stride[3]);
    store(y.data, y.dtype, yi + j0 * y.stride[3], u * co - v * si);
    store(y.data, y.dtype, yi + j1 * y.stride[3], v * co + u * si);
  }
}

// The block's sum, in its first thread.
__device__ double sum_of_block(double x, double* shared) {
  __syncthreads();
  shared[threadIdx.x] = x;
  for (int d = 128; d; d >>= 1) {
    __syncthreads();
    if (threadIdx.x < d) shared[threadIdx.x] += shared[threadIdx.x + d];
  }
  return shared[0];
}
__global__ void __launch_bounds__(256) norm_add_any(dc_tensor x, int64_t n, bool four, bool dense, double* parts) {
  __shared__ double shared[256];
  double sum = 0, bad = 0;
  const auto add = [&](float v) {
    if (isfinite(v)) sum += double(v) * v;
    else bad++;
  };
  if (four) {
    GRID_STRIDE(i, n / 4) {
      const float4 v = load4(x.data, x.dtype, dense ? 4 * i : offset_of(x, 4 * i));
      add(v.x), add(v.y), add(v.z), add(v.w);
    }
  } else {
    GRID_STRIDE(i, n) add(load(x.data, x.dtype, dense ? i : offset_of(x, i)));
  }
  sum = sum_of_block(sum, shared);
  bad = sum_of_block(bad, shared);
  if (threadIdx.x == 0) parts[2 * blockIdx.x] = sum, parts[2 * blockIdx.x + 1] = bad;
}
__global__ void __launch_bounds__(256) norm_add_finish(float* out, const double* parts, int n) {
  __shared__ double shared[256];
  double sum = 0, bad = 0;
  for (int i = threadIdx.x; i < n; i += 256) sum += parts[2 * i], bad += parts[2 * i + 1];
  sum = sum_of_block(sum, shared);
  bad = sum_of_block(bad, shared);
  if (threadIdx.x == 0) out[0] += float(sum), out[1] += float(bad);
}

bool is_float(const dc_tensor& t) { return t.dtype == DC_F32 || t.dtype == DC_BF16 || t.dtype == DC_F16; }
// Whether four neighbours of the innermost dimension lie together, on their own size, all through the tensor.
bool fours(const dc_tensor& t) {
  if (!is_float(t) || reinterpret_cast<uintptr_t>(t.data) % (4 * dtype_size(t.dtype))) return false;
  int inner = 3;
  while (inner > 0 && t.dim[inner] == 1) inner--;
  if (t.dim[inner] % 4 || t.stride[inner] != 1) return false;
  for (int d = 0; d < inner; d++)
    if (t.dim[d] != 1 && t.stride[d] % 4) return false;
  return true;
}
unsigned row_threads(int64_t columns) { return columns >= 4096 ? 512 : columns >= 512 ? 256 : 128; }

}  // namespace
}  // namespace dc

using namespace dc;

#define OP(name) extern "C" int dc_cuda_##name(dc_context* c, const dc_call* call)
#define T(k) call->t[k]

OP(unary) {
  const int64_t n = count(T(0));
  if (n == 0) return 0;
  unary_any<<<grid_for(c, n, 256), 256, 0, c->stream>>>(T(0), T(1), int(call->i[0]), float(call->f[0]), float(call->f[1]), n, contiguous(T(0)) && contiguous(T(1)), is_float(T(0)) && is_float(T(1)));
  return launched(c, "unary");
}
OP(binary) {
  const int64_t n = count(T(0));
  if (n == 0) return 0;
  const bool dense = contiguous(T(0)) && contiguous(T(1)) && contiguous(T(2));
  if (fours(T(0)) && fours(T(1)) && fours(T(2))) binary_fours<<<grid_for(c, n / 4, 256), 256, 0, c->stream>>>(T(0), T(1), T(2), int(call->i[0]), float(call->f[0]), n, dense);
  else binary_any<<<grid_for(c, n, 256), 256, 0, c->stream>>>(T(0), T(1), T(2), int(call->i[0]), call->f[0], n, dense, is_float(T(0)) && is_float(T(1)) && is_float(T(2)));
  return launched(c, "binary");
}
OP(reduce) {
  const dc_tensor &dst = T(0), &src = T(1);
  const int64_t outputs = src.dim[0] * src.dim[2], n = src.dim[1];
  const int kind = int(call->i[0]);
  if (outputs == 0) return 0;
  if (src.dim[2] == 1 && n > 16) reduce_rows<<<unsigned(outputs), row_threads(n), 0, c->stream>>>(dst, src, kind, n);
  else if (n >= 64 && kind != DC_ARGMAX && kind != DC_ARGMIN) reduce_tall<<<unsigned(ceil_div(outputs, 32)), dim3(32, 16), 0, c->stream>>>(dst, src, kind, n, src.dim[2], outputs);
  else reduce_columns<<<grid_for(c, outputs, 64), 64, 0, c->stream>>>(dst, src, kind, n, src.dim[2], outputs);
  return launched(c, "reduce");
}
OP(rmsnorm) {
  if (count(T(1)) == 0) return 0;
  rmsnorm_rows<<<unsigned(T(1).dim[0]), row_threads(T(1).dim[1]), 0, c->stream>>>(T(0), T(1), T(2), data<float>(T(3)), float(call->f[0]), float(call->f[1]));
  return launched(c, "rmsnorm");
}
OP(rmsnorm_backward) {
  const dc_tensor &dx = T(0), &dw = T(1), &dy = T(2), &x = T(3), &w = T(4), &rstd = T(5);
  if (count(x) == 0) return 0;
  rmsnorm_dx<<<unsigned(x.dim[0]), row_threads(x.dim[1]), 0, c->stream>>>(dx, dy, x, w, data<float>(rstd), float(call->f[0]));
  if (present(dw)) rmsnorm_dw<<<unsigned(ceil_div(x.dim[1], 32)), dim3(32, 8), 0, c->stream>>>(dw, dy, x, data<float>(rstd));
  return launched(c, "rmsnorm_backward");
}
OP(layernorm) {
  if (count(T(1)) == 0) return 0;
  layernorm_rows<<<unsigned(T(1).dim[0]), row_threads(T(1).dim[1]), 0, c->stream>>>(T(0), T(1), T(2), T(3), float(call->f[0]));
  return launched(c, "layernorm");
}
OP(swiglu) {
  const int64_t n = count(T(0));
  if (n == 0) return 0;
  const bool dense = contiguous(T(0)) && contiguous(T(1)) && contiguous(T(2)), four = fours(T(0)) && fours(T(1)) && fours(T(2));
  const auto kernel = four ? swiglu_fours : swiglu_any;
  kernel<<<grid_for(c, four ? n / 4 : n, 256), 256, 0, c->stream>>>(T(0), T(1), T(2), int(call->i[0]), float(call->f[0]), n, dense);
  return launched(c, "swiglu");
}
OP(swiglu_backward) {
  const int64_t n = count(T(2));
  if (!has_slope(int(call->i[0]))) return fail(c, "no derivative of activation %d", int(call->i[0]));
  if (n == 0) return 0;
  swiglu_grad<<<grid_for(c, n, 256), 256, 0, c->stream>>>(T(0), T(1), T(2), T(3), T(4), int(call->i[0]), float(call->f[0]), n);
  return launched(c, "swiglu_backward");
}
OP(softmax) {
  if (count(T(1)) == 0) return 0;
  softmax_rows<<<unsigned(T(1).dim[0]), row_threads(T(1).dim[1]), 0, c->stream>>>(T(0), T(1), float(call->f[0]));
  return launched(c, "softmax");
}
OP(softmax_backward) {
  if (count(T(1)) == 0) return 0;
  softmax_grad<<<unsigned(T(1).dim[0]), row_threads(T(1).dim[1]), 0, c->stream>>>(T(0), T(1), T(2), float(call->f[0]));
  return launched(c, "softmax_backward");
}
OP(cross_entropy) {
  if (count(T(1)) == 0) return 0;
  cross_entropy_rows<<<unsigned(T(1).dim[0]), row_threads(T(1).dim[1]), 0, c->stream>>>(data<float>(T(0)), T(1), data<int32_t>(T(2)), data<float>(T(3)), data<int32_t>(T(4)));
  return launched(c, "cross_entropy");
}
OP(cross_entropy_backward) {
  if (count(T(1)) == 0) return 0;
  cross_entropy_grad<<<unsigned(T(1).dim[0]), row_threads(T(1).dim[1]), 0, c->stream>>>(T(0), T(1), data<int32_t>(T(2)), data<float>(T(3)), float(call->f[0]));
  return launched(c, "cross_entropy_backward");
}
OP(kl) {
  if (count(T(1)) == 0) return 0;
  kl_rows<<<unsigned(T(1).dim[0]), row_threads(T(1).dim[1]), 0, c->stream>>>(data<float>(T(0)), T(1), T(2), data<float>(T(3)));
  return launched(c, "kl");
}
OP(kl_backward) {
  if (count(T(1)) == 0) return 0;
  kl_grad<<<unsigned(T(1).dim[0]), row_threads(T(1).dim[1]), 0, c->stream>>>(T(0), T(1), T(2), float(call->f[0]));
  return launched(c, "kl_backward");
}
OP(rope) {
  const dc_tensor &y = T(0), &x = T(1), &cos = T(2), &sin = T(3), &positions = T(4);
  const int half = int(cos.dim[1]);
  const int64_t n = count(x) / x.dim[3] * (x.dim[3] - half);
  if (n == 0) return 0;
  rope_any<<<grid_for(c, n, 256), 256, 0, c->stream>>>(y, x, data<float>(cos), data<float>(sin), cos.stride[0], sin.stride[0], positions, half, call->i[0] != 0, call->i[1] != 0, call->i[2] ? -1.f : 1.f);
  return launched(c, "rope");
}
OP(norm_add) {
  const int64_t n = count(T(1));
  if (n == 0) return 0;
  const unsigned grid = grid_for(c, n, 1024);
  double* parts = static_cast<double*>(scratch(c, 0, grid * 16));
  if (!parts) return 1;
  norm_add_any<<<grid, 256, 0, c->stream>>>(T(1), n, fours(T(1)), contiguous(T(1)), parts);
  norm_add_finish<<<1, 256, 0, c->stream>>>(data<float>(T(0)), parts, int(grid));
  return launched(c, "norm_add");
}
