#include "int4.h"

#include "../cpu.h"
#include "vec.h"

namespace dc {
namespace {

// A lane takes a word and its eight codes one after another, so that a block needs one shift for W codes.
template <int M>
void dot_rows(float* y, const float* x, int64_t ldx, const float* sums, int64_t lds, const uint32_t* words,
              int64_t word_count, int64_t group_words, const float* scale, int64_t groups, const float* offset) {
  vf total[M] = {};
  for (int64_t at = 0, end = group_words; at < word_count; at += W) {
    if (group_words && at == end) scale++, end += group_words;
    uint32_t rest[W] = {};
    const bool whole = at + W <= word_count;
    if (!whole) std::memcpy(rest, words + at, size_t(word_count - at) * sizeof *rest);
    const vi block = vload<vi>(whole ? words + at : rest);
    vf part[M] = {};
    for (int j = 0; j < 8; j++) {
      const vf u = __builtin_convertvector((block >> (4 * j)) & 15, vf);  // signed: unsigned takes AVX2 ten steps
      for (int i = 0; i < M; i++) part[i] = madd(u, loadf(x + i * ldx + (at * 8 + j * W)), part[i]);
    }
    const vf s = group_words ? splat(*scale) : loadf(scale + at);
    for (int i = 0; i < M; i++) total[i] = madd(s, part[i], total[i]);
  }
  for (int64_t g = 0; g < groups; g += W)
    for (int i = 0; i < M; i++) total[i] -= loadf(offset + g) * loadf(sums + i * lds + g);
  for (int i = 0; i < M; i++) y[i] = hsum(total[i]);
}

void dot(float* y, const float* x, int64_t ldx, const float* sums, int64_t lds, int m, const uint32_t* words,
         int64_t word_count, int64_t group_words, const float* scale, int64_t groups, const float* offset) {
  constexpr decltype(&dot_rows<1>) rows[] = {dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>,
                                             dot_rows<5>, dot_rows<6>, dot_rows<7>, dot_rows<8>};
  rows[m - 1](y, x, ldx, sums, lds, words, word_count, group_words, scale, groups, offset);
}

void expand(float* w, const uint32_t* words, int64_t k, int64_t group, const float* scale, const float* zero) {
  for (int64_t g = 0, j = 0; j < k; g++) {
    const int64_t end = j + group < k ? j + group : k;
    const float s = scale[g], z = zero[g];
    if (j % 8 == 0)
      for (; j + 8 <= end; j += 8) {
        float u[8];
        for (int q = 0; q < 8; q++) u[q] = float(int(words[j / 8] >> (4 * q) & 15));
        for (int q = 0; q < 8; q++) w[j + q] = (u[q] - z) * s;
      }
    for (; j < end; j++) w[j] = (float(words[j / 8] >> (j % 8 * 4) & 15) - z) * s;
  }
}

}  // namespace

extern const Int4Kernels DC_FOR_ISA(int4_kernels);
const Int4Kernels DC_FOR_ISA(int4_kernels) = {W, dot, expand};

}  // namespace dc
