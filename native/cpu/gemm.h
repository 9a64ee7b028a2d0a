// Matrix products that other CPU ops are built on too.
#pragma once
#include "cpu.h"

namespace dc {

// C [m,n] = alpha A [m,k] B [k,n] + beta C + bias [n]: float views of rank 2, any strides. With beta 0, C is written
// without being read.
struct Product {
  dc_tensor c, a, b;
  int64_t m = 0, n = 0, k = 0;
  double alpha = 1, beta = 0;
  const float* bias = nullptr;
  bool split = false;  // large fp32 products may use split_panels(): off by 2^-16 of each term
};
// On the context's threads (not from inside parallel_for), or with NULL on the calling one. Every element of C is
// summed in the same order whatever the number of threads and rows.
void multiply(dc_context* c, const Product& x);

// Its parts. The product on the processor's tiles (gemm_tiles.cc), k > 0:
void multiply_tiles(dc_context* c, const Product& x, const struct Panels& kernel);
// alpha, beta, bias and the rounding of a finished tile [rows, columns] of C at (i0, j0), whose sums are `sum`. `direct`: they
// stand in C, alpha and beta done.
void finish(const Product& x, float* sum, int64_t ld, int64_t i0, int64_t j0, int64_t rows, int64_t columns, bool direct);

// Lower triangle of H [n,n] += A B of packed panels, k positions each; the upper triangle is left alone. Threads as for
// multiply (hessian.cc).
void add_lower(dc_context* c, const struct Panels& kernel, float* h, int64_t ldh, int64_t n, const void* a, const void* b, int64_t k);

// C [m,n] = alpha op(A) op(B) + beta C; row-major, leading dimensions in elements. op(A) [m,k] is A or, with
// transpose_a, the transpose of A [k,m]; likewise B [k,n]. With beta 0, C is written without being read.
// Not `exact`: as Product::split. Splits the work over the context's threads: not to be called from inside parallel_for.
void sgemm_into(dc_context* c, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                bool transpose_a, const float* b, int64_t ldb, bool transpose_b, float beta, float* out, int64_t ldc,
                bool exact = false);

// Memory that a thread keeps between calls; contents undefined.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  float* take(size_t floats);

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace dc
