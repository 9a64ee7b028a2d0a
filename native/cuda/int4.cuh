// What the kernels of int4_matmul share: codes to bf16, products on tensor cores, x in shared memory, launches that overlap.
#pragma once
#include "cuda.cuh"

namespace dc {

__device__ __forceinline__ void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Codes 0..15 at bits 0 and 16 -> two bf16 of 128 + code, exactly.
__device__ __forceinline__ uint32_t widen(uint32_t word, int shift) {
  uint32_t pair;  // (word >> shift & 0x000F000F) | 0x43004300 in one instruction, which the compiler does not find
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(pair) : "r"(word >> shift), "r"(0x000F000Fu), "r"(0x43004300u));
  return pair;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Programmatic dependent launch: a grid that begins while its predecessor in the stream still runs. Until
// wait_for_earlier() it may only bring weights into L2, which is right whoever wrote them last.
__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void fetch_into_l2(const void* global, int bytes) {  // both multiples of 16
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(bytes));
#endif
}

// The products of eight columns: a word of row g of the weights, one of row g + 8, and x as stage_x() left it.
__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a, uint32_t b, const uint4& v) {
  mma_bf16(c, widen(a, 0), widen(b, 0), widen(a, 4), widen(b, 4), v.x, v.y);
  mma_bf16(c, widen(a, 8), widen(b, 8), widen(a, 12), widen(b, 12), v.z, v.w);
}

// M rows of x from m0 on, pair by pair (k, k + 4), `stride` of 16 bytes apart in shared memory, and sums [K / 8 / summed][8]
// of -x over `summed` words: neighbouring threads hold what belongs to one. Rows that are not there stay unwritten. The
// first `wide` words of a row lie in the order in which lane t reads [4 j + t] for its words 4 t + j. By all of `threads`.
__device__ __forceinline__ void stage_x(uint4* xp, float* sums, const dc_tensor& x, int m0, int M, int K, int stride, int summed, int wide, int thread, int threads) {
  const bool vector = K % 8 == 0 && x.stride[0] % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  const int row_words = (K + 127) / 128 * 16;
  constexpr int BATCH = 4;  // loads of a thread in flight
#pragma unroll 1
  for (int first = thread; first - thread < M * row_words; first += BATCH * threads) {
    uint4 batch[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int at = first + b * threads, m = M == 1 ? 0 : at / row_words, w = at - m * row_words;
      batch[b] = make_uint4(0, 0, 0, 0);
      if (m >= M || w * 8 >= K) continue;
      const bf16* from = static_cast<const bf16*>(x.data) + (m0 + m) * x.stride[0] + w * 8;
      if (vector) {
        batch[b] = *reinterpret_cast<const uint4*>(from);
      } else {
        bf16* each = reinterpret_cast<bf16*>(&batch[b]);
        for (int k = 0; k < 8; k++)
          if (w * 8 + k < K) each[k] = from[k];
      }
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int at = first + b * threads, m = M == 1 ? 0 : at / row_words, w = at - m * row_words;
      const uint4 v = batch[b];
      float sum = 0;
#pragma unroll
      for (uint32_t pair : {v.x, v.y, v.z, v.w}) sum += __uint_as_float(pair << 16) + __uint_as_float(pair & 0xFFFF0000u);
      for (int d = 1; d < summed; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (m >= M || w >= row_words) continue;
      xp[m * stride + (w < wide ? (w & ~15) + (w & 3) * 4 + (w >> 2 & 3) : w)] = make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632));
      if (w % summed == 0) sums[w / summed * 8 + m] = -sum;
    }
  }
}

// The first time on a device: lets a kernel have all shared memory, and finds whether it may begin before its predecessor
// has ended, that is, whether it was built with wait_for_earlier().
int prepare(dc_context* c, const void* kernel, int* begins_early);
// int4_bulk.cu. Whether it took the call is in *done.
int int4_bulk(dc_context* c, const dc_call* call, bool* done);

}  // namespace dc
