// OpenBLAS, when the machine has one: found at run time, never needed.
#pragma once
#include <string>

struct dc_blas {
  void (*sgemm)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float* a, int lda,
                const float* b, int ldb, float beta, float* c, int ldc);
  void (*ssyrk)(int order, int uplo, int trans, int n, int k, float alpha, const float* a, int lda, float beta,
                float* c, int ldc);
  void (*strsm)(int order, int side, int uplo, int trans, int diag, int m, int n, float alpha, const float* a, int lda,
                float* b, int ldb);
  int (*spotrf)(int order, char uplo, int n, float* a, int lda);  // LAPACKE; may be NULL
  void (*set_threads)(int);
  std::string path;
};
// The library to use, or NULL: none found, or none whose kernels are as wide as ours. DEEPSEEK_CONVERT_BLAS=none switches the
// search off; =path names a library, which is then used whatever its kernels.
const dc_blas* dc_blas_find(int threads);
std::string dc_blas_describe(const dc_blas*);  // JSON: {"path", "tried": [...], "passedOver": its kernels}
const char* dc_isa();                          // the instruction set in use: "avx512", "avx2", "base" ...
