// NVIDIA's libraries, found at run time. Only what is called is declared here: no headers of theirs are needed to build.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#include <string>
#include <vector>

namespace dc {

enum { CUBLAS_N = 0, CUBLAS_T = 1 };
enum { CUDA_R_32 = 0, CUDA_R_16 = 2, CUDA_R_BF16 = 14 };  // cudaDataType
enum { COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77 };    // cublasComputeType_t
enum { FILL_LOWER = 0, FILL_UPPER = 1 };
enum { SIDE_LEFT = 0, SIDE_RIGHT = 1 };

struct Libraries {
  int (*cublasCreate)(void** handle) = nullptr;
  int (*cublasDestroy)(void* handle) = nullptr;
  int (*cublasSetStream)(void* handle, cudaStream_t) = nullptr;
  int (*cublasSetWorkspace)(void* handle, void* memory, size_t bytes) = nullptr;
  int (*cublasGemmStridedBatchedEx)(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a,
                                    int type_a, int lda, long long stride_a, const void* b, int type_b, int ldb,
                                    long long stride_b, const void* beta, void* c, int type_c, int ldc,
                                    long long stride_c, int batch, int compute, int algorithm) = nullptr;
  int (*cublasStrsm)(void* handle, int side, int fill, int trans, int diagonal, int m, int n, const float* alpha,
                     const float* a, int lda, float* b, int ldb) = nullptr;

  std::string cublas_path, error;
  std::vector<std::string> tried;
};

// Finds the libraries once; on failure `error` says what was tried.
Libraries* find_libraries();

}  // namespace dc
