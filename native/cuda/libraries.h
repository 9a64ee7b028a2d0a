// NVIDIA's libraries, found at run time. Only what is called is declared here: no headers of theirs are needed to build.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#include <string>

namespace dc {

enum { CUBLAS_N = 0, CUBLAS_T = 1 };
enum { CUDA_R_32 = 0, CUDA_R_16 = 2, CUDA_R_BF16 = 14 };  // cudaDataType
enum { COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77 };    // cublasComputeType_t

struct Libraries {
  int (*cublasCreate)(void** handle) = nullptr;
  int (*cublasDestroy)(void* handle) = nullptr;
  int (*cublasSetStream)(void* handle, cudaStream_t) = nullptr;
  int (*cublasSetWorkspace)(void* handle, void* memory, size_t bytes) = nullptr;
  int (*cublasGemmStridedBatchedEx)(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a,
                                    int type_a, int lda, long long stride_a, const void* b, int type_b, int ldb,
                                    long long stride_b, const void* beta, void* c, int type_c, int ldc,
                                    long long stride_c, int batch, int compute, int algorithm) = nullptr;

  std::string cublas_path, error;
};

// Finds the library once; on failure `error` says what was tried.
Libraries* find_libraries();

enum { NCCL_FLOAT32 = 7, NCCL_BFLOAT16 = 9 };  // ncclDataType_t
enum { NCCL_SUM = 0 };                         // ncclRedOp_t

// NCCL 2: needed for several GPUs only, and looked for when they are joined.
struct Nccl {
  const char* (*getErrorString)(int result) = nullptr;
  int (*commInitAll)(void** comms, int n, const int* devices) = nullptr;
  int (*commDestroy)(void* comm) = nullptr;
  int (*groupStart)() = nullptr;
  int (*groupEnd)() = nullptr;
  int (*allReduce)(const void* send, void* receive, size_t count, int type, int op, void* comm, cudaStream_t) = nullptr;
  int (*reduceScatter)(const void* send, void* receive, size_t receive_count, int type, int op, void* comm, cudaStream_t) = nullptr;
  int (*allGather)(const void* send, void* receive, size_t send_count, int type, void* comm, cudaStream_t) = nullptr;
  int (*reduce)(const void* send, void* receive, size_t count, int type, int op, int root, void* comm, cudaStream_t) = nullptr;
  int (*broadcast)(const void* send, void* receive, size_t count, int type, int root, void* comm, cudaStream_t) = nullptr;

  std::string path, error;
};
Nccl* find_nccl();
const std::string& nccl_path();  // empty: not looked for yet, or not found

}  // namespace dc
