#include "sweep.h"

#include "../cpu.h"
#include "vec.h"

namespace dc {
namespace {

// Round to nearest even of |x| < 2^22, +0 for what rounds to zero.
inline __attribute__((always_inline)) vf round_even(vf x) {
  const vf shift = splat(12582912.0f);  // 1.5 * 2^23
  return (x + shift) - shift;
}
// clamp(round(x), low, high); NaN gives low. Clamping first is the same, and keeps x within round_even's reach.
inline __attribute__((always_inline)) vf to_code(vf x, vf low, vf high) { return round_even(vmin(vmax(x, low), high)); }

// V vectors of rows at once: a column waits for the one before it, other rows fill the time.
template <int V>
void ldlq_lanes(const LdlqColumns& c, int64_t r) {
  const vf low = splat(c.low), high = splat(c.high);
  vf loss[V];
  for (int v = 0; v < V; v++) loss[v] = loadf(c.loss + r + v * W);
  for (int j = 0; j < c.m; j++) {
    const int64_t at = int64_t(j) * c.nr + r;
    vf even[V], odd[V];
    for (int v = 0; v < V; v++) even[v] = loadf(c.feedback + at + v * W), odd[v] = vf{};
    const float *f = c.factor + j, *e = c.e + r;
    int i = 0;
    for (; i + 2 <= j; i += 2, f += 2 * c.mr, e += 2 * c.nr)
      for (int v = 0; v < V; v++) {
        even[v] = madd(loadf(e + v * W), splat(f[0]), even[v]);
        odd[v] = madd(loadf(e + c.nr + v * W), splat(f[c.mr]), odd[v]);
      }
    if (i < j)
      for (int v = 0; v < V; v++) even[v] = madd(loadf(e + v * W), splat(f[0]), even[v]);
    const vf inverse = splat(c.inverse[j]), diagonal = splat(c.diagonal[j]);
    for (int v = 0; v < V; v++) {
      const vf w = loadf(c.e + at + v * W), x = madd(even[v] + odd[v], inverse, w);
      const vf s = loadf(c.scale[j] + r + v * W), z = loadf(c.zero[j] + r + v * W);
      const vf code = to_code(x / s + z, low, high), q = (code - z) * s, d = (x - q) * diagonal;
      storef(c.codes + at + v * W, code);
      storef(c.q + at + v * W, q);
      storef(c.e + at + v * W, w - q);
      loss[v] = madd(d, d, loss[v]);
    }
  }
  for (int v = 0; v < V; v++) storef(c.loss + r + v * W, loss[v]);
}

void ldlq(const LdlqColumns& c) {
  int64_t r = 0;
  for (; r + 2 * W <= c.nr; r += 2 * W) ldlq_lanes<2>(c, r);
  for (; r < c.nr; r += W) ldlq_lanes<1>(c, r);
}

void solve(float* x, const float* l, const float* inverse, int m, int mr, int nr) {
  for (int r = 0; r < nr; r += W) {
    for (int j = 0; j < m; j++) {
      vf sum = loadf(x + j * nr + r);
      for (int i = 0; i < j; i++) sum = madd(loadf(x + i * nr + r), splat(l[i * mr + j]), sum);
      storef(x + j * nr + r, sum * inverse[j]);
    }
  }
}

int factor(float* m, int64_t ld, int n) {
  constexpr int most = 64;
  alignas(64) float l[most][most] = {}, column[most] = {};
  for (int i = 0; i < n; i++) std::memcpy(l[i], m + i * ld, size_t(i + 1) * 4);
  for (int j = 0; j < n; j++) {
    const float pivot = l[j][j];
    if (!(pivot > 0 && std::isfinite(pivot))) return j + 1;
    const float root = std::sqrt(pivot), inverse = 1 / root;
    l[j][j] = root;
    column[j] = 0;  // finished columns of the vector below stay as they are
    for (int i = j + 1; i < n; i++) column[i] = l[i][j] *= inverse;
    const int first = (j + 1) / W * W;
    for (int i = j + 1; i < n; i++) {
      const vf x = splat(-column[i]);
      for (int p = first; p <= i; p += W) storef(l[i] + p, madd(x, loadf(column + p), loadf(l[i] + p)));
    }
  }
  for (int i = 0; i < n; i++) std::memcpy(m + i * ld, l[i], size_t(i + 1) * 4);
  return 0;
}

// Squares of L x L are transposed, the edges copied one by one.
template <class T, class Store>
inline __attribute__((always_inline)) void unstrip_into(T* out, int64_t ld, const float* strip, int nr, int64_t rows,
                                                        int64_t columns, const Store& store) {
  for (int64_t r = 0; r < rows; r += L) {
    int64_t j = 0;
    if (r + L <= rows)
      for (; j + L <= columns; j += L) {
        lane square[L];
        for (int i = 0; i < L; i++) std::memcpy(&square[i], strip + (j + i) * nr + r, sizeof(lane));
        transpose(square);
        for (int i = 0; i < L; i++) store(out + (r + i) * ld + j, square[i]);
      }
    for (; j < columns; j++)
      for (int64_t i = r; i < rows && i < r + L; i++) out[i * ld + j] = T(strip[j * nr + i]);
  }
}
void unstrip(float* out, int64_t ld, const float* strip, int nr, int64_t rows, int64_t columns) {
  unstrip_into(out, ld, strip, nr, rows, columns, [](float* to, const lane& v) { std::memcpy(to, &v, sizeof v); });
}
void unstrip_bytes(int8_t* out, int64_t ld, const float* strip, int nr, int64_t rows, int64_t columns) {
  unstrip_into(out, ld, strip, nr, rows, columns, [](int8_t* to, const lane& v) {
#if defined(__AVX2__)
    const __m256i x = _mm256_cvtps_epi32(v);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(half, half));
#else
    for (int i = 0; i < L; i++) to[i] = int8_t(v[i]);
#endif
  });
}
void flip(float* out, int64_t ldo, const float* in, int64_t ldi, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += L) {
    int64_t j = 0;
    if (i + L <= rows)
      for (; j + L <= columns; j += L) {
        lane square[L];
        for (int q = 0; q < L; q++) std::memcpy(&square[q], in + (columns - 1 - j - q) * ldi + rows - i - L, sizeof(lane));
        transpose(square);
        for (int q = 0; q < L; q++) std::memcpy(out + (i + q) * ldo + j, &square[L - 1 - q], sizeof(lane));
      }
    for (; j < columns; j++)
      for (int64_t q = i; q < rows && q < i + L; q++) out[q * ldo + j] = in[(columns - 1 - j) * ldi + rows - 1 - q];
  }
}

float search(const GridSearch& g, const float* w, const float* weight, int64_t n, float base) {
  float best = INFINITY, best_scale = base * g.multiples[0];
  const vf low = splat(g.low), high = splat(g.high);
  for (int p = 0; p < g.points; p++) {
    const float s = base * g.multiples[p], inverse = 1 / s;
    vf plus = vf{}, minus = vf{};
    // In units of s. The negated scale covers the mirrored range: -clamp(-x) there.
    if (g.free_sign) {
      for (int64_t j = 0; j < n; j += W) {
        const vf x = loadf(w + j) * inverse, r = round_even(x), h = loadf(weight + j);
        const vf a = x - vmin(vmax(r, low), high), b = x - vmin(vmax(r, -high), -low);
        plus = madd(h * a, a, plus);
        minus = madd(h * b, b, minus);
      }
    } else {
      for (int64_t j = 0; j < n; j += W) {
        const vf x = loadf(w + j) * inverse, a = x - to_code(x, low, high);
        plus = madd(loadf(weight + j) * a, a, plus);
      }
    }
    const float a = hsum(plus) * s * s;
    if (a < best) best = a, best_scale = s;
    if (g.free_sign) {
      const float b = hsum(minus) * s * s;
      if (b < best) best = b, best_scale = -s;
    }
  }
  return best_scale;
}

float search_zero(const GridSearch& g, const float* w, const float* weight, int64_t n, float base, const float* zeros,
                  int candidates, float* zero) {
  float best = INFINITY, best_scale = base * g.multiples[0];
  *zero = zeros[0];
  const vf low = splat(g.low), high = splat(g.high);
  for (int p = 0; p < g.points; p++) {
    const float s = base * g.multiples[p], inverse = 1 / s;
    for (int q = 0; q < candidates; q++) {
      const vf z = splat(zeros[q]);
      vf sum = vf{};
      for (int64_t j = 0; j < n; j += W) {
        const vf x = loadf(w + j) * inverse + z, a = x - to_code(x, low, high);
        sum = madd(loadf(weight + j) * a, a, sum);
      }
      const float a = hsum(sum) * s * s;
      if (a < best) best = a, best_scale = s, *zero = zeros[q];
    }
  }
  return best_scale;
}

void quantize(int8_t* codes, const float* w, int64_t n, float scale, float zero, float low, float high) {
  const vf s = splat(scale), z = splat(zero), l = splat(low), h = splat(high);
  int64_t j = 0;
  typedef int8_t vb __attribute__((vector_size(W)));
  for (; j + W <= n; j += W) {
    const vb code = __builtin_convertvector(__builtin_convertvector(to_code(loadf(w + j) / s + z, l, h), vi), vb);
    std::memcpy(codes + j, &code, W);
  }
  if (j < n) {
    float tail[W] = {};
    std::memcpy(tail, w + j, size_t(n - j) * 4);
    const vb code = __builtin_convertvector(__builtin_convertvector(to_code(loadf(tail) / s + z, l, h), vi), vb);
    std::memcpy(codes + j, &code, size_t(n - j));
  }
}

void dequantize(float* w, const int8_t* codes, int64_t n, float scale, float zero) {
  typedef int8_t vb __attribute__((vector_size(W)));
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const vf code = __builtin_convertvector(vload<vb>(codes + j), vf);
    storef(w + j, (code - zero) * scale);
  }
  for (; j < n; j++) w[j] = (float(codes[j]) - zero) * scale;
}

void range(const float* w, int64_t n, float* least, float* most) {
  vf low = vf{}, high = vf{};
  const vf finite = splat(3.4028235e38f);
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const vf x = loadf(w + j);
    const vi good = (x >= -finite) & (x <= finite);
    const vf y = (vf)((vi)x & good);
    low = vmin(y, low);
    high = vmax(y, high);
  }
  float a = -hmax(-low), b = hmax(high);
  for (; j < n; j++) {
    if (!(w[j] >= -3.4028235e38f && w[j] <= 3.4028235e38f)) continue;
    a = w[j] < a ? w[j] : a;
    b = w[j] > b ? w[j] : b;
  }
  *least = a;
  *most = b;
}

// lanes of a where the condition (all ones or zeros) holds, else of b
inline __attribute__((always_inline)) vf choose(vi condition, vf a, vf b) {
  return (vf)(((vi)a & condition) | ((vi)b & ~condition));
}

// Accumulators of push(): with one row of deltas and one broadcast they fill the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int P = 16;
#else
constexpr int P = 12;
#endif

// gradient_k -= sum over the `count` changed columns c of delta_c H_ck, for k in [begin, end).
void push(float* gradient, const float* const* rows, const float* delta, int count, int64_t begin, int64_t end) {
  int64_t k = begin;
  for (; k + P <= end; k += P) {
    vf acc[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) acc[p] = loadf(gradient + (k + p) * W);
    for (int c = 0; c < count; c++) {
      const vf d = -loadf(delta + c * W);
      const float* h = rows[c] + k;
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) acc[p] = madd(splat(h[p]), d, acc[p]);
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; p++) storef(gradient + (k + p) * W, acc[p]);
  }
  for (; k < end; k++) {
    vf acc = loadf(gradient + k * W);
    for (int c = 0; c < count; c++) acc = madd(splat(rows[c][k]), -loadf(delta + c * W), acc);
    storef(gradient + k * W, acc);
  }
}

int64_t descend(const DescentColumns& d) {
  const vf low = splat(d.low), high = splat(d.high);
  const float* rows[256];
  int count = 0;
  vi changed = vi{};
  for (int64_t j = d.j0; j < d.j1; j++) {
    const float* row = d.h + j * d.ldh;
    if (!(row[j] > 0)) continue;  // a dead channel
    const vf code = loadf(d.codes + j * W), s = loadf(d.scale[j - d.j0]);
    const vf step = loadf(d.gradient + j * W) / (s * row[j]);
    const vf moved = choose(step == step, to_code(code + step, low, high), code);
    const vi differs = moved != code;
    int32_t any[W];
    std::memcpy(any, &differs, sizeof any);
    int32_t all = 0;
    for (int i = 0; i < W; i++) all |= any[i];
    if (!all) continue;
    changed -= differs;
    const vf delta = (moved - code) * s;
    storef(d.codes + j * W, moved);
    storef(d.delta + count * W, delta);
    rows[count++] = row;
    push(d.gradient, &row, d.delta + (count - 1) * W, 1, d.j0, d.j1);
  }
  if (count > 0) {
    if (d.from < d.j0) push(d.gradient, rows, d.delta, count, d.from, d.j0);
    push(d.gradient, rows, d.delta, count, d.j1, d.k);
  }
  int32_t counts[W];
  std::memcpy(counts, &changed, sizeof counts);
  int64_t total = 0;
  for (int i = 0; i < W; i++) total += counts[i];
  return total;
}

}  // namespace

extern const SweepKernels DC_FOR_ISA(sweep_kernels);
const SweepKernels DC_FOR_ISA(sweep_kernels) = {W,      descend,     ldlq,     solve,      factor, unstrip, unstrip_bytes,
                                                flip,   search,  search_zero, quantize, dequantize, range};

}  // namespace dc
