// The fp32 matrix product that other CPU ops are built on.
#pragma once
#include "cpu.h"

namespace dc {

// C [m,n] = alpha op(A) op(B) + beta C; row-major, leading dimensions in elements. op(A) [m,k] is A or, with
// transpose_a, the transpose of A [k,m]; likewise B [k,n]. With beta 0, C is written without being read.
// Splits the work over the context's threads: not to be called from inside parallel_for.
void sgemm_into(dc_context* c, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                bool transpose_a, const float* b, int64_t ldb, bool transpose_b, float beta, float* out, int64_t ldc);

}  // namespace dc
