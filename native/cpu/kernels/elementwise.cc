// Row kernels: conversions, element-wise functions, sums. Compiled once per instruction set.
#include "elementwise.h"

#include <math.h>

#include "../cpu.h"
#include "vec.h"

namespace dc {
namespace {

// --- conversions ---
inline __attribute__((always_inline)) vf load_bf16(const uint16_t* p) {
  return (vf)(__builtin_convertvector(vload<vh>(p), vu) << 16);
}
inline __attribute__((always_inline)) void store_bf16(uint16_t* p, vf x) {
  const vu u = (vu)x;
  const vu rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  const vu nan = (u >> 16) | 0x40;
  const vh h = __builtin_convertvector(x == x ? rounded : nan, vh);
  memcpy(p, &h, sizeof h);
}
void load_row(float* dst, const void* src, int dtype, int64_t n) {
  int64_t i = 0;
  if (dtype == DC_F32) {
    if (n > 0) memcpy(dst, src, size_t(n) * 4);
  } else if (dtype == DC_BF16) {
    const auto* s = static_cast<const uint16_t*>(src);
    for (; i < n; i++) dst[i] = bf16_to_float(s[i]);
  } else {
    const auto* s = static_cast<const uint16_t*>(src);
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(s + i))));
#endif
    for (; i < n; i++) dst[i] = f16_to_float(s[i]);
  }
}
void store_row(void* dst, int dtype, const float* src, int64_t n) {
  int64_t i = 0;
  if (dtype == DC_F32) {
    if (n > 0 && dst != src) memcpy(dst, src, size_t(n) * 4);
  } else if (dtype == DC_BF16) {
    auto* d = static_cast<uint16_t*>(dst);
    for (; i + W <= n; i += W) store_bf16(d + i, loadf(src + i));
    for (; i < n; i++) d[i] = float_to_bf16(src[i]);
  } else {
    auto* d = static_cast<uint16_t*>(dst);
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128((__m128i*)(d + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) d[i] = float_to_f16(src[i]);
  }
}

// Applies f to whole vectors; the rest goes through a padded one, so that every element gets the same arithmetic.
template <class F>
inline __attribute__((always_inline)) void map(float* x, int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) storef(x + i, f(loadf(x + i)));
  if (i < n) {
    float rest[W] = {};
    memcpy(rest, x + i, size_t(n - i) * 4);
    storef(rest, f(loadf(rest)));
    memcpy(x + i, rest, size_t(n - i) * 4);
  }
}
template <class F>
inline __attribute__((always_inline)) void map2(float* y, const float* a, const float* b, int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) storef(y + i, f(loadf(a + i), loadf(b + i)));
  if (i < n) {
    float u[W] = {}, v[W] = {};
    memcpy(u, a + i, size_t(n - i) * 4);
    memcpy(v, b + i, size_t(n - i) * 4);
    storef(u, f(loadf(u), loadf(v)));
    memcpy(y + i, u, size_t(n - i) * 4);
  }
}
template <class F>
inline __attribute__((always_inline)) vf each(vf x, F f) {
  float v[W];
  storef(v, x);
  for (int i = 0; i < W; i++) v[i] = f(v[i]);
  return loadf(v);
}

inline __attribute__((always_inline)) vf vabs(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }
inline __attribute__((always_inline)) vf vsqrt(vf x) {
  return each(x, [](float v) { return sqrtf(v); });
}
inline __attribute__((always_inline)) vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }
inline __attribute__((always_inline)) vf vtanh(vf x) {
  // (1 - e) / (1 + e), e = exp(-2|x|), loses digits near 0: the odd polynomial of Cephes there.
  const vf a = vabs(x);
  const vf e = vexp(a * -2.0f);
  const vf far = (1.0f - e) / (1.0f + e);
  const vf z = a * a;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const vf near = p * z * a + a;
  return (vf)((vi)(a < 0.625f ? near : far) | ((vi)x & (int32_t)0x80000000));
}

void unary_row(float* x, int64_t n, int kind, float a, float b) {
  switch (kind) {
    case DC_NEG: return map(x, n, [](vf v) { return -v; });
    case DC_ABS: return map(x, n, [](vf v) { return vabs(v); });
    case DC_SQUARE: return map(x, n, [](vf v) { return v * v; });
    case DC_SQRT: return map(x, n, [](vf v) { return vsqrt(v); });
    case DC_RSQRT: return map(x, n, [](vf v) { return 1.0f / vsqrt(v); });
    case DC_EXP: return map(x, n, [](vf v) { return vexp(v); });
    case DC_LOG: return map(x, n, [](vf v) { return each(v, [](float u) { return logf(u); }); });
    case DC_SIGMOID: return map(x, n, [](vf v) { return vsigmoid(v); });
    case DC_SILU: return map(x, n, [](vf v) { return v * vsigmoid(v); });
    case DC_GELU:
      return map(x, n, [](vf v) { return each(v, [](float u) { return 0.5f * u * (1.0f + erff(u * 0.70710678118654752f)); }); });
    case DC_GELU_TANH:
      return map(x, n, [](vf v) { return 0.5f * v * (1.0f + vtanh(0.79788456080286536f * (v + 0.044715f * v * v * v))); });
    case DC_RELU: return map(x, n, [](vf v) { return v < 0.0f ? splat(0) : v; });
    case DC_TANH: return map(x, n, [](vf v) { return vtanh(v); });
    case DC_SOFTPLUS:  // max(x, 0) + log1p(e^-|x|)
      return map(x, n, [](vf v) { return (v < 0.0f ? splat(0) : v) + each(vexp(-vabs(v)), [](float u) { return log1pf(u); }); });
    case DC_SOFTCAP: return map(x, n, [a](vf v) { return a * vtanh(v / a); });
    case DC_AFFINE: return map(x, n, [a, b](vf v) { return a * v + b; });
    case DC_RECIPROCAL: return map(x, n, [](vf v) { return 1.0f / v; });
    case DC_RELU2: return map(x, n, [](vf v) { return v < 0.0f ? splat(0) : v * v; });
    case DC_CLAMP: return map(x, n, [a, b](vf v) { return v < a ? splat(a) : v > b ? splat(b) : v; });
    case DC_IS_NONFINITE:
      return map(x, n, [](vf v) { return ((vi)v & 0x7F800000) == 0x7F800000 ? splat(1) : splat(0); });
  }
}
bool slope_row(float* x, int64_t n, int kind) {
  auto sign = [](vf v) { return v > 0.0f ? splat(1) : v < 0.0f ? splat(-1) : v; };
  switch (kind) {
    case DC_NEG: map(x, n, [](vf v) { return v == v ? splat(-1) : v; }); return true;
    case DC_ABS: map(x, n, sign); return true;
    case DC_SQUARE: map(x, n, [](vf v) { return v + v; }); return true;
    case DC_EXP: map(x, n, [](vf v) { return vexp(v); }); return true;
    case DC_SIGMOID: map(x, n, [](vf v) { const vf s = vsigmoid(v); return s * (1.0f - s); }); return true;
    case DC_SILU: map(x, n, [](vf v) { const vf s = vsigmoid(v); return s * (1.0f + v * (1.0f - s)); }); return true;
    case DC_GELU:  // Phi(x) + x phi(x)
      map(x, n, [](vf v) {
        const vf phi = 0.39894228040143268f * vexp(v * v * -0.5f);
        return each(v, [](float u) { return 0.5f * (1.0f + erff(u * 0.70710678118654752f)); }) + v * phi;
      });
      return true;
    case DC_GELU_TANH:
      map(x, n, [](vf v) {
        const vf t = vtanh(0.79788456080286536f * (v + 0.044715f * v * v * v));
        return 0.5f * (1.0f + t) + 0.5f * v * (1.0f - t * t) * (0.79788456080286536f * (1.0f + 0.134145f * v * v));
      });
      return true;
    case DC_RELU: map(x, n, [](vf v) { return v > 0.0f ? splat(1) : v == v ? splat(0) : v; }); return true;
    case DC_RELU2: map(x, n, [](vf v) { return v < 0.0f ? splat(0) : v + v; }); return true;
    case DC_TANH: map(x, n, [](vf v) { const vf t = vtanh(v); return 1.0f - t * t; }); return true;
    case DC_SOFTPLUS: map(x, n, [](vf v) { return vsigmoid(v); }); return true;
    default: return false;
  }
}
void binary_row(float* y, const float* a, const float* b, int64_t n, int kind, float alpha) {
  const vf s = splat(alpha);
  switch (kind) {
    case DC_ADD: return map2(y, a, b, n, [s](vf u, vf v) { return u + s * v; });
    case DC_SUB: return map2(y, a, b, n, [s](vf u, vf v) { return u - s * v; });
    case DC_MUL: return map2(y, a, b, n, [s](vf u, vf v) { return u * (s * v); });
    case DC_DIV: return map2(y, a, b, n, [s](vf u, vf v) { return u / (s * v); });
    // A NaN on either side is the result.
    case DC_MAX: return map2(y, a, b, n, [s](vf u, vf v) { v = s * v; return u != u ? u : u > v ? u : v; });
    case DC_MIN: return map2(y, a, b, n, [s](vf u, vf v) { v = s * v; return u != u ? u : u < v ? u : v; });
    case DC_EQUAL: return map2(y, a, b, n, [s](vf u, vf v) { return u == s * v ? splat(1) : splat(0); });
  }
}

// --- rows ---
void axpy_row(float* y, float a, const float* x, int64_t n) {
  const vf s = splat(a);
  int64_t i = 0;
  for (; i + W <= n; i += W) storef(y + i, madd(s, loadf(x + i), loadf(y + i)));
  for (; i < n; i++) y[i] += a * x[i];
}
void scale_row(float* x, float a, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] *= a;
}
void multiply_row(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] *= y[i];
}
float dot_row(const float* a, const float* b, int64_t n) {
  vf s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    s0 = madd(loadf(a + i), loadf(b + i), s0);
    s1 = madd(loadf(a + i + W), loadf(b + i + W), s1);
    s2 = madd(loadf(a + i + 2 * W), loadf(b + i + 2 * W), s2);
    s3 = madd(loadf(a + i + 3 * W), loadf(b + i + 3 * W), s3);
  }
  for (; i + W <= n; i += W) s0 = madd(loadf(a + i), loadf(b + i), s0);
  float s = hsum((s0 + s1) + (s2 + s3));
  for (; i < n; i++) s += a[i] * b[i];
  return s;
}
float max_row(const float* x, int64_t n) {
  vf m = splat(-INFINITY);
  int64_t i = 0;
  for (; i + W <= n; i += W) m = vmax(loadf(x + i), m);
  float best = hmax(m);
  for (; i < n; i++) best = x[i] > best ? x[i] : best;
  return best;
}
// Sums run in fp32 lanes for 32 steps at a time, in double beyond.
constexpr int64_t kRun = 32 * W;
double exp_sum_row(float* x, float scale, float shift, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = n < begin + kRun ? n : begin + kRun;
    vf s{};
    int64_t i = begin;
    for (; i + W <= end; i += W) {
      const vf e = vexp(loadf(x + i) * scale - shift);
      storef(x + i, e);
      s += e;
    }
    if (i < end) {
      float rest[W];
      for (int j = 0; j < W; j++) rest[j] = i + j < end ? x[i + j] * scale - shift : -INFINITY;
      const vf e = vexp(loadf(rest));
      storef(rest, e);
      memcpy(x + i, rest, size_t(end - i) * 4);
      s += e;
    }
    total += hsum(s);
  }
  return total;
}
float weigh_row(uint16_t* weights, int64_t stride, float* x, int64_t n, int64_t first, int64_t last, float factor,
                double* most, double* total) {
  constexpr int64_t kPiece = 32;
  const int64_t from = first / kPiece * kPiece, to = first < last ? (last + kPiece - 1) / kPiece * kPiece : from;
  float shrink = 1;
  if (first < last) {
    for (int64_t i = from; i < first; i++) x[i] = -INFINITY;
    for (int64_t i = last; i < to; i++) x[i] = -INFINITY;
    float high = max_row(x + from, to - from);
    if (high == -INFINITY)
      for (int64_t i = first; i < last && high == high; i++)
        if (x[i] != x[i]) high = x[i];
    high *= factor;
    if (!(high <= *most)) {
      const double change = exp(*most - high);
      *total *= change;
      *most = high;
      shrink = float(change);
    }
  }
  const int64_t seen = *most == -INFINITY ? from : to;
  const vf scale = splat(factor), shift = splat(-float(*most));
  vf s{};
  for (int64_t i = 0; i < n; i += kPiece) {
    uint16_t* piece = weights + i / kPiece * stride;
    if (i < from || i >= seen) {
      memset(piece, 0, kPiece * 2);
      continue;
    }
    for (int64_t q = 0; q < kPiece; q += W) {
      const vf e = vexp_bf16(madd(loadf(x + i + q), scale, shift));
      store_bf16(piece + q, e);
      s += e;
    }
  }
  *total += hsum(s);
  return shrink;
}
void silu_bf16_row(uint16_t* y, const uint16_t* gate, const uint16_t* up, int64_t n) {
  auto vector = [](uint16_t* to, const uint16_t* g, const uint16_t* u) __attribute__((always_inline)) {
    store_bf16(to, vsilu_bf16(load_bf16(g)) * load_bf16(u));
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) vector(y + i, gate + i, up + i);
  if (i < n) {
    uint16_t g[W] = {}, u[W] = {};
    memcpy(g, gate + i, size_t(n - i) * 2);
    memcpy(u, up + i, size_t(n - i) * 2);
    vector(g, g, u);
    memcpy(y + i, g, size_t(n - i) * 2);
  }
}
double sum_row(const float* x, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = n < begin + kRun ? n : begin + kRun;
    vf s{};
    int64_t i = begin;
    for (; i + W <= end; i += W) s += loadf(x + i);
    float part = hsum(s);
    for (; i < end; i++) part += x[i];
    total += part;
  }
  return total;
}
double sum_squares_row(const float* x, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) total += dot_row(x + begin, x + begin, n < begin + kRun ? n - begin : kRun);
  return total;
}

// With s = p + q and r = (p - q) / s: JS = sum of s/4 g(r), g(r) = (1 + r) ln(1 + r) + (1 - r) ln(1 - r) = r^2 + r^4/6 +
// r^6/15 + ...: no cancellation where the two are close, exactly 0 where they are equal.
inline __attribute__((always_inline)) vf js_term(vf p, vf q) {
  const vf s = p + q;
  const vf r = s > 0.0f ? (p - q) / s : s;
  const vf z = r * r;
  vf near = splat(1.0f / 120);
  near = near * z + 1.0f / 91;
  near = near * z + 1.0f / 66;
  near = near * z + 1.0f / 45;
  near = near * z + 1.0f / 28;
  near = near * z + 1.0f / 15;
  near = near * z + 1.0f / 6;
  near = near * z + 1.0f;
  near = near * z;
  const vf up = 1.0f + r, down = 1.0f - r, tiny = splat(1e-30f);
  const vf far = up * vlog(up > tiny ? up : tiny) + down * vlog(down > tiny ? down : tiny);
  return s * (z < 0.09f ? near : far);  // NaN stays: s is NaN then
}
void divergence_row(const float* p, const float* q, int64_t n, double out[4]) {
  double total[4] = {};
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = n < begin + kRun ? n : begin + kRun;
    vf js{}, pq{}, pp{}, qq{};
    for (int64_t i = begin; i < end; i += W) {
      vf u, v;
      if (i + W <= end) {
        u = loadf(p + i), v = loadf(q + i);
      } else {
        float a[W] = {}, b[W] = {};
        memcpy(a, p + i, size_t(end - i) * 4);
        memcpy(b, q + i, size_t(end - i) * 4);
        u = loadf(a), v = loadf(b);
      }
      js += js_term(u, v);
      pq += u * v, pp += u * u, qq += v * v;
    }
    total[0] += hsum(js), total[1] += hsum(pq), total[2] += hsum(pp), total[3] += hsum(qq);
  }
  out[0] = total[0] / 4;
  for (int i = 1; i < 4; i++) out[i] = total[i];
}

}  // namespace

extern const ElementKernels DC_FOR_ISA(element_kernels);
const ElementKernels DC_FOR_ISA(element_kernels) = {
    load_row, store_row,   unary_row, slope_row,       binary_row,     axpy_row,  scale_row,     multiply_row,
    dot_row,  max_row,     exp_sum_row, sum_row,       sum_squares_row, divergence_row, weigh_row, silu_bf16_row,
};

}  // namespace dc
