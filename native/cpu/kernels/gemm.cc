// Packing and the micro-kernel of matrix multiplication. Compiled once per instruction set.
#include "gemm.h"

#include "../cpu.h"
#include "vec.h"

#if !defined(DC_ISA_AMX)  // no better than the AVX-512 one
namespace dc {
namespace {

// The accumulators, one row of B and one broadcast fill the vector registers (16, or 32 with AVX-512).
#if defined(__AVX512F__)
constexpr int MR = 14, NV = 2;
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;
#elif defined(__aarch64__)
constexpr int MR = 8, NV = 3;
#else
constexpr int MR = 6, NV = 2;
#endif
constexpr int NR = NV * W;

inline __attribute__((always_inline)) float read_one(const char* src, int dtype, int64_t i) {
  if (dtype == DC_F32) return reinterpret_cast<const float*>(src)[i];
  const uint16_t h = reinterpret_cast<const uint16_t*>(src)[i];
  return dtype == DC_BF16 ? bf16_to_float(h) : f16_to_float(h);
}

// --- 8 (or 4) consecutive elements as fp32 ---
#if defined(__AVX2__)
constexpr int L = 8;
typedef __m256 lane;
inline __attribute__((always_inline)) lane load_lane(const char* src, int dtype, int64_t i) {
  if (dtype == DC_F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(src) + i);
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(reinterpret_cast<const uint16_t*>(src) + i));
  if (dtype == DC_BF16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  return _mm256_cvtph_ps(h);
}
inline __attribute__((always_inline)) void transpose(lane r[L]) {
  const __m256 t0 = _mm256_unpacklo_ps(r[0], r[1]), t1 = _mm256_unpackhi_ps(r[0], r[1]);
  const __m256 t2 = _mm256_unpacklo_ps(r[2], r[3]), t3 = _mm256_unpackhi_ps(r[2], r[3]);
  const __m256 t4 = _mm256_unpacklo_ps(r[4], r[5]), t5 = _mm256_unpackhi_ps(r[4], r[5]);
  const __m256 t6 = _mm256_unpacklo_ps(r[6], r[7]), t7 = _mm256_unpackhi_ps(r[6], r[7]);
  const __m256 s0 = _mm256_shuffle_ps(t0, t2, 0x44), s1 = _mm256_shuffle_ps(t0, t2, 0xEE);
  const __m256 s2 = _mm256_shuffle_ps(t1, t3, 0x44), s3 = _mm256_shuffle_ps(t1, t3, 0xEE);
  const __m256 s4 = _mm256_shuffle_ps(t4, t6, 0x44), s5 = _mm256_shuffle_ps(t4, t6, 0xEE);
  const __m256 s6 = _mm256_shuffle_ps(t5, t7, 0x44), s7 = _mm256_shuffle_ps(t5, t7, 0xEE);
  r[0] = _mm256_permute2f128_ps(s0, s4, 0x20), r[1] = _mm256_permute2f128_ps(s1, s5, 0x20);
  r[2] = _mm256_permute2f128_ps(s2, s6, 0x20), r[3] = _mm256_permute2f128_ps(s3, s7, 0x20);
  r[4] = _mm256_permute2f128_ps(s0, s4, 0x31), r[5] = _mm256_permute2f128_ps(s1, s5, 0x31);
  r[6] = _mm256_permute2f128_ps(s2, s6, 0x31), r[7] = _mm256_permute2f128_ps(s3, s7, 0x31);
}
#else
constexpr int L = 4;
typedef vf lane;
inline __attribute__((always_inline)) lane load_lane(const char* src, int dtype, int64_t i) {
  if (dtype == DC_F32) return loadf(reinterpret_cast<const float*>(src) + i);
  const uint16_t* h = reinterpret_cast<const uint16_t*>(src) + i;
  if (dtype == DC_BF16) return (vf)(__builtin_convertvector(vload<vh>(h), vu) << 16);
  return vf{f16_to_float(h[0]), f16_to_float(h[1]), f16_to_float(h[2]), f16_to_float(h[3])};
}
inline __attribute__((always_inline)) void transpose(lane r[L]) {
  const vf t0 = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), t1 = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const vf t2 = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), t3 = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(t0, t2, 0, 1, 4, 5), r[1] = __builtin_shufflevector(t0, t2, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(t1, t3, 0, 1, 4, 5), r[3] = __builtin_shufflevector(t1, t3, 2, 3, 6, 7);
}
#endif
inline __attribute__((always_inline)) void store_lane(float* p, lane v) { std::memcpy(p, &v, sizeof v); }

// One panel of `width` lines, of which `lines` exist.
template <int kDtype>
void pack_panel(float* dst, const char* src, int64_t line_stride, int64_t position_stride, int lines, int64_t k,
                int width) {
  int64_t p = 0;
  if (position_stride == 1) {
    // Lines run along k: transpose squares of L x L; the stores of a narrow panel overlap, each repairs the one before.
    for (; p + L <= k; p += L) {
      for (int i0 = 0; i0 < width; i0 += L) {
        lane r[L];
        for (int i = 0; i < L; i++) {
          if (i0 + i < lines)
            r[i] = load_lane(src, kDtype, (i0 + i) * line_stride + p);
          else
            r[i] = lane{};
        }
        transpose(r);
        if (i0 + L <= width) {
          for (int q = 0; q < L; q++) store_lane(dst + (p + q) * width + i0, r[q]);
        } else {
          for (int q = 0; q < L; q++) std::memcpy(dst + (p + q) * width + i0, &r[q], size_t(width - i0) * 4);
        }
      }
    }
  } else if (line_stride == 1 && lines == width) {
    for (; p < k; p++) {
      int i = 0;
      for (; i + L <= width; i += L) store_lane(dst + p * width + i, load_lane(src, kDtype, p * position_stride + i));
      for (; i < width; i++) dst[p * width + i] = read_one(src, kDtype, p * position_stride + i);
    }
  }
  for (; p < k; p++)
    for (int i = 0; i < width; i++)
      dst[p * width + i] = i < lines ? read_one(src, kDtype, i * line_stride + p * position_stride) : 0;
}

void pack(float* dst, const void* src, int dtype, int64_t line_stride, int64_t position_stride, int64_t lines, int64_t k,
          int width) {
  for (int64_t i = 0; i < lines; i += width) {
    const int n = int(lines - i < width ? lines - i : width);
    float* panel = dst + i * k;
    const char* from = static_cast<const char*>(src) + i * line_stride * (dtype == DC_F32 ? 4 : 2);
    if (dtype == DC_F32)
      pack_panel<DC_F32>(panel, from, line_stride, position_stride, n, k, width);
    else if (dtype == DC_BF16)
      pack_panel<DC_BF16>(panel, from, line_stride, position_stride, n, k, width);
    else
      pack_panel<DC_F16>(panel, from, line_stride, position_stride, n, k, width);
  }
}

// C [MR, NR] = or += one panel of A times one of B.
inline __attribute__((always_inline)) void micro(float* c, int64_t ldc, const float* a, const float* b, int64_t k,
                                                 bool accumulate) {
  for (int i = 0; i < MR; i++) __builtin_prefetch(c + i * ldc, 1);  // wanted when the sums are done
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j] = vf{};
#pragma GCC unroll 4
  for (int64_t p = 0; p < k; p++) {
    vf row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) row[j] = loadf(b + p * NR + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      const vf x = splat(a[p * MR + i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) acc[i][j] = madd(x, row[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      float* at = c + i * ldc + j * W;
      storef(at, accumulate ? loadf(at) + acc[i][j] : acc[i][j]);
    }
}

void block(float* c, int64_t ldc, const float* a, const float* b, int64_t m, int64_t n, int64_t k, bool accumulate) {
  float edge[MR * NR];
  for (int64_t j = 0; j < n; j += NR) {
    for (int64_t i = 0; i < m; i += MR) {
      float* at = c + i * ldc + j;
      if (i + MR <= m && j + NR <= n) {
        micro(at, ldc, a + i * k, b + j * k, k, accumulate);
        continue;
      }
      micro(edge, NR, a + i * k, b + j * k, k, false);
      const int64_t rows = m - i < MR ? m - i : MR, columns = n - j < NR ? n - j : NR;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t s = 0; s < columns; s++)
          at[r * ldc + s] = accumulate ? at[r * ldc + s] + edge[r * NR + s] : edge[r * NR + s];
    }
  }
}

// W consecutive elements as fp32.
template <int kDtype>
inline __attribute__((always_inline)) vf load_wide(const char* src, int64_t i) {
  if (kDtype == DC_F32) return loadf(reinterpret_cast<const float*>(src) + i);
  const uint16_t* h = reinterpret_cast<const uint16_t*>(src) + i;
  if (kDtype == DC_BF16) return (vf)(__builtin_convertvector(vload<vh>(h), vu) << 16);
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(h)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h)));
#else
  return vf{f16_to_float(h[0]), f16_to_float(h[1]), f16_to_float(h[2]), f16_to_float(h[3])};
#endif
}

template <int kDtype, int M>
inline __attribute__((always_inline)) void dot_rows(float* out, int64_t ldo, const float* a, const char* b, int64_t k) {
  vf even[M], odd[M];
  for (int i = 0; i < M; i++) even[i] = odd[i] = vf{};
  int64_t p = 0;
  for (; p + 2 * W <= k; p += 2 * W) {
    const vf x = load_wide<kDtype>(b, p), y = load_wide<kDtype>(b, p + W);
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
      even[i] = madd(loadf(a + i * k + p), x, even[i]);
      odd[i] = madd(loadf(a + i * k + p + W), y, odd[i]);
    }
  }
  for (; p + W <= k; p += W) {
    const vf x = load_wide<kDtype>(b, p);
    for (int i = 0; i < M; i++) even[i] = madd(loadf(a + i * k + p), x, even[i]);
  }
  for (int i = 0; i < M; i++) {
    float sum = hsum(even[i] + odd[i]);
    for (int64_t q = p; q < k; q++) sum += a[i * k + q] * read_one(b, kDtype, q);
    out[i * ldo] = sum;
  }
}
template <int kDtype>
void dot_lines(float* out, int64_t ldo, const float* a, int64_t m, const char* b, int64_t line_bytes, int64_t lines,
               int64_t k) {
  for (int64_t j = 0; j < lines; j++) {
    const char* line = b + j * line_bytes;
    for (int64_t i = 0; i < m; i += 4) {  // the second time a line comes from L1
      switch (m - i) {
        case 1: dot_rows<kDtype, 1>(out + i * ldo + j, ldo, a + i * k, line, k); break;
        case 2: dot_rows<kDtype, 2>(out + i * ldo + j, ldo, a + i * k, line, k); break;
        case 3: dot_rows<kDtype, 3>(out + i * ldo + j, ldo, a + i * k, line, k); break;
        default: dot_rows<kDtype, 4>(out + i * ldo + j, ldo, a + i * k, line, k); break;
      }
    }
  }
}
void dots(float* out, int64_t ldo, const float* a, int64_t m, const void* b, int dtype, int64_t line_stride,
          int64_t lines, int64_t k) {
  const char* from = static_cast<const char*>(b);
  if (dtype == DC_F32)
    dot_lines<DC_F32>(out, ldo, a, m, from, line_stride * 4, lines, k);
  else if (dtype == DC_BF16)
    dot_lines<DC_BF16>(out, ldo, a, m, from, line_stride * 2, lines, k);
  else
    dot_lines<DC_F16>(out, ldo, a, m, from, line_stride * 2, lines, k);
}

}  // namespace

extern const GemmKernels DC_FOR_ISA(gemm_kernels);
const GemmKernels DC_FOR_ISA(gemm_kernels) = {MR, NR, pack, block, dots};

}  // namespace dc
#endif
