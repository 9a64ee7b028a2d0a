// Packed matrix multiplication, one table per instruction set (kernels/gemm.cc). Goto & van de Geijn 2008; Van Zee &
// van de Geijn 2015 (BLIS): A and B are copied into panels that the micro-kernel reads front to back.
#pragma once
#include <cstdint>

namespace dc {

struct GemmKernels {
  int mr, nr;      // rows and columns of the micro-kernel: the widths of the panels of A and B
  int depth, wide;  // k positions by columns of a block of B that takes less than half of L2; a panel of A fits half of L1
  // Lines of a matrix of any float dtype -> panels of `width` lines, fp32: dst[panel][p][line in panel], missing lines
  // 0. Element (line i, position p) stands at i * line_stride + p * position_stride; p < k.
  void (*pack)(float* dst, const void* src, int dtype, int64_t line_stride, int64_t position_stride, int64_t lines,
               int64_t k, int width);
  // C [m, n] (row stride ldc) = or += A B of packed panels with k positions each.
  void (*block)(float* c, int64_t ldc, const float* a, const float* b, int64_t m, int64_t n, int64_t k,
                bool accumulate);
  // out[i * ldo + j] = dot product of row i of a (fp32, contiguous, i < m <= 8) and line j of b (any float dtype,
  // positions contiguous): for few rows, where packing b would cost more than the product.
  void (*dots)(float* out, int64_t ldo, const float* a, int64_t m, const void* b, int dtype, int64_t line_stride,
               int64_t lines, int64_t k);
};

const GemmKernels& gemm_kernels();

// The same with its own packed form. k is rounded up to `step`, the rest of a panel being zeros. Line i, position p of A's
// panel of bf16 stands at (p / step * mr + i) * step + p % step.
struct Panels {
  int mr, nr, step;
  int bytes;           // of a packed element
  uint32_t sign;       // flips the signs in 4 bytes of packed elements
  int64_t depth, rows;  // k positions of a block, rows of A whose block fits L2
  void (*pack_a)(void* dst, const void* src, int dtype, int64_t line_stride, int64_t position_stride, int64_t lines,
                 int64_t k);
  void (*pack_b)(void* dst, const void* src, int dtype, int64_t line_stride, int64_t position_stride, int64_t lines,
                 int64_t k);
  void (*block)(float* c, int64_t ldc, const void* a, const void* b, int64_t m, int64_t n, int64_t k,
                bool accumulate);
  // out bf16 [m, n], or [n, m] if transposed, = before (fp32; NULL: 0; with room for whole panels) + A B, for one panel of
  // A. NULL where panels have no such thing.
  void (*block_bf16)(uint16_t* out, int64_t ldo, bool transposed, const float* before, int64_t ld, const void* a,
                     const void* b, int64_t m, int64_t n, int64_t k) = nullptr;
  int64_t resident = 0;  // bytes of packed lines of the second operand that stay in L2: half of what processors with the unit have
  int64_t piece = 1;  // where k is cut at its multiples, sums keep their order
  const char* name = "";  // of the unit
  // block for A packed as B. NULL where panels have no such thing.
  void (*block_alike)(float* c, int64_t ldc, const void* a, const void* b, int64_t m, int64_t n, int64_t k,
                      bool accumulate) = nullptr;
  // block and block_bf16 for one panel of A whose lines are read where they lie, `lda` values apart, each along k: a whole number
  // of steps, and of `group` lines. NULL where panels have no such thing.
  int64_t group = 1;
  void (*lines)(float* c, int64_t ldc, const uint16_t* a, int64_t lda, const void* b, int64_t m, int64_t n, int64_t k,
                bool accumulate) = nullptr;
  void (*lines_bf16)(uint16_t* out, int64_t ldo, bool transposed, const float* before, int64_t ld, const uint16_t* a, int64_t lda,
                     const void* b, int64_t m, int64_t n, int64_t k) = nullptr;
};
const Panels& float_panels();  // of any float dtypes
// For two operands of bf16; NULL where the processor has no unit for them.
const Panels* bf16_panels();
// For operands of fp32 whose product may be off by 2^-16 of each term, as three products of bf16 parts on the same unit; NULL
// where that is no faster.
const Panels* split_panels();

}  // namespace dc
