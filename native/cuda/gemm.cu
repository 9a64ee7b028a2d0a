// gemm through cuBLAS on any row-major or transposed views; grouped_gemm over experts with our own tensor-core kernel.
#include <mma.h>

#include "cuda.cuh"

namespace dc {
namespace {

template <class T, bool ADD>
__global__ void put_bias(T* C, int64_t row, int64_t column, int64_t batch_stride, dc_tensor bias, int64_t M, int64_t N, int64_t batch) {
  const int64_t n = batch * M * N;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t b = i / (M * N), r = i / N % M, j = i % N;
    T& y = C[b * batch_stride + r * row + j * column];
    y = from_float<T>((ADD ? to_float(y) : 0.f) + load(bias.data, bias.dtype, j * bias.stride[0]));
  }
}

int cuda_type(int dtype) { return dtype == DC_F32 ? CUDA_R_32 : dtype == DC_BF16 ? CUDA_R_BF16 : CUDA_R_16; }

struct Operand {
  const void* data;
  int trans;  // as cuBLAS sees the row-major memory read column by column
  int64_t ld, batch;
  int dtype;
};

// View [rows, columns] at dims d, d+1. cuBLAS reads memory by columns, so a row-major matrix is its own transpose.
bool describe(const dc_tensor& t, int d, Operand* out) {
  const int64_t row = t.stride[d], column = t.stride[d + 1];
  if (column == 1 || t.dim[d + 1] == 1) {
    out->trans = CUBLAS_N;
    out->ld = t.dim[d] == 1 ? (t.dim[d + 1] > row ? t.dim[d + 1] : row) : row;
    if (column != 1 && t.dim[d] != 1 && row == 1) return false;
  } else if (row == 1 || t.dim[d] == 1) {
    out->trans = CUBLAS_T;
    out->ld = column;
  } else {
    return false;
  }
  out->data = t.data;
  out->dtype = t.dtype;
  out->batch = d == 1 ? t.stride[0] : 0;
  return out->ld >= (out->trans == CUBLAS_N ? t.dim[d + 1] : t.dim[d]);
}

// A dense copy of `t` as `dtype` in work memory.
int dense_copy(dc_context* c, const dc_tensor& t, int dtype, int slot, dc_tensor* out) {
  void* memory = scratch(c, slot, size_t(count(t)) * dtype_size(dtype) + 16);
  if (!memory) return 1;
  *out = t;
  out->data = memory;
  out->dtype = dtype;
  int64_t step = 1;
  for (int d = 3; d >= 0; d--) {
    out->stride[d] = step;
    step *= t.dim[d];
  }
  return copy(c, *out, t);
}

}  // namespace

namespace {
// Columns k0..k0 + width of A [M, K] as [high | low | high], rows of B [K, N] as high above high above low, in bf16.
__global__ void split_left(bf16* out, dc_tensor A, int64_t k0, int64_t width, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t r = i / width, j = i % width;
    const float v = static_cast<const float*>(A.data)[r * A.stride[0] + (k0 + j) * A.stride[1]];
    const bf16 high = from_float<bf16>(v), low = from_float<bf16>(v - to_float(high));
    bf16* p = out + r * 3 * width + j;
    p[0] = high, p[width] = low, p[2 * width] = high;
  }
}
// The same where A's columns lie together.
__global__ void __launch_bounds__(256) split_columns(bf16* out, dc_tensor A, int64_t k0, int64_t width) {
  __shared__ float tile[32][33];
  const int64_t M = A.dim[0], r0 = blockIdx.y * 32ll, j0 = blockIdx.x * 32ll;
  for (int k = threadIdx.y; k < 32; k += 8)
    if (j0 + k < width && r0 + threadIdx.x < M) tile[k][threadIdx.x] = static_cast<const float*>(A.data)[r0 + threadIdx.x + (k0 + j0 + k) * A.stride[1]];
  __syncthreads();
  for (int k = threadIdx.y; k < 32; k += 8) {
    if (r0 + k >= M || j0 + threadIdx.x >= width) continue;
    const float v = tile[threadIdx.x][k];
    const bf16 high = from_float<bf16>(v), low = from_float<bf16>(v - to_float(high));
    bf16* p = out + (r0 + k) * 3 * width + j0 + threadIdx.x;
    p[0] = high, p[width] = low, p[2 * width] = high;
  }
}
__global__ void split_right(bf16* out, dc_tensor B, int64_t k0, int64_t n, int64_t N) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const float v = static_cast<const float*>(B.data)[(k0 + i / N) * B.stride[0] + i % N * B.stride[1]];
    const bf16 high = from_float<bf16>(v), low = from_float<bf16>(v - to_float(high));
    out[i] = high, out[n + i] = high, out[2 * n + i] = low;
  }
}
}  // namespace

int gemm(dc_context* c, const dc_tensor& C, const dc_tensor& A, const dc_tensor& B, double alpha, double beta, int precision) {
  const int d = C.rank == 3 ? 1 : 0;
  const int64_t batch = d ? C.dim[0] : 1, M = C.dim[d], N = C.dim[d + 1], K = A.dim[d + 1];
  if (batch * M * N == 0) return 0;
  if (precision == 2 && d == 0 && A.dtype == DC_F32 && B.dtype == DC_F32 && C.dtype == DC_F32 && K >= 256 && M >= 64 && N >= 64) {
    for (int64_t k0 = 0; k0 < K; k0 += 2048) {
      const int64_t width = K - k0 < 2048 ? K - k0 : 2048;
      auto* left = static_cast<bf16*>(scratch(c, 0, size_t(M) * 3 * width * 2));
      auto* right = static_cast<bf16*>(scratch(c, 1, size_t(N) * 3 * width * 2));
      if (!left || !right) return 1;
      if (A.stride[0] == 1 && A.stride[1] != 1 && ceil_div(M, 32) < 65536) split_columns<<<dim3(unsigned(ceil_div(width, 32)), unsigned(ceil_div(M, 32))), dim3(32, 8), 0, c->stream>>>(left, A, k0, width);
      else split_left<<<grid_for(c, M * width, 256), 256, 0, c->stream>>>(left, A, k0, width, M * width);
      split_right<<<grid_for(c, N * width, 256), 256, 0, c->stream>>>(right, B, k0, N * width, N);
      if (gemm(c, C, matrix(left, DC_BF16, M, 3 * width, 3 * width), matrix(right, DC_BF16, 3 * width, N, N), alpha, k0 == 0 ? beta : 1, 0)) return 1;
    }
    return launched(c, "gemm");
  }
  if (C.stride[d + 1] != 1 && N > 1 && (C.stride[d] == 1 || M == 1)) {  // columns of stride 1: C' = B' A'
    auto turned = [d](dc_tensor t) {
      const int64_t dim = t.dim[d], stride = t.stride[d];
      t.dim[d] = t.dim[d + 1], t.stride[d] = t.stride[d + 1];
      t.dim[d + 1] = dim, t.stride[d + 1] = stride;
      return t;
    };
    dc_tensor turned_c = turned(C);
    turned_c.stride[d + 1] = 1;
    return gemm(c, turned_c, turned(B), turned(A), alpha, beta, precision);
  }
  if (K == 0) return beta == 0 ? zero(c, C) : beta == 1 ? 0 : fail(c, "gemm: empty products with beta %g", beta);
  // Both operands in one type: the wider of the two when they differ.
  dc_tensor a = A, b = B;
  const int common = A.dtype == B.dtype ? A.dtype : DC_F32;
  Operand oa, ob, oc;
  if (a.dtype != common || !describe(a, d, &oa)) {
    if (dense_copy(c, A, common, 0, &a)) return 1;
    describe(a, d, &oa);
  }
  if (b.dtype != common || !describe(b, d, &ob)) {
    if (dense_copy(c, B, common, 1, &b)) return 1;
    describe(b, d, &ob);
  }
  // 16-bit inputs write fp32 or their own type; anything else, and C without a stride of 1, passes through fp32.
  dc_tensor wide = C;
  const bool direct = (C.dtype == DC_F32 || C.dtype == common) && describe(C, d, &oc) && oc.trans == CUBLAS_N;
  if (!direct) {
    if (beta != 0) {
      if (dense_copy(c, C, DC_F32, 2, &wide)) return 1;
    } else {
      wide.data = scratch(c, 2, size_t(batch) * M * N * 4);
      if (!wide.data) return 1;
      wide.dtype = DC_F32;
      wide.stride[d + 1] = 1, wide.stride[d] = N, wide.stride[0] = d ? M * N : N;
    }
    describe(wide, d, &oc);
  }
  if (M > INT32_MAX || N > INT32_MAX || K > INT32_MAX || oa.ld > INT32_MAX || ob.ld > INT32_MAX || oc.ld > INT32_MAX)
    return fail(c, "gemm: a dimension exceeds 2^31");
  const float af = float(alpha), bf = float(beta);
  const int compute = common == DC_F32 && precision == 1 ? COMPUTE_32F_FAST_TF32 : COMPUTE_32F;
  // Column-major: C' [N, M] = B' [N, K] A' [K, M].
  const int status = c->libraries->cublasGemmStridedBatchedEx(
      c->blas, ob.trans, oa.trans, int(N), int(M), int(K), &af, ob.data, cuda_type(common), int(ob.ld), ob.batch, oa.data,
      cuda_type(common), int(oa.ld), oa.batch, &bf, wide.data, cuda_type(wide.dtype), int(oc.ld), oc.batch, int(batch), compute, -1);
  if (status != 0) return fail(c, "cuBLAS gemm [%lld x %lld x %lld] failed with status %d", (long long)M, (long long)N, (long long)K, status);
  return direct ? 0 : copy(c, C, wide);
}

namespace {

// --- grouped gemm ---------------------------------------------------------------------------------------------------
// One block computes a 128 x 128 tile of C for one expert; tiles are numbered through all experts by row tiles. bf16
// (or f16) operands on tensor cores, fp32 sums; fp32 operands multiply in fp32 on CUDA cores in `grouped_plain`.

constexpr int TM = 128, TN = 128, TK = 32, PAD = 8;

template <class T>
__global__ void __launch_bounds__(256) grouped_tiles(void* C, int c_dtype, int64_t c_row, const T* __restrict__ A, int64_t a_row,
                                                     const T* __restrict__ B, int64_t b_expert, int64_t b_row,
                                                     const int32_t* __restrict__ offsets, int experts, int64_t N, int64_t K) {
  // The expert of this row tile.
  int e = 0, tile = blockIdx.y;
  int64_t begin = 0, end = 0;
  for (; e < experts; e++) {
    begin = offsets[e], end = offsets[e + 1];
    const int tiles = int((end - begin + TM - 1) / TM);
    if (tile < tiles) break;
    tile -= tiles;
  }
  if (e == experts) return;
  const int64_t row0 = begin + int64_t(tile) * TM, col0 = int64_t(blockIdx.x) * TN;
  __shared__ __align__(16) T As[2][TM][TK + PAD];
  __shared__ __align__(16) T Bs[2][TN][TK + PAD];
  const T* Be = B + e * b_expert;
  using namespace nvcuda;
  const int warp = threadIdx.x >> 5, wm = warp & 1, wn = warp >> 1;  // 2 x 4 warps, each 64 x 32
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> acc[4][2];
#pragma unroll
  for (auto& row : acc)
#pragma unroll
    for (auto& f : row) wmma::fill_fragment(f, 0.f);
  // 128 x 32 of 16-bit values = 512 pieces of 16 bytes: two a thread and operand.
  const bool vector = K % 8 == 0 && a_row % 8 == 0 && b_row % 8 == 0 && b_expert % 8 == 0 &&
                      (reinterpret_cast<uintptr_t>(A) | reinterpret_cast<uintptr_t>(B)) % 16 == 0;
  uint4 ra[2], rb[2];
  auto fetch = [&](int64_t k0) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int piece = threadIdx.x + j * 256, r = piece >> 2, k = (piece & 3) * 8;
      auto get = [&](const T* base, int64_t row, int64_t rows, int64_t stride) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (row >= rows || k0 + k >= K) return v;
        const T* p = base + row * stride + k0 + k;
        if (vector) return *reinterpret_cast<const uint4*>(p);
        T* out = reinterpret_cast<T*>(&v);
#pragma unroll
        for (int i = 0; i < 8; i++)
          if (k0 + k + i < K) out[i] = p[i];
        return v;
      };
      ra[j] = get(A, row0 + r, end, a_row);
      rb[j] = get(Be, col0 + r, N, b_row);
    }
  };
  auto put = [&](int s) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int piece = threadIdx.x + j * 256, r = piece >> 2, k = (piece & 3) * 8;
      *reinterpret_cast<uint4*>(&As[s][r][k]) = ra[j];
      *reinterpret_cast<uint4*>(&Bs[s][r][k]) = rb[j];
    }
  };
  fetch(0);
  put(0);
  __syncthreads();
  int s = 0;
  for (int64_t k0 = 0; k0 < K; k0 += TK, s ^= 1) {
    const bool more = k0 + TK < K;
    if (more) fetch(k0 + TK);
#pragma unroll
    for (int kk = 0; kk < TK; kk += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> fa[4];
      wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> fb[2];
#pragma unroll
      for (int i = 0; i < 4; i++) wmma::load_matrix_sync(fa[i], &As[s][wm * 64 + i * 16][kk], TK + PAD);
#pragma unroll
      for (int j = 0; j < 2; j++) wmma::load_matrix_sync(fb[j], &Bs[s][wn * 32 + j * 16][kk], TK + PAD);
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) wmma::mma_sync(acc[i][j], fa[i], fb[j], acc[i][j]);
    }
    if (more) put(s ^ 1);
    __syncthreads();
  }
  // Out through shared memory, one 16 x 16 fragment a warp at a time.
  float* patch = reinterpret_cast<float*>(As) + warp * 256;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      wmma::store_matrix_sync(patch, acc[i][j], 16, wmma::mem_row_major);
      __syncwarp();
      for (int q = threadIdx.x & 31; q < 256; q += 32) {
        const int64_t r = row0 + wm * 64 + i * 16 + q / 16, n = col0 + wn * 32 + j * 16 + q % 16;
        if (r < end && n < N) store(C, c_dtype, r * c_row + n, patch[q]);
      }
      __syncwarp();
    }
}

// 64 x 64 tiles in fp32, 4 x 4 a thread; also for mixed types.
__global__ void __launch_bounds__(256) grouped_plain(dc_tensor C, dc_tensor A, dc_tensor B, const int32_t* offsets, int experts) {
  int e = 0, tile = blockIdx.y;
  int64_t begin = 0, end = 0;
  for (; e < experts; e++) {
    begin = offsets[e], end = offsets[e + 1];
    const int tiles = int((end - begin + 63) / 64);
    if (tile < tiles) break;
    tile -= tiles;
  }
  if (e == experts) return;
  __shared__ float As[32][65], Bs[32][65];
  const int64_t row0 = begin + tile * 64ll, col0 = blockIdx.x * 64ll, K = A.dim[1], N = B.dim[1];
  const int x = threadIdx.x & 15, y = threadIdx.x >> 4;
  float sum[4][4] = {};
  for (int64_t k0 = 0; k0 < K; k0 += 32) {
#pragma unroll
    for (int i = threadIdx.x; i < 64 * 32; i += 256) {
      const int r = i >> 5, k = i & 31;
      As[k][r] = row0 + r < end && k0 + k < K ? load(A.data, A.dtype, (row0 + r) * A.stride[0] + (k0 + k) * A.stride[1]) : 0.f;
      Bs[k][r] = col0 + r < N && k0 + k < K ? load(B.data, B.dtype, e * B.stride[0] + (col0 + r) * B.stride[1] + (k0 + k) * B.stride[2]) : 0.f;
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < 32; k++)
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] += As[k][y + 16 * i] * Bs[k][x + 16 * j];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int64_t r = row0 + y + 16 * i, n = col0 + x + 16 * j;
      if (r < end && n < N) store(C.data, C.dtype, r * C.stride[0] + n * C.stride[1], sum[i][j]);
    }
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_gemm(dc_context* c, const dc_call* call) {
  const dc_tensor &C = call->t[0], &A = call->t[1], &B = call->t[2], &bias = call->t[3];
  const double beta = call->f[1];
  const bool biased = present(bias) && count(C) != 0;
  const int d = C.rank == 3 ? 1 : 0, blocks = grid_for(c, count(C), 256);
  const int64_t batch_stride = d ? C.stride[0] : 0, batch = d ? C.dim[0] : 1;
  // The product is added to what C holds before it is rounded; a bias added behind it would be rounded twice.
  if (biased && beta == 0) {
    DC_FLOAT(C.dtype, T, put_bias<T, false><<<blocks, 256, 0, c->stream>>>(data<T>(C), C.stride[d], C.stride[d + 1], batch_stride, bias, C.dim[d], C.dim[d + 1], batch));
    if (launched(c, "gemm bias")) return 1;
  }
  if (gemm(c, C, A, B, call->f[0], biased && beta == 0 ? 1 : beta, int(call->i[0]))) return 1;
  if (!biased || beta == 0) return 0;
  DC_FLOAT(C.dtype, T, put_bias<T, true><<<blocks, 256, 0, c->stream>>>(data<T>(C), C.stride[d], C.stride[d + 1], batch_stride, bias, C.dim[d], C.dim[d + 1], batch));
  return launched(c, "gemm bias");
}

extern "C" int dc_cuda_grouped_gemm(dc_context* c, const dc_call* call) {
  const dc_tensor &C = call->t[0], &A = call->t[1], &B = call->t[2], &offsets = call->t[3];
  const int experts = int(B.dim[0]);
  const int64_t T = A.dim[0], N = B.dim[1], K = A.dim[1];
  if (T * N == 0) return 0;
  const bool tiles = A.dtype == B.dtype && A.dtype != DC_F32 && A.stride[1] == 1 && B.stride[2] == 1 && C.stride[1] == 1;
  if (tiles) {
    // An upper bound of the row tiles: the offsets are known on the device only.
    const dim3 grid(unsigned(ceil_div(N, TN)), unsigned(T / TM + experts));
    if (A.dtype == DC_BF16)
      grouped_tiles<bf16><<<grid, 256, 0, c->stream>>>(C.data, C.dtype, C.stride[0], data<bf16>(A), A.stride[0], data<bf16>(B), B.stride[0], B.stride[1], data<int32_t>(offsets), experts, N, K);
    else
      grouped_tiles<f16><<<grid, 256, 0, c->stream>>>(C.data, C.dtype, C.stride[0], data<f16>(A), A.stride[0], data<f16>(B), B.stride[0], B.stride[1], data<int32_t>(offsets), experts, N, K);
  } else {
    const dim3 grid(unsigned(ceil_div(N, 64)), unsigned(T / 64 + experts));
    grouped_plain<<<grid, 256, 0, c->stream>>>(C, A, B, data<int32_t>(offsets), experts);
  }
  return launched(c, "grouped_gemm");
}
