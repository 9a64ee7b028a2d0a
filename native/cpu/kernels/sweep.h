// Kernels of quantization: what happens between the matrix products. One table per instruction set (kernels/sweep.cc).
//
// A strip holds `nr` rows of a matrix transposed: element (row r, column j) at [j nr + r], nr as in GemmKernels, so that
// a strip is also a packed panel of B there.
#pragma once
#include <cstdint>

namespace dc {

// m columns of an LDLQ sweep over one strip, after the columns before them have been fed back.
struct LdlqColumns {
  int m, mr, nr;
  float low, high;
  float* e;               // [m, nr]: W in, W - Q out
  const float* feedback;  // [m, nr]: sum over earlier columns i of (W_i - Q_i) R_ij
  const float* factor;    // [m, mr]: R_ij of these columns, row i, column j > i
  const float* diagonal;  // [m]: R_jj
  const float* inverse;   // [m]: 1 / R_jj
  const float* const* scale;  // [m] -> [nr]
  const float* const* zero;   // [m] -> [nr]
  float* codes;               // [m, nr]
  float* q;                   // [m, nr]
  float* loss;                // [nr] += ((v_j - Q_j) R_jj)^2
};

// Coordinate descent over columns [j0, j1) of `lanes` rows. All [k, lanes] but where noted.
struct DescentColumns {
  int64_t k, j0, j1;
  float low, high;
  const float* h;  // [k, ldh], symmetric
  int64_t ldh;
  const float* const* scale;  // [j1 - j0] -> [lanes]
  float* gradient;            // (W - Q) H, kept up to date from column `from` on
  int64_t from;
  float* codes;
  float* delta;  // [j1 - j0, lanes] scratch
};

struct GridSearch {
  float low, high;
  int points;
  const float* multiples;  // [points]
  bool free_sign;
};

struct SweepKernels {
  int lanes;  // rows that descend() takes at once
  int64_t (*descend)(const DescentColumns&);  // how many codes changed
  void (*ldlq)(const LdlqColumns&);
  // X L' = B for m columns of a strip: x [m, nr] holds B less what earlier columns contribute; l [m, mr] = -L_ji (row i,
  // column j > i), inverse [m] = 1 / L_jj.
  void (*solve)(float* x, const float* l, const float* inverse, int m, int mr, int nr);
  // Cholesky factor of the lower triangle of m [n, n] in place, n <= 64; 0, or 1 + the index of the first pivot that is
  // not positive and finite.
  int (*factor)(float* m, int64_t ld, int n);
  // Columns [columns, nr] of a strip -> rows [rows, columns], as they are or (where they are integers) as bytes.
  void (*unstrip)(float* out, int64_t ld, const float* strip, int nr, int64_t rows, int64_t columns);
  void (*unstrip_bytes)(int8_t* out, int64_t ld, const float* strip, int nr, int64_t rows, int64_t columns);
  // out [rows, columns] = in [columns, rows] mirrored at its other diagonal: out(i, j) = in(columns - 1 - j, rows - 1 - i).
  void (*flip)(float* out, int64_t ldo, const float* in, int64_t ldi, int64_t rows, int64_t columns);
  // Best scale base * multiple (negated where that is better), judged by sum weight (w - deq w)^2; n a multiple of 16.
  float (*search)(const GridSearch&, const float* w, const float* weight, int64_t n, float base);
  // The same with a zero point, which is one of `candidates` zeros.
  float (*search_zero)(const GridSearch&, const float* w, const float* weight, int64_t n, float base,
                       const float* zeros, int candidates, float* zero);
  void (*quantize)(int8_t* codes, const float* w, int64_t n, float scale, float zero, float low, float high);
  void (*dequantize)(float* w, const int8_t* codes, int64_t n, float scale, float zero);
  // Least and greatest finite value, 0 among them.
  void (*range)(const float* w, int64_t n, float* least, float* most);
};

const SweepKernels& sweep_kernels();

}  // namespace dc
