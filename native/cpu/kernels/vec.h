// Vectors of floats for kernels/*.cc, as wide as the instruction set of this compilation. Everything here is static:
// the same names exist once per instruction set, and the linker must never mix them.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define DC_PASTE2(a, b) a##_##b
#define DC_PASTE(a, b) DC_PASTE2(a, b)
#define DC_FOR_ISA(name) DC_PASTE(name, DC_ISA)

namespace dc {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

template <class V>
inline __attribute__((always_inline)) V vload(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline __attribute__((always_inline)) vf loadf(const float* p) { return vload<vf>(p); }
inline __attribute__((always_inline)) void storef(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline __attribute__((always_inline)) vf splat(float x) {  // not vf{} + x: that adds, and makes 0 of -0
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}
inline __attribute__((always_inline)) vi splati(int32_t x) { return vi{} + x; }

// a b + c: fused where the instruction set has it (x86 base does not).
inline __attribute__((always_inline)) vf madd(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
inline __attribute__((always_inline)) vf vmax(vf a, vf b) { return a > b ? a : b; }
inline __attribute__((always_inline)) vf vmin(vf a, vf b) { return a < b ? a : b; }
inline __attribute__((always_inline)) float hsum(vf v) {
  float x[W], s = 0;
  storef(x, v);
  for (int i = 0; i < W; i++) s += x[i];
  return s;
}
inline __attribute__((always_inline)) float hmax(vf v) {
  float x[W];
  storef(x, v);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) x[i] = x[i + n] > x[i] ? x[i + n] : x[i];
  return x[0];
}

// e^x within 1 ulp or so; NaN stays NaN, overflow gives infinity, underflow 0 through the subnormals. No fused
// operations: every instruction set gives the same bits.
inline __attribute__((always_inline)) vf vexp(vf x) {
  const vf c = vmax(vmin(x, splat(88.8f)), splat(-104.0f));  // NaN: both comparisons are false, taken care of below
  const vf shift = splat(12582912.0f);                       // 1.5 * 2^23: rounds to the nearest integer
  const vf t = c * 1.44269504088896341f + shift;
  const vf n = t - shift;
  vf r = c - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi e = (vi)t - (vi)shift;  // n as an integer
  const vi half = e >> 1;          // 2^e in two factors: 2^-149 and 2^128 are no floats of one
  const vf y = p * (vf)((half + 127) << 23) * (vf)((e - half + 127) << 23);
  return x == x ? y : x;
}

// e^x, x <= 0, for a result that is rounded to bf16: within 2^-18, in fewer operations than vexp where the instruction set
// has them. Exactly 0 for -infinity; NaN stays.
inline __attribute__((always_inline)) vf vexp_bf16(vf x) {
#if defined(__FMA__)
#if defined(__AVX512F__)
  constexpr __mmask16 all = 0xFFFF;  // GCC 12 warns of its own headers where there is no mask
  const vf c = (vf)_mm512_maskz_max_ps(all, (__m512)splat(-104), (__m512)x);  // the second one where that is NaN
  const vf n = (vf)_mm512_maskz_roundscale_ps(all, (__m512)(c * 1.44269504088896341f), 0x08);
#else
  const vf c = (vf)_mm256_max_ps((__m256)splat(-87), (__m256)x);
  const vf n = (vf)_mm256_round_ps((__m256)(c * 1.44269504088896341f), 0x08);
#endif
  const vf r = madd(n, splat(2.12194440e-4f), madd(n, splat(-0.693359375f), c));
  vf p = splat(8.3334519073e-3f);
  p = madd(p, r, splat(4.1665795894e-2f));
  p = madd(p, r, splat(1.6666665459e-1f));
  p = madd(p, r, splat(5.0000001201e-1f));
  p = madd(p, r * r, r + 1.0f);
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(all, (__m512)p, (__m512)n);
#else
  const vf y = (vf)((vi)p + ((vi)_mm256_cvtps_epi32((__m256)n) << 23));
  return x < -87.0f ? vf{} : y;
#endif
#else
  return vexp(x);
#endif
}
// x / (1 + e^-x) likewise.
inline __attribute__((always_inline)) vf vsilu_bf16(vf x) {
  const vf e = vexp_bf16((vf)((vi)x | INT32_MIN)), d = 1.0f + e;  // of -|x|: d is 1 to 2
#if defined(__AVX512F__)
  const vf y = (vf)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)d);
  return x * madd(y, madd(-d, y, splat(1)), y) * (x < 0.0f ? e : splat(1));
#else
  return x * (x < 0.0f ? e : splat(1)) / d;
#endif
}

// ln x for normal positive x, within 1 ulp or so (Cephes logf).
inline __attribute__((always_inline)) vf vlog(vf x) {
  const vi u = (vi)x;
  vi e = (u >> 23) - 126;
  vf m = (vf)((u & 0x007FFFFF) | 0x3F000000);  // in [0.5, 1)
  const vi small = m < 0.707106781186547524f;
  e += small;  // -1 where m is small
  m = (small ? m + m : m) - 1.0f;
  const vf z = m * m;
  vf p = splat(7.0376836292e-2f);
  p = p * m + -1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m + -1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m + -1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m + -2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const vf f = __builtin_convertvector(e, vf);
  const vf y = m * z * p + f * -2.12194440e-4f - 0.5f * z;
  return m + y + f * 0.693359375f;
}

// Squares of L x L floats.
#if defined(__AVX2__)
constexpr int L = 8;
typedef __m256 lane;
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
inline __attribute__((always_inline)) void transpose(lane r[L]) {
  const vf t0 = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), t1 = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const vf t2 = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), t3 = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(t0, t2, 0, 1, 4, 5), r[1] = __builtin_shufflevector(t0, t2, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(t1, t3, 0, 1, 4, 5), r[3] = __builtin_shufflevector(t1, t3, 2, 3, 6, 7);
}
#endif

}  // namespace
}  // namespace dc
