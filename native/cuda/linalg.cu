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

// H (lower triangle) += alpha X' diag(weight) X. fp32 accumulators live for one call of at most 8,192 rows, then go to H:
// long sums do not lose their tails.
int rows_add(dc_context* c, float* H, int64_t row, const dc_tensor& X, const float* weight, double alpha) {
  const int64_t K = X.dim[1], rows = X.dim[0];
  for (int64_t t = 0; t < rows; t += 8192) {
    dc_tensor x = X;
    x.dim[0] = rows - t < 8192 ? rows - t : 8192;
    x.data = static_cast<char*>(X.data) + t * X.stride[0] * dtype_size(X.dtype);
    dc_tensor a = x;
    if (weight) {
      float* weighted = static_cast<float*>(scratch(c, 2, size_t(x.dim[0]) * K * 4));
      if (!weighted) return 1;
      weigh_rows<<<grid_for(c, x.dim[0] * K, 256), 256, 0, c->stream>>>(weighted, x, weight + t, x.dim[0] * K);
      a = matrix(weighted, DC_F32, x.dim[0], K, K);
    }
    if (triangle_add(c, H, row, K, a, x, alpha)) return 1;
  }
  return 0;
}

// Few rows a expert, or fp32 inputs: one block per 64 x 64 tile of an expert's lower triangle, on CUDA cores, products and
// sums in fp32.
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

constexpr int NB = 128, SUB = 32, NB_PITCH = NB + 4;

// A 32 x 32 tile of L's lower triangle. Reversed: element (K-1-r, K-1-q) lies in H's upper triangle, so its mirror
// (K-1-q, K-1-r) is read, along r.
__global__ void __launch_bounds__(256) load_damped(float* L, const float* H, int64_t K, int64_t row, int64_t batch_stride, const float* damp, bool reversed) {
  __shared__ float tile[32][33];
  const int64_t e = blockIdx.z, r0 = blockIdx.y * 32ll, q0 = blockIdx.x * 32ll;
  const int x = threadIdx.x & 31, y = threadIdx.x >> 5;
  const float* h = H + e * batch_stride;
  if (q0 <= r0) {
    for (int k = y; k < 32; k += 8) {
      const int64_t r = reversed ? r0 + x : r0 + k, q = reversed ? q0 + k : q0 + x;
      if (r < K && q <= r) tile[reversed ? x : k][reversed ? k : x] = reversed ? h[(K - 1 - q) * row + (K - 1 - r)] : h[r * row + q];
    }
    __syncthreads();
  }
  for (int k = y; k < 32; k += 8) {
    const int64_t r = r0 + k, q = q0 + x;
    if (r < K && q < K) L[(e * K + r) * K + q] = q > r ? 0.f : tile[k][x] + (q == r ? damp[e] : 0.f);
  }
}
__global__ void mean_diagonal(float* damp, const float* H, int64_t K, int64_t row, int64_t batch_stride, float factor, int32_t* info) {
  __shared__ float shared[33];
  float sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < K; i += blockDim.x) sum += H[blockIdx.x * batch_stride + i * row + i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) damp[blockIdx.x] = factor == 0 ? 0.f : factor * sum / float(K), info[blockIdx.x] = 0;
}

// Elements first, first + step, ... of a ROWS x NB tile in registers: all asked for before the first is needed.
template <int ROWS, int THREADS>
struct Tile {
  static constexpr int N = ROWS * NB / THREADS;
  float v[N];
  template <class F>
  __device__ void load(F element) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int at = threadIdx.x + i * THREADS;
      v[i] = element(at / NB, at % NB);
    }
  }
  template <class F>
  __device__ void each(F use) const {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int at = threadIdx.x + i * THREADS;
      use(at / NB, at % NB, v[i]);
    }
  }
};

// The 32 x 32 lower factor of `a`, in place, by one warp: lane r holds row r. 0, or 1 + the index of a bad pivot.
__device__ int factor_warp(float (*a)[NB_PITCH], float (*column)[SUB]) {
  const int lane = threadIdx.x & 31;
  float x[SUB];
#pragma unroll
  for (int j = 0; j < SUB; j++) x[j] = a[lane][j];
  float rest = a[lane][lane];  // the diagonal as it stands, of this lane's row alone: the shortest chain from pivot to pivot
  int bad = 0;
#pragma unroll
  for (int j = 0; j < SUB; j++) {
    const float d = __shfl_sync(~0u, rest, j);
    const bool good = d > 0 && isfinite(d);
    if (!good && !bad) bad = j + 1;
    float y = rsqrtf(d);
    y = y * fmaf(-0.5f * d * y, y, 1.5f);
    y = good ? y : 1.f;
    const float t = x[j] * y;
    rest = fmaf(-t, t, rest);
    x[j] = lane == j ? (good ? d * y : 1.f) : t;
    // Column j to everybody through shared memory, two buffers in turn.
    column[j & 1][lane] = t;
    __syncwarp();
#pragma unroll
    for (int q = j + 1 & ~3; q < SUB; q += 4) {
      const float4 c = *reinterpret_cast<const float4*>(&column[j & 1][q]);
      if (q > j) x[q] = fmaf(-t, c.x, x[q]);
      if (q + 1 > j) x[q + 1] = fmaf(-t, c.y, x[q + 1]);
      if (q + 2 > j) x[q + 2] = fmaf(-t, c.z, x[q + 2]);
      if (q + 3 > j) x[q + 3] = fmaf(-t, c.w, x[q + 3]);
    }
  }
#pragma unroll
  for (int j = 0; j < SUB; j++)
    if (j <= lane) a[lane][j] = x[j];
  return bad;
}
// The inverse of that factor by one warp: lane c has its column c. a's upper triangle is not read.
__device__ void invert_warp(float (*v)[NB_PITCH], const float (*a)[NB_PITCH], float reciprocal) {
  const int lane = threadIdx.x & 31;
  float y[SUB];
#pragma unroll
  for (int r = 0; r < SUB; r++) {
    float sum[2] = {r == lane ? 1.f : 0.f, 0.f};
#pragma unroll
    for (int k0 = 0; k0 < r; k0 += 4) {
      const float4 row = *reinterpret_cast<const float4*>(a[r] + k0);
      const float l[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
      for (int k = k0; k < k0 + 4 && k < r; k++) sum[k & 1] = fmaf(-l[k - k0], y[k], sum[k & 1]);
    }
    y[r] = (sum[0] + sum[1]) * __shfl_sync(~0u, reciprocal, r);
    v[r][lane] = y[r];
  }
}
// A row p of 32 columns <- p L^-T, the row in a lane's registers.
__device__ void substitute(float* p, const float (*a)[NB_PITCH], float reciprocal) {
  float x[SUB];
#pragma unroll
  for (int j = 0; j < SUB; j += 4) *reinterpret_cast<float4*>(x + j) = *reinterpret_cast<const float4*>(p + j);
#pragma unroll
  for (int j = 0; j < SUB; j++) {
    float sum = 0;
#pragma unroll
    for (int k0 = 0; k0 < j; k0 += 4) {
      const float4 row = *reinterpret_cast<const float4*>(a[j] + k0);
      const float l[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
      for (int k = k0; k < k0 + 4 && k < j; k++) sum = fmaf(l[k - k0], x[k], sum);
    }
    x[j] = (x[j] - sum) * __shfl_sync(~0u, reciprocal, j);
  }
#pragma unroll
  for (int j = 0; j < SUB; j += 4) *reinterpret_cast<float4*>(p + j) = *reinterpret_cast<const float4*>(x + j);
}

struct FactorMemory {
  float a[NB][NB_PITCH];  // the block, then its factor
  float v[NB][NB_PITCH];  // the factor's inverse
  float t[NB / 2][NB_PITCH / 2];
  float column[2][SUB];
};

// out = sign A B for N x N matrices in shared memory, COUNT such products beside each other `step` apart along the
// diagonal, by 512 threads.
template <int N, int COUNT>
__device__ void small_products(float* out, int out_pitch, int64_t out_step, float sign, const float* A, int a_pitch, int64_t a_step, const float* B, int b_pitch, int64_t b_step) {
  constexpr int PER = 512 / COUNT, EACH = N * N / PER;  // rows of a thread's column
  const int which = threadIdx.x / PER, within = threadIdx.x % PER, c = within % N, r0 = within / N * EACH;
  A += which * a_step, B += which * b_step, out += which * out_step;
  float sum[EACH] = {};
#pragma unroll 2
  for (int k = 0; k < N; k += 4) {
    const float b[4] = {B[k * b_pitch + c], B[(k + 1) * b_pitch + c], B[(k + 2) * b_pitch + c], B[(k + 3) * b_pitch + c]};
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const float4 a = *reinterpret_cast<const float4*>(A + (r0 + i) * a_pitch + k);
      sum[i] = fmaf(a.x, b[0], fmaf(a.y, b[1], fmaf(a.z, b[2], fmaf(a.w, b[3], sum[i]))));
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) out[(r0 + i) * out_pitch + c] = sign * sum[i];
}

// m.v, which holds the inverses of the 32 x 32 blocks on the diagonal of the factor m.a, becomes its whole inverse: that of
// [A 0; C B] is [A^-1 0; -B^-1 C A^-1 B^-1]; from 32 to 64, from 64 to 128.
__device__ void grow_inverse(FactorMemory& m) {
  constexpr int T_PITCH = NB_PITCH / 2, H = NB / 2;
  float *a = &m.a[0][0], *v = &m.v[0][0], *t = &m.t[0][0];
  constexpr int64_t across = int64_t(H) * NB_PITCH + H;
  small_products<SUB, 2>(t, T_PITCH, SUB, 1, a + SUB * NB_PITCH, NB_PITCH, across, v, NB_PITCH, across);
  __syncthreads();
  small_products<SUB, 2>(v + SUB * NB_PITCH, NB_PITCH, across, -1, v + SUB * NB_PITCH + SUB, NB_PITCH, across, t, T_PITCH, SUB);
  __syncthreads();
  small_products<H, 1>(t, T_PITCH, 0, 1, a + H * NB_PITCH, NB_PITCH, 0, v, NB_PITCH, 0);
  __syncthreads();
  small_products<H, 1>(v + H * NB_PITCH, NB_PITCH, 0, -1, v + H * NB_PITCH + H, NB_PITCH, 0, t, T_PITCH, 0);
  __syncthreads();
}

// Factors the NB x NB diagonal block, 32 columns at a time, and writes the transposed inverse of the factor (for the
// panel below): element [k][q] of `inverse` is that of row q, column k.
__global__ void __launch_bounds__(512) factor_diagonal(float* L, int64_t K, int64_t j0, int width, float* inverse, int32_t* info, bool reversed) {
  extern __shared__ __align__(16) unsigned char memory[];
  FactorMemory& m = *reinterpret_cast<FactorMemory*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t e = blockIdx.x;
  float* block = L + e * K * K + j0 * K + j0;
  {
    Tile<NB, 512> tile;
    tile.load([&](int r, int q) { return r < width && q <= r ? block[r * K + q] : r == q ? 1.f : 0.f; });
    tile.each([&](int r, int q, float v) { m.a[r][q] = v, m.v[r][q] = 0; });
  }
  __syncthreads();
#pragma unroll 1
  for (int b = 0; b < NB; b += SUB) {
    auto* corner = reinterpret_cast<float(*)[NB_PITCH]>(&m.a[b][b]);
    if (warp == 0) {
      const int bad = factor_warp(corner, m.column);
      if (lane == 0 && bad && b + bad <= width && info[e] == 0) info[e] = int32_t(reversed ? K - (j0 + b + bad - 1) : j0 + b + bad);
    }
    __syncthreads();
    const float reciprocal = 1.f / corner[lane][lane];
    const int below = NB - b - SUB;
    if (warp < below / SUB) substitute(&m.a[b + SUB + threadIdx.x][b], corner, reciprocal);  // a lane per row
    if (warp == 15) invert_warp(reinterpret_cast<float(*)[NB_PITCH]>(&m.v[b][b]), corner, reciprocal);
    __syncthreads();
    // The rest of the block: a -= P P', a warp per row, a lane per column.
#pragma unroll 1
    for (int q0 = b + SUB; q0 < NB; q0 += SUB) {
      const int q = q0 + lane;
      float p[SUB];
#pragma unroll
      for (int k = 0; k < SUB; k += 4) *reinterpret_cast<float4*>(p + k) = *reinterpret_cast<const float4*>(&m.a[q][b + k]);
#pragma unroll 1
      for (int r = q0 + warp; r < NB; r += 16) {
        float sum[4] = {};
#pragma unroll
        for (int k = 0; k < SUB; k += 4) {
          const float4 x = *reinterpret_cast<const float4*>(&m.a[r][b + k]);
          sum[0] = fmaf(x.x, p[k], sum[0]), sum[1] = fmaf(x.y, p[k + 1], sum[1]), sum[2] = fmaf(x.z, p[k + 2], sum[2]), sum[3] = fmaf(x.w, p[k + 3], sum[3]);
        }
        if (q <= r) m.a[r][q] -= (sum[0] + sum[1]) + (sum[2] + sum[3]);
      }
    }
    __syncthreads();
  }
  grow_inverse(m);
#pragma unroll 4
  for (int i = threadIdx.x; i < NB * NB; i += 512) {
    const int r = i / NB, q = i % NB;
    if (r < width && q <= r) block[r * K + q] = m.a[r][q];
    inverse[e * NB * NB + i] = m.v[q][r];
  }
}

constexpr int PANEL_ROWS = 32;

struct PanelMemory {
  float p[NB][PANEL_ROWS + 4];  // transposed
  float inverse[NB][NB_PITCH];
};

// Panel below the diagonal block: P <- P L^-T, one block per 32 rows, in place.
__global__ void __launch_bounds__(256) scale_panel(float* L, int64_t K, int64_t j0, int width, const float* inverse) {
  extern __shared__ __align__(16) unsigned char memory[];
  PanelMemory& m = *reinterpret_cast<PanelMemory*>(memory);
  const int64_t e = blockIdx.y, r0 = j0 + width + blockIdx.x * int64_t(PANEL_ROWS);
  float* panel = L + e * K * K + r0 * K + j0;
  {
    Tile<NB, 256> factor;
    Tile<PANEL_ROWS, 256> rows;
    rows.load([&](int r, int q) { return r0 + r < K && q < width ? panel[r * K + q] : 0.f; });
    factor.load([&](int k, int q) { return inverse[e * NB * NB + k * NB + q]; });
    rows.each([&](int r, int q, float v) { m.p[q][r] = v; });
    factor.each([&](int k, int q, float v) { m.inverse[k][q] = v; });
  }
  __syncthreads();
  const int x = threadIdx.x % 32 * 4, y = threadIdx.x / 32 * 4;  // four columns of four rows
  float sum[4][4] = {};
#pragma unroll 4
  for (int k = 0; k < NB; k++) {
    const float4 f = *reinterpret_cast<const float4*>(&m.inverse[k][x]), p = *reinterpret_cast<const float4*>(&m.p[k][y]);
    const float left[4] = {p.x, p.y, p.z, p.w}, right[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (r0 + y + i < K && x + j < width) panel[(y + i) * K + x + j] = sum[i][j];
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
  const bool split = width >= 256 || (width >= 128 && m * (to - from) >= (1 << 20));
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

// --- Triangular solves ------------------------------------------------------------------------------------------------
// Diagonal blocks of up to SOLVE columns are inverted once; everything else is products.

constexpr int SOLVE = 512;

// A lower triangular matrix of any strides.
struct Lower {
  float* data;
  int64_t K, row, column;
  dc_tensor part(int64_t r, int64_t q, int64_t rows, int64_t columns) const { return matrix(data + r * row + q * column, DC_F32, rows, columns, row, column); }
  // The same part read as its transpose.
  dc_tensor turned(int64_t r, int64_t q, int64_t rows, int64_t columns) const { return matrix(data + r * row + q * column, DC_F32, columns, rows, column, row); }
};

// Inverses of the NB x NB blocks on L's diagonal, each to its place in the `size` x `size` block it lies in.
__global__ void __launch_bounds__(512) invert_diagonal(float* V, int64_t size, Lower L) {
  extern __shared__ __align__(16) unsigned char memory[];
  FactorMemory& m = *reinterpret_cast<FactorMemory*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t j0 = blockIdx.x * int64_t(NB), width = L.K - j0 < NB ? L.K - j0 : NB;
  const bool turned = L.column != 1;  // then rows of memory are columns of L
  {
    Tile<NB, 512> tile;
    tile.load([&](int y, int x) {
      const int r = turned ? x : y, q = turned ? y : x;
      return r < width && q <= r ? L.data[(j0 + r) * L.row + (j0 + q) * L.column] : r == q ? 1.f : 0.f;
    });
    tile.each([&](int y, int x, float v) { (turned ? m.a[x][y] : m.a[y][x]) = v, m.v[y][x] = 0; });
  }
  __syncthreads();
  if (warp < NB / SUB) {
    const int b = warp * SUB;
    auto* corner = reinterpret_cast<float(*)[NB_PITCH]>(&m.a[b][b]);
    invert_warp(reinterpret_cast<float(*)[NB_PITCH]>(&m.v[b][b]), corner, 1.f / corner[lane][lane]);
  }
  __syncthreads();
  grow_inverse(m);
  float* out = V + j0 / size * size * size + j0 % size * (size + 1);
  for (int i = threadIdx.x; i < NB * NB; i += 512) {
    const int r = i / NB, q = i % NB;
    if (r < width && q <= r) out[r * size + q] = m.v[r][q];
  }
}

// `batch` blocks of V, `step` columns of L apart, whose NB x NB inverses are there: of the first `columns` of each, the rest.
int grow_blocks(dc_context* c, float* V, float* work, int64_t step, const Lower& L, int64_t batch, int64_t columns) {
  for (int64_t h = NB; batch > 0 && h < columns; h *= 2)
    for (int64_t i = 0; i + h < columns; i += 2 * h) {
      const int64_t j = i + h, w = columns - j < h ? columns - j : h;
      const auto block = [&](int64_t r, int64_t q, int64_t rows, int64_t width) { return dc_tensor{V + r * step + q, DC_F32, 3, {batch, rows, width, 1}, {step * step, step, 1, 0}}; };
      const dc_tensor C{L.data + j * L.row + i * L.column, DC_F32, 3, {batch, w, h, 1}, {step * (L.row + L.column), L.row, L.column, 0}};
      const dc_tensor T{work, DC_F32, 3, {batch, w, h, 1}, {w * h, h, 1, 0}};
      if (gemm(c, T, C, block(i, i, h, h), 1, 0, 0) || gemm(c, block(j, i, w, h), block(j, j, w, w), T, -1, 0, 0)) return 1;
    }
  return 0;
}

// X [K, M] <- L^-1 X, or L^-T X where `transposed`; `inverse` holds the inverses of the diagonal blocks, `block` [size, M].
int solve_lower(dc_context* c, const Lower& L, float* inverse, int64_t size, const dc_tensor& X, float* block, bool transposed, int precision) {
  const int64_t M = X.dim[1], blocks = ceil_div(L.K, size);
  const auto rows = [&](int64_t from, int64_t n) { return matrix(data<float>(X) + from * X.stride[0], DC_F32, n, M, X.stride[0]); };
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t b = transposed ? blocks - 1 - i : i, j0 = b * size, w = L.K - j0 < size ? L.K - j0 : size, j1 = j0 + w;
    const dc_tensor solved = matrix(block, DC_F32, w, M, M);
    float* v = inverse + b * size * size;
    if (gemm(c, solved, transposed ? matrix(v, DC_F32, w, w, 1, size) : matrix(v, DC_F32, w, w, size), rows(j0, w), 1, 0, precision)) return 1;
    if (copy(c, rows(j0, w), solved)) return 1;
    if (transposed ? gemm(c, rows(0, j0), L.turned(j0, 0, w, j0), solved, -1, 1, precision) : gemm(c, rows(j1, L.K - j1), L.part(j1, j0, L.K - j1, w), solved, -1, 1, precision)) return 1;
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
  const float* weights = data<float>(weight);
  if (!present(offsets)) return rows_add(c, data<float>(H), H.stride[0], X, weights, call->f[0]) ? 1 : launched(c, "hessian_add");
  const int64_t experts = H.dim[0];
  if (X.dtype == DC_F32 || rows < 32 * experts || K < 128) {
    const int64_t tiles = ceil_div(K, 64);
    const dim3 grid(unsigned(tiles * (tiles + 1) / 2), 1, unsigned(experts));
    expert_hessians<<<grid, 256, 0, c->stream>>>(data<float>(H), H.stride[0], H.stride[1], X, data<int32_t>(offsets), weights, float(call->f[0]));
    return launched(c, "hessian_add");
  }
  // Tensor cores, an expert after the other: the host must know where their rows begin.
  std::string memory(size_t(experts + 1) * 4, 0);
  DC_CUDA(cudaMemcpyAsync(&memory[0], data<int32_t>(offsets), memory.size(), cudaMemcpyDeviceToHost, c->stream));
  DC_CUDA(cudaStreamSynchronize(c->stream));
  const auto* begins = reinterpret_cast<const int32_t*>(memory.data());
  for (int64_t e = 0; e < experts; e++) {
    dc_tensor x = X;
    x.dim[0] = begins[e + 1] - begins[e];
    x.data = static_cast<char*>(X.data) + begins[e] * X.stride[0] * dtype_size(X.dtype);
    if (x.dim[0] > 0 && rows_add(c, data<float>(H) + e * H.stride[0], H.stride[1], x, weights ? weights + begins[e] : nullptr, call->f[0])) return 1;
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
  const unsigned tiles = unsigned(ceil_div(K, 32));
  load_damped<<<dim3(tiles, tiles, unsigned(batch)), 256, 0, c->stream>>>(L, data<float>(H), K, H.stride[d], h_batch, damp, reversed);
  DC_CUDA(cudaFuncSetAttribute(factor_diagonal, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(FactorMemory))));
  DC_CUDA(cudaFuncSetAttribute(scale_panel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(PanelMemory))));
  // Two levels: 128-wide steps inside panels of `outer` columns, whose effect on the rest is one big product.
  const int64_t outer = K >= 8192 ? 1024 : K >= 2048 ? 512 : 256;
  for (int64_t p0 = 0; p0 < K; p0 += outer) {
    const int64_t p1 = K - p0 < outer ? K : p0 + outer;
    for (int64_t j = p0; j < p1; j += NB) {
      const int width = int(K - j < NB ? K - j : NB);
      factor_diagonal<<<unsigned(batch), 512, sizeof(FactorMemory), c->stream>>>(L, K, j, width, inverse, data<int32_t>(info), reversed);
      const int64_t below = K - j - width;
      if (below > 0) {
        scale_panel<<<dim3(unsigned(ceil_div(below, PANEL_ROWS)), unsigned(batch)), 256, sizeof(PanelMemory), c->stream>>>(L, K, j, width, inverse);
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
  const int d = X.rank == 3 ? 1 : 0;
  const int64_t K = X.dim[d], M = X.dim[d + 1], batch = d ? X.dim[0] : 1;
  if (count(B) == 0) return 0;
  if (X.stride[d + 1] != 1 || F.stride[d + 1] != 1) return fail(c, "cholesky_solve: rows of stride 1 expected");
  if (copy(c, X, B)) return 1;
  // The factor, or its transpose, as a lower one.
  const bool upper = call->i[0] == 1;
  int64_t size = NB;
  while (size < SOLVE && size < K) size *= 2;
  const int64_t blocks = ceil_div(K, size), inverse_floats = blocks * size * size, half_floats = blocks * size * size / 4;
  auto* inverse = static_cast<float*>(scratch(c, 2, size_t(inverse_floats + half_floats + size * M) * 4));
  if (!inverse) return 1;
  float *half = inverse + inverse_floats, *block = half + half_floats;
  // A few columns leave tensor cores nothing to win; many are products of three in bf16 (2^-16).
  const int precision = M >= 256 && K >= 1024 ? 2 : 0;
  DC_CUDA(cudaFuncSetAttribute(invert_diagonal, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(FactorMemory))));
  for (int64_t e = 0; e < batch; e++) {
    const int64_t row = F.stride[d];
    const Lower L{data<float>(F) + (d ? e * F.stride[0] : 0), K, upper ? 1 : row, upper ? row : 1};
    const dc_tensor x = matrix(data<float>(X) + (d ? e * X.stride[0] : 0), DC_F32, K, M, X.stride[d]);
    DC_CUDA(cudaMemsetAsync(inverse, 0, size_t(inverse_floats) * 4, c->stream));
    invert_diagonal<<<unsigned(ceil_div(K, NB)), 512, sizeof(FactorMemory), c->stream>>>(inverse, size, L);
    const int64_t full = K / size, at = full * size;
    const Lower rest{L.data + at * (L.row + L.column), K - at, L.row, L.column};
    if (grow_blocks(c, inverse, half, size, L, full, size) || (at < K && grow_blocks(c, inverse + full * size * size, half, size, rest, 1, K - at))) return 1;
    for (const bool transposed : {upper, !upper})
      if (solve_lower(c, L, inverse, size, x, block, transposed, precision)) return 1;
  }
  return launched(c, "cholesky_solve");
}
