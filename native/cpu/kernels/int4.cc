#include "int4.h"

#include "../cpu.h"
#include "vec.h"

namespace dc {
namespace {

#if defined(__AVX2__)
#define DC_EIGHT 1
typedef float v8 __attribute__((vector_size(32)));
typedef uint32_t u8x32 __attribute__((vector_size(32)));
// The 8 codes of a word as floats.
inline __attribute__((always_inline)) v8 unpack(uint32_t word) {
  const u8x32 shifts = {0, 4, 8, 12, 16, 20, 24, 28};
  return __builtin_convertvector(((u8x32{} + word) >> shifts) & 15, v8);
}
inline __attribute__((always_inline)) v8 madd8(v8 a, v8 b, v8 c) {
  return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline __attribute__((always_inline)) float sum8(v8 v) {
  float s = 0;
  for (int i = 0; i < 8; i++) s += v[i];
  return s;
}
#endif

template <int M>
void dot_rows(float* y, const float* x, int64_t ldx, const float* sums, int64_t lds, const uint32_t* words,
              int64_t word_count, int64_t group_words, const float* scale, const float* zero) {
  float total[M] = {};
  for (int64_t g = 0, at = 0; at < word_count; g++) {
    const int64_t end = at + group_words < word_count ? at + group_words : word_count;
    float part[M] = {};
#ifdef DC_EIGHT
    v8 acc[M][2];
    for (int i = 0; i < M; i++) acc[i][0] = acc[i][1] = v8{};
    for (; at + 2 <= end; at += 2) {
      const v8 a = unpack(words[at]), b = unpack(words[at + 1]);
      for (int i = 0; i < M; i++) {
        acc[i][0] = madd8(a, vload<v8>(x + i * ldx + at * 8), acc[i][0]);
        acc[i][1] = madd8(b, vload<v8>(x + i * ldx + at * 8 + 8), acc[i][1]);
      }
    }
    for (int i = 0; i < M; i++) part[i] = sum8(acc[i][0] + acc[i][1]);
#endif
    for (; at < end; at++)
      for (int q = 0; q < 8; q++) {
        const float u = float(words[at] >> (4 * q) & 15);
        for (int i = 0; i < M; i++) part[i] += u * x[i * ldx + at * 8 + q];
      }
    for (int i = 0; i < M; i++) total[i] += scale[g] * (part[i] - zero[g] * sums[i * lds + g]);
  }
  for (int i = 0; i < M; i++) y[i] = total[i];
}

void dot(float* y, const float* x, int64_t ldx, const float* sums, int64_t lds, int m, const uint32_t* words,
         int64_t word_count, int64_t group_words, const float* scale, const float* zero) {
  switch (m) {
    case 1: return dot_rows<1>(y, x, ldx, sums, lds, words, word_count, group_words, scale, zero);
    case 2: return dot_rows<2>(y, x, ldx, sums, lds, words, word_count, group_words, scale, zero);
    case 3: return dot_rows<3>(y, x, ldx, sums, lds, words, word_count, group_words, scale, zero);
    default: return dot_rows<4>(y, x, ldx, sums, lds, words, word_count, group_words, scale, zero);
  }
}

void expand(float* w, const uint32_t* words, int64_t k, int64_t group, const float* scale, const float* zero) {
  for (int64_t g = 0, j = 0; j < k; g++) {
    const int64_t end = j + group < k ? j + group : k;
    const float s = scale[g], z = zero[g];
#ifdef DC_EIGHT
    if (j % 8 == 0)
      for (; j + 8 <= end; j += 8) {
        const v8 v = (unpack(words[j / 8]) - z) * s;
        std::memcpy(w + j, &v, sizeof v);
      }
#endif
    for (; j < end; j++) w[j] = (float(words[j / 8] >> (j % 8 * 4) & 15) - z) * s;
  }
}

}  // namespace

extern const Int4Kernels DC_FOR_ISA(int4_kernels);
const Int4Kernels DC_FOR_ISA(int4_kernels) = {dot, expand};

}  // namespace dc
