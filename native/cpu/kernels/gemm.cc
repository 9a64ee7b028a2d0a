// Packing and the micro-kernel of matrix multiplication. Compiled once per instruction set.
#include "gemm.h"

#include "../cpu.h"
#include "vec.h"

namespace dc {
namespace {

// The accumulators, one row of B and one broadcast fill the vector registers; with AVX-512, where fewer hide the latency already,
// short panels leave L1 to B (8 x 32 against 9 x 48, 10, 12 and 14 x 32, each with several depths, on Zen 5).
#if defined(__AVX512F__)
constexpr int MR = 8, NV = 2, DEPTH = 512, WIDE = 256;
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2, DEPTH = 512, WIDE = 96;
#elif defined(__aarch64__)
constexpr int MR = 8, NV = 3, DEPTH = 512, WIDE = 96;
#else
constexpr int MR = 6, NV = 2, DEPTH = 512, WIDE = 96;
#endif
constexpr int NR = NV * W;

inline __attribute__((always_inline)) float read_one(const char* src, int dtype, int64_t i) {
  if (dtype == DC_F32) return reinterpret_cast<const float*>(src)[i];
  const uint16_t h = reinterpret_cast<const uint16_t*>(src)[i];
  return dtype == DC_BF16 ? bf16_to_float(h) : f16_to_float(h);
}

// L consecutive elements as fp32.
inline __attribute__((always_inline)) lane load_lane(const char* src, int dtype, int64_t i) {
#if defined(__AVX2__)
  if (dtype == DC_F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(src) + i);
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(reinterpret_cast<const uint16_t*>(src) + i));
  if (dtype == DC_BF16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  return _mm256_cvtph_ps(h);
#else
  if (dtype == DC_F32) return loadf(reinterpret_cast<const float*>(src) + i);
  const uint16_t* h = reinterpret_cast<const uint16_t*>(src) + i;
  if (dtype == DC_BF16) return (vf)(__builtin_convertvector(vload<vh>(h), vu) << 16);
  return vf{f16_to_float(h[0]), f16_to_float(h[1]), f16_to_float(h[2]), f16_to_float(h[3])};
#endif
}
inline __attribute__((always_inline)) void store_lane(float* p, lane v) { std::memcpy(p, &v, sizeof v); }

// One panel of `width` lines, of which `lines` exist. kWidth: `width` where it is known beforehand, else 0.
template <int kDtype, int kWidth>
void pack_panel(float* dst, const char* src, int64_t line_stride, int64_t position_stride, int lines, int64_t k,
                int any_width) {
  constexpr int kSquares = (kDtype == DC_F32 ? 16 : 32) / L;  // a cache line of each line: it may be gone after that
  const int width = kWidth ? kWidth : any_width;
  int64_t p = 0;
  if (position_stride == 1) {
    // Lines run along k: transpose squares of L x L.
    auto squares = [&](int count) __attribute__((always_inline)) {
      for (int i0 = 0; i0 < width; i0 += L)
        for (int64_t p0 = p; p0 < p + count * L; p0 += L) {
          lane r[L];
          for (int i = 0; i < L; i++) {
            if (i0 + i < lines)
              r[i] = load_lane(src, kDtype, (i0 + i) * line_stride + p0);
            else
              r[i] = lane{};
          }
          transpose(r);
          if (i0 + L <= width) {
            for (int q = 0; q < L; q++) store_lane(dst + (p0 + q) * width + i0, r[q]);
          } else {
            for (int q = 0; q < L; q++) std::memcpy(dst + (p0 + q) * width + i0, &r[q], size_t(width - i0) * 4);
          }
        }
      p += count * L;
    };
    while (p + kSquares * L <= k) squares(kSquares);
    while (p + L <= k) squares(1);
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

template <int kDtype>
void pack_panels(float* dst, const char* src, int64_t line_stride, int64_t position_stride, int64_t lines, int64_t k,
                 int width) {
  const auto panel = width == MR   ? pack_panel<kDtype, MR>
                     : width == NR ? pack_panel<kDtype, NR>
                                   : pack_panel<kDtype, 0>;
  for (int64_t i = 0; i < lines; i += width)
    panel(dst + i * k, src + i * line_stride * (kDtype == DC_F32 ? 4 : 2), line_stride, position_stride,
          int(lines - i < width ? lines - i : width), k, width);
}

void pack(float* dst, const void* src, int dtype, int64_t line_stride, int64_t position_stride, int64_t lines, int64_t k,
          int width) {
  const char* from = static_cast<const char*>(src);
  if (dtype == DC_F32)
    pack_panels<DC_F32>(dst, from, line_stride, position_stride, lines, k, width);
  else if (dtype == DC_BF16)
    pack_panels<DC_BF16>(dst, from, line_stride, position_stride, lines, k, width);
  else
    pack_panels<DC_F16>(dst, from, line_stride, position_stride, lines, k, width);
}

// sum += a b, in this very register: GCC 12 otherwise moves accumulators about between unrolled steps, and spills some.
inline __attribute__((always_inline)) void add_product(vf& sum, vf a, vf b) {
#if defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__FMA__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  sum = madd(a, b, sum);
#endif
}

// C [MR, NR] = or += one panel of A times one of B. Fetches 16 floats from `next` on for every 4 positions.
inline __attribute__((always_inline)) void micro(float* c, int64_t ldc, const float* a, const float* b, int64_t k,
                                                 bool accumulate, const float* next) {
  for (int i = 0; i < MR; i++) {  // wanted when the sums are done
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + NR - 1, 1);
  }
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j] = vf{};
  auto step = [&]() __attribute__((always_inline)) {
    vf row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) row[j] = loadf(b + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      const vf x = splat(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) add_product(acc[i][j], x, row[j]);
    }
    a += MR, b += NR;
  };
  int64_t p = 0;
  for (; p + 4 <= k; p += 4, next += 16) {
    __builtin_prefetch(next, 0, 2);
    step(), step(), step(), step();
  }
  for (; p < k; p++) step();
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      float* at = c + i * ldc + j * W;
      storef(at, accumulate ? loadf(at) + acc[i][j] : acc[i][j]);
    }
}

// The smaller operand stays in L2, panels of the other one come past it one by one through L1.
void block(float* c, int64_t ldc, const float* a, const float* b, int64_t m, int64_t n, int64_t k, bool accumulate) {
  float edge[MR * NR];
  // Panel i of A times panel j of B, the `turn`th product of the panel that comes past: the next one of its kind is
  // fetched while the first ones run.
  auto one = [&](int64_t i, int64_t j, const float* next, int64_t length, int64_t turn) __attribute__((always_inline)) {
    const float* left = a + i * k;
    const float* right = b + j * k;
    float* at = c + i * ldc + j;
    next += turn * 4 * k < length ? turn * 4 * k : 0;
    const int64_t rows = m - i < MR ? m - i : MR, columns = n - j < NR ? n - j : NR;
    if (rows == MR && columns == NR) return micro(at, ldc, left, right, k, accumulate, next);
    micro(edge, NR, left, right, k, false, next);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t s = 0; s < columns; s++)
        at[r * ldc + s] = accumulate ? at[r * ldc + s] + edge[r * NR + s] : edge[r * NR + s];
  };
  if (m < n) {
    for (int64_t j = 0; j < n; j += NR)
      for (int64_t i = 0; i < m; i += MR) one(i, j, b + (j + NR) * k, NR * k, i / MR);
  } else {
    for (int64_t i = 0; i < m; i += MR)
      for (int64_t j = 0; j < n; j += NR) one(i, j, a + (i + MR) * k, MR * k, j / NR);
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
const GemmKernels DC_FOR_ISA(gemm_kernels) = {MR, NR, DEPTH, WIDE, pack, block, dots};

}  // namespace dc
