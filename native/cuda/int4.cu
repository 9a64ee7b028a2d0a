// y = x W' for packed 4-bit weights. Few rows of x: a kernel that reads every weight once and multiplies on tensor
// cores; many: the weights are unpacked once into 16 bits and cuBLAS does the rest.
#include "cuda.cuh"

namespace dc {
namespace {

__device__ __forceinline__ void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Codes 0..15 at bits 0 and 16 -> two bf16 of 128 + code, exactly.
__device__ __forceinline__ uint32_t widen(uint32_t word, int shift) { return (word >> shift & 0x000F000Fu) | 0x43004300u; }

// One block: 16 rows of W, K split over its warps by groups; M <= 8 columns. A word gives the pairs (k, k + 4): x is
// kept in that order in shared memory. Per group of 128 (or 32, 64): sum (128 + u) x on tensor cores, exact products,
// minus (128 + zero) sum x, times the scale.
constexpr int WARPS = 8;

template <int GROUP>
__global__ void __launch_bounds__(WARPS * 32) int4_rows(dc_tensor y, dc_tensor x, const uint32_t* __restrict__ words, int64_t word_row, dc_tensor scale, const uint32_t* zero, int64_t zero_row,
                                                        dc_tensor bias, int64_t N, int K, int group, int m0, int M) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int word_count = (K + 127) / 128 * 16, groups = (K + group - 1) / group;
  uint4* xp = reinterpret_cast<uint4*>(memory);                                    // [M][word_count] pairs of 8 values
  float* sums = reinterpret_cast<float*>(memory + size_t(M) * word_count * 16);  // [M][K / 32] sums of x
  float* partial = sums + M * (word_count / 4);                                   // [WARPS][16][8]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int64_t row0 = blockIdx.x * 16ll, ra = row0 + g, rb = row0 + g + 8;
  const uint4* wa = reinterpret_cast<const uint4*>(words + (ra < N ? ra : N - 1) * word_row);
  const uint4* wb = reinterpret_cast<const uint4*>(words + (rb < N ? rb : N - 1) * word_row);
  const int full = K / 128;  // pieces of 16 words that lie wholly within a row
  constexpr int AHEAD = 4;
  // The first weights and scales are on their way while x is put in place.
  uint4 a[AHEAD], b[AHEAD];
  float sa[AHEAD], sb[AHEAD];
  auto fetch = [&](int p0) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int p = p0 + i * WARPS < full ? p0 + i * WARPS : full - 1;
      a[i] = __ldcs(wa + p * 4 + t);
      b[i] = __ldcs(wb + p * 4 + t);
      sa[i] = load(scale.data, scale.dtype, (ra < N ? ra : N - 1) * scale.stride[0] + p * 128 / group);
      sb[i] = load(scale.data, scale.dtype, (rb < N ? rb : N - 1) * scale.stride[0] + p * 128 / group);
    }
  };
  if (GROUP == 128 && full > 0) fetch(warp);
  // x into shared memory, pair by pair, with the sum of every 32 columns: four neighbouring threads.
  const bool vector = K % 8 == 0 && x.stride[0] % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = threadIdx.x; i < M * word_count; i += WARPS * 32) {  // word_count is a multiple of 16: warps stay whole
    const int m = i / word_count, w = i % word_count;
    const bf16* from = static_cast<const bf16*>(x.data) + (m0 + m) * x.stride[0] + w * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (vector) {
      if (w * 8 < K) v = *reinterpret_cast<const uint4*>(from);
    } else {
      bf16* each = reinterpret_cast<bf16*>(&v);
      for (int k = 0; k < 8; k++)
        if (w * 8 + k < K) each[k] = from[k];
    }
    xp[i] = make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632));
    float sum = 0;
#pragma unroll
    for (uint32_t pair : {v.x, v.y, v.z, v.w}) sum += __uint_as_float(pair << 16) + __uint_as_float(pair & 0xFFFF0000u);
    sum += __shfl_xor_sync(__activemask(), sum, 1);
    sum += __shfl_xor_sync(__activemask(), sum, 2);
    if ((i & 3) == 0) sums[i / 4] = sum;
  }
  __syncthreads();
  float acc[4] = {};
  auto zero_of = [&](int64_t r, int gi) { return zero && r < N ? float(zero[r / 8 * zero_row + gi] >> (r % 8 * 4) & 15) : 8.f; };
  // c: sums of (128 + code) x over `parts` x 32 columns from part0, all of group gi.
  auto add_group = [&](const float (&c)[4], int gi, int part0, int parts, float s0, float s1) {
    float sx[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 2; j++)
      if (2 * t + j < M)
        for (int i = 0; i < parts; i++) sx[j] += sums[(2 * t + j) * (word_count / 4) + part0 + i];
    const float z0 = 128.f + zero_of(ra, gi), z1 = 128.f + zero_of(rb, gi);
    acc[0] += s0 * (c[0] - z0 * sx[0]);
    acc[1] += s0 * (c[1] - z0 * sx[1]);
    acc[2] += s1 * (c[2] - z1 * sx[0]);
    acc[3] += s1 * (c[3] - z1 * sx[1]);
  };
  auto multiply = [&](float (&c)[4], uint32_t a, uint32_t b, const uint4& v) {
    mma_bf16(c, widen(a, 0), widen(b, 0), widen(a, 4), widen(b, 4), v.x, v.y);
    mma_bf16(c, widen(a, 8), widen(b, 8), widen(a, 12), widen(b, 12), v.z, v.w);
  };
  const uint4 none = make_uint4(0, 0, 0, 0);
  if (GROUP == 128) {
    for (int p0 = warp; p0 < full; p0 += WARPS * AHEAD) {
      if (p0 != warp) fetch(p0);
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int p = p0 + i * WARPS;
        if (p >= full) break;
        float c[4] = {};
        const uint4* v = xp + g * word_count + p * 16 + t * 4;
        multiply(c, a[i].x, b[i].x, g < M ? v[0] : none);
        multiply(c, a[i].y, b[i].y, g < M ? v[1] : none);
        multiply(c, a[i].z, b[i].z, g < M ? v[2] : none);
        multiply(c, a[i].w, b[i].w, g < M ? v[3] : none);
        add_group(c, p * 128 / group, p * 4, 4, sa[i], sb[i]);
      }
    }
  }
  // Groups of 32 or 64, and what is left of a row: 4 words (32 columns) at a time.
  const uint32_t* la = reinterpret_cast<const uint32_t*>(wa);
  const uint32_t* lb = reinterpret_cast<const uint32_t*>(wb);
  const int last = (K + 31) / 32, words_there = (K + 7) / 8;
  for (int q = (GROUP == 128 ? full * 4 : 0) + warp; q < last; q += WARPS) {
    const bool there = q * 4 + t < words_there;
    float c[4] = {};
    multiply(c, there ? la[q * 4 + t] : 0, there ? lb[q * 4 + t] : 0, g < M ? xp[g * word_count + q * 4 + t] : none);
    const int gi = min(q * 32 / group, groups - 1);
    add_group(c, gi, q, 1, load(scale.data, scale.dtype, (ra < N ? ra : N - 1) * scale.stride[0] + gi), load(scale.data, scale.dtype, (rb < N ? rb : N - 1) * scale.stride[0] + gi));
  }
  float* mine = partial + warp * 128;
  mine[g * 8 + 2 * t] = acc[0], mine[g * 8 + 2 * t + 1] = acc[1];
  mine[(g + 8) * 8 + 2 * t] = acc[2], mine[(g + 8) * 8 + 2 * t + 1] = acc[3];
  __syncthreads();
  if (threadIdx.x < 128) {
    const int r = threadIdx.x / 8, m = threadIdx.x % 8;
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += partial[w * 128 + r * 8 + m];
    if (row0 + r < N && m < M) {
      if (bias.data) sum += load(bias.data, bias.dtype, (row0 + r) * bias.stride[0]);
      store(y.data, y.dtype, (m0 + m) * y.stride[0] + row0 + r, sum);
    }
  }
}

template <class T>
__global__ void unpack_weights(T* w, const uint32_t* words, int64_t word_row, dc_tensor scale, const uint32_t* zero, int64_t zero_row, int64_t N, int64_t K, int64_t group) {
  const int64_t per = (K + 7) / 8;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < N * per; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t r = i / per, k0 = i % per * 8;
    const uint32_t word = words[r * word_row + i % per];
    for (int k = 0; k < 8 && k0 + k < K; k++) {
      const int64_t g = (k0 + k) / group;
      const float z = zero ? float(zero[r / 8 * zero_row + g] >> (r % 8 * 4) & 15) : 8.f;
      w[r * K + k0 + k] = from_float<T>((float(word >> (4 * k) & 15) - z) * load(scale.data, scale.dtype, r * scale.stride[0] + g));
    }
  }
}

__global__ void add_row_bias(dc_tensor y, dc_tensor bias, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t at = i / y.dim[1] * y.stride[0] + i % y.dim[1];
    store(y.data, y.dtype, at, load(y.data, y.dtype, at) + load(bias.data, bias.dtype, i % y.dim[1] * bias.stride[0]));
  }
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_int4_matmul(dc_context* c, const dc_call* call) {
  const dc_tensor &y = call->t[0], &x = call->t[1], &words = call->t[2], &scale = call->t[3], &zero = call->t[4], &bias = call->t[5];
  const int64_t M = x.dim[0], K = x.dim[1], N = y.dim[1], group = call->i[0];
  if (count(y) == 0) return 0;
  const int64_t word_row = words.stride[0], padded = (K + 127) / 128 * 128;
  const size_t fixed = WARPS * 128 * 4, each = size_t(padded) * 2 + size_t(padded) / 32 * 4;
  const bool few = M <= 16 && x.dtype == DC_BF16 && x.stride[1] == 1 && y.stride[1] == 1 && word_row % 4 == 0 && reinterpret_cast<uintptr_t>(words.data) % 16 == 0 && group % 32 == 0 &&
                   (group % 128 == 0 || 128 % group == 0) && fixed + each <= c->shared_limit;
  if (few) {
    const int most = int((c->shared_limit - fixed) / each), columns = most < 8 ? most : 8;
    auto kernel = group % 128 == 0 ? int4_rows<128> : int4_rows<32>;
    for (int64_t m0 = 0; m0 < M; m0 += columns) {
      const int m = int(M - m0 < columns ? M - m0 : columns);
      const size_t shared = fixed + each * m;
      DC_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(c->shared_limit)));
      kernel<<<unsigned(ceil_div(N, 16)), WARPS * 32, shared, c->stream>>>(y, x, data<uint32_t>(words), word_row, scale, data<uint32_t>(zero), zero.stride[0], bias, N, int(K), int(group), int(m0), m);
    }
    return launched(c, "int4_matmul");
  }
  // fp32 inputs keep fp32 weights; 16-bit ones their own type.
  void* memory = scratch(c, 2, size_t(N) * K * dtype_size(x.dtype));
  if (!memory) return 1;
  DC_FLOAT(x.dtype, T, unpack_weights<T><<<grid_for(c, N * ceil_div(K, 8), 256), 256, 0, c->stream>>>(static_cast<T*>(memory), data<uint32_t>(words), word_row, scale, data<uint32_t>(zero), zero.stride[0], N, K, group));
  if (launched(c, "int4_matmul")) return 1;
  if (y.dtype != DC_F32 && y.dtype != x.dtype) return fail(c, "int4_matmul: y must be fp32 or of x's type");
  if (gemm(c, y, x, matrix(memory, x.dtype, K, N, 1, K), 1, 0, 0)) return 1;
  if (present(bias)) add_row_bias<<<grid_for(c, M * N, 256), 256, 0, c->stream>>>(y, bias, M * N);
  return launched(c, "int4_matmul bias");
}
