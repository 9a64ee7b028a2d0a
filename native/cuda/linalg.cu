// Hessians, blocked Cholesky (both orientations, batched), solves.
#include "cuda.cuh"

namespace dc {
namespace {

__global__ void mirror(float* H, int64_t K, int64_t row, int64_t batch_stride) {
  __shared__ float tile[32][33];
  if (blockIdx.x > blockIdx.y) return;  // blockIdx.y = row tile of the lower triangle
  float* h = H + blockIdx.z * batch_stride;
  const int64_t r0 = blockIdx.y * 32ll, c0 = blockIdx.x * 32ll;
  for (int k = threadIdx.y; k < 32; k += 8)
    if (r0 + k < K && c0 + threadIdx.x < K) tile[k][threadIdx.x] = h[(r0 + k) * row + c0 + threadIdx.x];
  __syncthreads();
  for (int k = threadIdx.y; k < 32; k += 8) {
    const int64_t r = c0 + k, q = r0 + threadIdx.x;  // upper element (r, q) = lower (q, r)
    if (r < K && q < K && q > r) h[r * row + q] = tile[threadIdx.x][k];
  }
}

// X (row_weight sqrt applied) for one expert or all rows, dense, in X's own dtype (weights: fp32).
__global__ void weigh_rows(float* out, dc_tensor X, const float* weight, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t r = i / X.dim[1], k = i % X.dim[1];
    out[i] = weight[r] * load(X.data, X.dtype, r * X.stride[0] + k * X.stride[1]);
  }
}

// H (lower triangle) += alpha A' B for row-major A, B [T, K]; panels of columns skip the triangle above.
int triangle_add(dc_context* c, float* H, int64_t row, int64_t K, const dc_tensor& A, const dc_tensor& B, double alpha) {
  const int64_t panel = K <= 2048 ? K : (K / 4 + 127) / 128 * 128;
  for (int64_t c0 = 0; c0 < K; c0 += panel) {
    const int64_t width = K - c0 < panel ? K - c0 : panel;
    // rows c0..K of H, columns c0..c0 + width
    dc_tensor C = matrix(H + c0 * row + c0, DC_F32, K - c0, width, row);
    dc_tensor a = A, b = B;
    a.data = static_cast<char*>(A.data) + c0 * A.stride[1] * dtype_size(A.dtype);
    b.data = static_cast<char*>(B.data) + c0 * B.stride[1] * dtype_size(B.dtype);
    a.dim[0] = K - c0, a.dim[1] = A.dim[0], a.stride[0] = A.stride[1], a.stride[1] = A.stride[0];  // A' [K - c0, T]
    b.dim[0] = B.dim[0], b.dim[1] = width;
    if (gemm(c, C, a, b, alpha, 1, 0)) return 1;
  }
  return 0;
}

// Batched experts: one block per 64 x 64 tile of an expert's lower triangle, fp32 on CUDA cores for fp32 inputs, else
// products of 16-bit values in fp32 (exact) summed in fp32.
__global__ void __launch_bounds__(256) expert_hessians(float* H, int64_t batch_stride, int64_t row, dc_tensor X, const int32_t* offsets, const float* weight, float alpha) {
  const int e = blockIdx.z;
  const int64_t begin = offsets[e], end = offsets[e + 1], K = X.dim[1];
  // blockIdx.x numbers the tiles of the lower triangle
  int ti = int((sqrtf(8.f * blockIdx.x + 1.f) - 1.f) / 2.f);
  while ((ti + 1) * (ti + 2) / 2 <= int(blockIdx.x)) ti++;
  while (ti * (ti + 1) / 2 > int(blockIdx.x)) ti--;
  const int64_t r0 = ti * 64ll, c0 = (int(blockIdx.x) - ti * (ti + 1) / 2) * 64ll;
  if (begin == end) return;
  __shared__ float a[32][65], b[32][65];
  float sum[4][4] = {};
  const int x = threadIdx.x & 15, y = threadIdx.x >> 4;
  for (int64_t t0 = begin; t0 < end; t0 += 32) {
    for (int i = threadIdx.x; i < 32 * 64; i += 256) {
      const int t = i >> 6, k = i & 63;
      const bool in = t0 + t < end;
      const float g = in ? (weight ? weight[t0 + t] : 1.f) : 0.f;
      a[t][k] = in && r0 + k < K ? g * load(X.data, X.dtype, (t0 + t) * X.stride[0] + (r0 + k) * X.stride[1]) : 0.f;
      b[t][k] = in && c0 + k < K ? load(X.data, X.dtype, (t0 + t) * X.stride[0] + (c0 + k) * X.stride[1]) : 0.f;
    }
    __syncthreads();
#pragma unroll 8
    for (int t = 0; t < 32; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] += a[t][y + 16 * i] * b[t][x + 16 * j];
    __syncthreads();
  }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) {
      const int64_t r = r0 + y + 16 * i, q = c0 + x + 16 * j;
      if (r < K && q <= r) H[e * batch_stride + r * row + q] += alpha * sum[i][j];
    }
}

// --- Cholesky ---------------------------------------------------------------------------------------------------------
// Everything is a lower factorisation in row-major storage. The reversed factor (A = F F', F upper) is the lower one of
// the matrix with rows and columns in reverse order, reversed back.

constexpr int NB = 64;

__global__ void load_damped(float* L, const float* H, int64_t K, int64_t row, int64_t batch_stride, const float* damp, bool reversed) {
  const int64_t n = K * K, e = blockIdx.y;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t r = i / K, q = i % K;
    float v = 0;
    if (q <= r) {
      // reversed: element (K-1-r, K-1-q) lies in the upper triangle, so its mirror (K-1-q, K-1-r) is read
      v = reversed ? H[e * batch_stride + (K - 1 - q) * row + (K - 1 - r)] : H[e * batch_stride + r * row + q];
      if (q == r) v += damp[e];
    }
    L[e * n + i] = v;
  }
}
__global__ void mean_diagonal(float* damp, const float* H, int64_t K, int64_t row, int64_t batch_stride, float factor, int32_t* info) {
  __shared__ float shared[33];
  float sum = 0;
  for (int64_t i = threadIdx.x; i < K; i += blockDim.x) sum += H[blockIdx.x * batch_stride + i * row + i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) damp[blockIdx.x] = factor * sum / float(K), info[blockIdx.x] = 0;
}

// Factors the NB x NB diagonal block and writes the inverse of its factor to `inverse` (for the panel below): every
// elimination step is applied to the block and to the identity beside it.
__global__ void __launch_bounds__(256) factor_diagonal(float* L, int64_t K, int64_t j0, int width, float* inverse, int32_t* info) {
  __shared__ float a[NB][NB + 1], v[NB][NB + 1];
  __shared__ int bad;
  const int64_t e = blockIdx.x;
  float* block = L + e * K * K + j0 * K + j0;
  for (int i = threadIdx.x; i < NB * NB; i += 256) {
    const int r = i / NB, q = i % NB;
    a[r][q] = r < width && q <= r ? block[r * K + q] : r == q ? 1.f : 0.f;
    v[r][q] = r == q ? 1.f : 0.f;
  }
  if (threadIdx.x == 0) bad = 0;
  __syncthreads();
  const int q0 = threadIdx.x & 63, r0 = threadIdx.x >> 6;  // 4 rows at a time, a thread per column
  for (int j = 0; j < NB; j++) {
    const float d = a[j][j];
    const bool good = d > 0 && isfinite(d);
    const float pivot = good ? 1.f / sqrtf(d) : 1.f;
    if (!good && threadIdx.x == 0 && !bad) bad = j + 1;
    // Row j of both sides, scaled: l_jj = sqrt(d), v_j = v_j / l_jj; column j below: l_rj = a_rj / l_jj.
    const float vj = v[j][q0] * pivot, lq = q0 > j ? a[q0][j] * pivot : 0.f;
    __syncthreads();
    for (int r = j + 1 + r0; r < NB; r += 4) {
      const float lr = a[r][j] * pivot;
      if (q0 > j && q0 <= r) a[r][q0] -= lr * lq;
      if (q0 <= j) v[r][q0] -= lr * vj;
    }
    __syncthreads();
    if (r0 == 0) {
      if (q0 > j) a[q0][j] = lq;
      else v[j][q0] = vj;
      if (q0 == j) a[j][j] = good ? d * pivot : 1.f;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < NB * NB; i += 256) {
    const int r = i / NB, q = i % NB;
    if (r < width && q <= r) block[r * K + q] = a[r][q];
    inverse[e * NB * NB + i] = v[r][q];
  }
  if (threadIdx.x == 0 && bad && info[e] == 0 && bad <= width) info[e] = int32_t(j0) + bad;
}

// Panel below the diagonal block: P <- P inverse', one block per 64 rows, in place.
__global__ void __launch_bounds__(256) scale_panel(float* L, int64_t K, int64_t j0, int width, const float* inverse) {
  __shared__ float p[64][NB + 1], v[NB][NB + 1];
  const int64_t e = blockIdx.y, r0 = j0 + width + blockIdx.x * 64ll;
  float* panel = L + e * K * K + r0 * K + j0;
  for (int i = threadIdx.x; i < 64 * NB; i += 256) {
    const int r = i / NB, q = i % NB;
    p[r][q] = r0 + r < K && q < width ? panel[r * K + q] : 0.f;
    v[r][q] = inverse[e * NB * NB + i];
  }
  __syncthreads();
  const int x = threadIdx.x & 15, y = threadIdx.x >> 4;
  float sum[4][4] = {};
#pragma unroll 8
  for (int k = 0; k < NB; k++)
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) sum[i][j] += p[y + 16 * i][k] * v[x + 16 * j][k];
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) {
      const int r = y + 16 * i, q = x + 16 * j;
      if (r0 + r < K && q < width) panel[r * K + q] = sum[i][j];
    }
}

__global__ void store_factor(float* F, int64_t row, int64_t batch_stride, const float* L, int64_t K, bool reversed) {
  const int64_t n = K * K, e = blockIdx.y;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t r = i / K, q = i % K;
    const bool inside = reversed ? q >= r : q <= r;
    F[e * batch_stride + r * row + q] = !inside ? 0.f : reversed ? L[e * n + (K - 1 - r) * K + (K - 1 - q)] : L[e * n + r * K + q];
  }
}

// Columns j0..j0 + width of rows from..K as [high | low | high] and [high | high | low] in bf16.
__global__ void split_panel(bf16* left, bf16* right, const float* L, int64_t K, int64_t j0, int64_t width, int64_t from) {
  const int64_t e = blockIdx.y, m = K - from, n = m * width;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t r = i / width, q = i % width, at = (e * m + r) * 3 * width + q;
    const float v = L[e * K * K + (from + r) * K + j0 + q];
    const bf16 high = from_float<bf16>(v), low = from_float<bf16>(v - to_float(high));
    left[at] = high, left[at + width] = low, left[at + 2 * width] = high;
    right[at] = high, right[at + width] = high, right[at + 2 * width] = low;
  }
}

// The trailing matrix of one step: A22 -= P P' for columns from..to, rows below; P [m, width] at column j0. Wide steps
// multiply in bf16x3 on tensor cores (fp32 accuracy to about 2^-16 of each product), narrow ones in fp32.
int trailing(dc_context* c, float* L, int64_t K, int64_t batch, int64_t j0, int64_t width, int64_t from, int64_t to) {
  const int64_t m = K - from;
  if (m <= 0) return 0;
  bf16 *left = nullptr, *right = nullptr;
  const bool split = width >= 256;
  if (split) {
    const size_t half = size_t(batch) * m * 3 * width * 2;
    left = static_cast<bf16*>(scratch(c, 0, half));
    right = static_cast<bf16*>(scratch(c, 1, half));
    if (!left || !right) return 1;
    split_panel<<<dim3(grid_for(c, m * width, 256), unsigned(batch)), 256, 0, c->stream>>>(left, right, L, K, j0, width, from);
  }
  const int64_t panel = to - from > 2048 ? 2048 : to - from;  // pieces keep the waste in the upper triangle small
  for (int64_t q = from; q < to; q += panel) {
    const int64_t w = to - q < panel ? to - q : panel;
    const dc_tensor C{L + q * K + q, DC_F32, 3, {batch, K - q, w, 1}, {K * K, K, 1, 0}};
    if (split) {
      const dc_tensor A{left + (q - from) * 3 * width, DC_BF16, 3, {batch, K - q, 3 * width, 1}, {m * 3 * width, 3 * width, 1, 0}};
      const dc_tensor B{right + (q - from) * 3 * width, DC_BF16, 3, {batch, 3 * width, w, 1}, {m * 3 * width, 1, 3 * width, 0}};
      if (gemm(c, C, A, B, -1, 1, 0)) return 1;
    } else {
      const dc_tensor A{L + q * K + j0, DC_F32, 3, {batch, K - q, width, 1}, {K * K, K, 1, 0}};
      const dc_tensor B{L + q * K + j0, DC_F32, 3, {batch, width, w, 1}, {K * K, 1, K, 0}};
      if (gemm(c, C, A, B, -1, 1, 0)) return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_hessian_add(dc_context* c, const dc_call* call) {
  const dc_tensor &H = call->t[0], &X = call->t[1], &offsets = call->t[2], &weight = call->t[3];
  const int64_t K = X.dim[1], rows = X.dim[0];
  if (rows == 0 || K == 0) return 0;
  if (present(offsets)) {
    const int64_t tiles = ceil_div(K, 64);
    const dim3 grid(unsigned(tiles * (tiles + 1) / 2), 1, unsigned(H.dim[0]));
    expert_hessians<<<grid, 256, 0, c->stream>>>(data<float>(H), H.stride[0], H.stride[1], X, data<int32_t>(offsets), data<float>(weight), float(call->f[0]));
    return launched(c, "hessian_add");
  }
  // fp32 accumulators live for one call of at most 8,192 rows, then go to H: long sums do not lose their tails.
  for (int64_t t = 0; t < rows; t += 8192) {
    dc_tensor x = X;
    x.dim[0] = rows - t < 8192 ? rows - t : 8192;
    x.data = static_cast<char*>(X.data) + t * X.stride[0] * dtype_size(X.dtype);
    dc_tensor a = x;
    if (present(weight)) {
      float* weighted = static_cast<float*>(scratch(c, 2, size_t(x.dim[0]) * K * 4));
      if (!weighted) return 1;
      weigh_rows<<<grid_for(c, x.dim[0] * K, 256), 256, 0, c->stream>>>(weighted, x, data<float>(weight) + t, x.dim[0] * K);
      a = matrix(weighted, DC_F32, x.dim[0], K, K);
    }
    if (triangle_add(c, data<float>(H), H.stride[0], K, a, x, call->f[0])) return 1;
  }
  return launched(c, "hessian_add");
}

extern "C" int dc_cuda_symmetrize(dc_context* c, const dc_call* call) {
  const dc_tensor& H = call->t[0];
  const int d = H.rank == 3 ? 1 : 0;
  const int64_t K = H.dim[d], tiles = ceil_div(K, 32);
  if (count(H) == 0) return 0;
  mirror<<<dim3(unsigned(tiles), unsigned(tiles), unsigned(d ? H.dim[0] : 1)), dim3(32, 8), 0, c->stream>>>(data<float>(H), K, H.stride[d], d ? H.stride[0] : 0);
  return launched(c, "symmetrize");
}

extern "C" int dc_cuda_cholesky(dc_context* c, const dc_call* call) {
  const dc_tensor &F = call->t[0], &info = call->t[1], &H = call->t[2];
  const int d = H.rank == 3 ? 1 : 0;
  const int64_t K = H.dim[d], batch = d ? H.dim[0] : 1;
  if (count(H) == 0) return 0;
  const bool reversed = call->i[0] == 1;
  // Work space: the factor in reversed order, diagonal inverses, damping.
  const size_t matrix_bytes = size_t(batch) * K * K * 4, inverse_bytes = size_t(batch) * NB * NB * 4;
  char* memory = static_cast<char*>(scratch(c, 2, matrix_bytes + inverse_bytes + size_t(batch) * 4));
  if (!memory) return 1;
  float* L = reinterpret_cast<float*>(memory);
  float* inverse = reinterpret_cast<float*>(memory + matrix_bytes);
  float* damp = reinterpret_cast<float*>(memory + matrix_bytes + inverse_bytes);
  const int64_t h_batch = d ? H.stride[0] : 0;
  mean_diagonal<<<unsigned(batch), 256, 0, c->stream>>>(damp, data<float>(H), K, H.stride[d], h_batch, float(call->f[0]), data<int32_t>(info));
  const dim3 all(grid_for(c, K * K, 256), unsigned(batch));
  load_damped<<<all, 256, 0, c->stream>>>(L, data<float>(H), K, H.stride[d], h_batch, damp, reversed);
  // Two levels: 64-wide steps inside panels of `outer` columns, whose effect on the rest is one big product.
  const int64_t outer = K >= 8192 ? 1024 : K >= 2048 ? 512 : 256;
  for (int64_t p0 = 0; p0 < K; p0 += outer) {
    const int64_t p1 = K - p0 < outer ? K : p0 + outer;
    for (int64_t j = p0; j < p1; j += NB) {
      const int width = int(K - j < NB ? K - j : NB);
      factor_diagonal<<<unsigned(batch), 256, 0, c->stream>>>(L, K, j, width, inverse, data<int32_t>(info));
      const int64_t below = K - j - width;
      if (below > 0) {
        scale_panel<<<dim3(unsigned(ceil_div(below, 64)), unsigned(batch)), 256, 0, c->stream>>>(L, K, j, width, inverse);
        if (j + width < p1 && trailing(c, L, K, batch, j, width, j + width, p1)) return 1;
      }
    }
    if (p1 < K && trailing(c, L, K, batch, p0, p1 - p0, p1, K)) return 1;
  }
  store_factor<<<all, 256, 0, c->stream>>>(data<float>(F), F.stride[d], d ? F.stride[0] : 0, L, K, reversed);
  return launched(c, "cholesky");
}

extern "C" int dc_cuda_cholesky_solve(dc_context* c, const dc_call* call) {
  const dc_tensor &X = call->t[0], &F = call->t[1], &B = call->t[2];
  const int64_t K = F.dim[0], M = B.dim[1];
  if (count(B) == 0) return 0;
  if (X.stride[1] != 1 || F.stride[1] != 1) return fail(c, "cholesky_solve: rows of stride 1 expected");
  if (copy(c, X, B)) return 1;
  const float one = 1;
  // cuBLAS sees X' [M, K] (column-major) and F'. A X = B with A = F F': X' F F' ... from the right.
  const bool upper = call->i[0] == 1;
  const int fill = upper ? FILL_LOWER : FILL_UPPER;  // of F' in column-major
  // Y = F^-1 B  <=>  Y' = B' F^-T: right side, op(F'col) = F' as stored: no transpose.
  int status = c->libraries->cublasStrsm(c->blas, SIDE_RIGHT, fill, CUBLAS_N, 0, int(M), int(K), &one, data<float>(F), int(F.stride[0]), data<float>(X), int(X.stride[0]));
  // X = F^-T Y  <=>  X' = Y' F^-1: transpose of what is stored.
  if (status == 0) status = c->libraries->cublasStrsm(c->blas, SIDE_RIGHT, fill, CUBLAS_T, 0, int(M), int(K), &one, data<float>(F), int(F.stride[0]), data<float>(X), int(X.stride[0]));
  return status == 0 ? 0 : fail(c, "cuBLAS trsm failed with status %d", status);
}
