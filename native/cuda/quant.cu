// Quantization to integer grids: search of the grids, rounding, the LDLQ sweep.
#include "cuda.cuh"

namespace dc {
namespace {

__device__ __forceinline__ float code_of(float v, float scale, float zero, float low, float high) {
  const float q = rintf(__fadd_rn(__fdiv_rn(v, scale), zero));  // no fused multiply: the CPU rounds twice too
  return q >= low ? (q <= high ? q : high) : low;
}

// A matrix, or one of a batch: element (e, n, j) of a tensor of rank 2 or 3 with rows of stride 1.
struct Rows {
  void* data;
  int dtype;
  int64_t batch, row;
  explicit Rows(const dc_tensor& t)
      : data(t.data), dtype(t.dtype), batch(t.rank == 3 ? t.stride[0] : 0), row(t.rank == 3 ? t.stride[1] : t.stride[0]) {}
  __device__ int64_t at(int64_t e, int64_t n) const { return e * batch + n * row; }
};
struct Grid {
  Rows scale, zero;
  const int32_t* column_group;
  int64_t group;
  float low, high;
  __device__ int64_t group_of(int64_t j) const { return column_group ? column_group[j] : j / group; }
  __device__ float scale_at(int64_t e, int64_t n, int64_t g) const { return static_cast<const float*>(scale.data)[scale.at(e, n) + g]; }
  __device__ float zero_at(int64_t e, int64_t n, int64_t g) const { return zero.data ? static_cast<const float*>(zero.data)[zero.at(e, n) + g] : 0.f; }
};
struct Shape {
  int64_t batch, rows, columns;
  explicit Shape(const dc_tensor& t)
      : batch(t.rank == 3 ? t.dim[0] : 1), rows(t.rank == 3 ? t.dim[1] : t.dim[0]), columns(t.rank == 3 ? t.dim[2] : t.dim[1]) {}
};

__global__ void quantize_rows(Rows codes, Rows W, Grid grid, int64_t columns) {
  const int64_t n = blockIdx.x, e = blockIdx.y;
  for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
    const int64_t g = grid.group_of(j);
    static_cast<int8_t*>(codes.data)[codes.at(e, n) + j] =
        int8_t(code_of(load(W.data, W.dtype, W.at(e, n) + j), grid.scale_at(e, n, g), grid.zero_at(e, n, g), grid.low, grid.high));
  }
}
__global__ void dequantize_rows(Rows W, Rows codes, Grid grid, int64_t columns) {
  const int64_t n = blockIdx.x, e = blockIdx.y;
  for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
    const int64_t g = grid.group_of(j);
    const float code = static_cast<const int8_t*>(codes.data)[codes.at(e, n) + j];
    store(W.data, W.dtype, W.at(e, n) + j, (code - grid.zero_at(e, n, g)) * grid.scale_at(e, n, g));
  }
}

// --- scale search -------------------------------------------------------------------------------------------------
// A warp per row and group; every lane tries its own candidates over all values of the group, which lie in shared
// memory in pieces of 256.

constexpr int PIECE = 256;

__global__ void __launch_bounds__(128) search_scales(Rows scale, Rows zero, Rows W, const float* weight, int64_t weight_batch, int64_t rows, int64_t columns,
                                                     float low, float high, int64_t group, int64_t groups, int points, bool free_sign, float from, float to) {
  __shared__ float values[4][PIECE], weights[4][PIECE];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t item = blockIdx.x * 4ll + warp, e = blockIdx.y;
  if (item >= rows * groups) return;
  const int64_t n = item / groups, g = item % groups, first = g * group, m = columns - first < group ? columns - first : group;
  float *w = values[warp], *h = weights[warp];
  float least = 0, most = 0, energy = 0;
  for (int64_t j = lane; j < m; j += 32) {
    const float v = load(W.data, W.dtype, W.at(e, n) + first + j);
    if (!isfinite(v)) continue;
    least = fminf(least, v);
    most = fmaxf(most, v);
    energy += (weight ? weight[e * weight_batch + first + j] : 1.f) * fabsf(v);
  }
  least = -warp_max(-least);
  most = warp_max(most);
  energy = warp_sum(energy);
  const bool weighted = weight && energy > 0 && isfinite(energy);  // dead or broken channels: by the weights alone
  const bool asymmetric = zero.data != nullptr;
  const float span = asymmetric ? most - least : fmaxf(most, -least) * 2, base = span / (high - low);
  const int sides = asymmetric ? 3 : free_sign ? 2 : 1;
  const float center = asymmetric && base > 0 ? code_of(low - least / base, 1, 0, low, high) : 0;
  float best = INFINITY, best_scale = 1, best_zero = asymmetric ? fminf(fmaxf(0.f, low), high) : 0;
  int best_index = INT32_MAX;
  if (span > 0 && isfinite(base) && base > 0) {
    const int candidates = points * sides;
    for (int c0 = 0; c0 < candidates; c0 += 32) {
      const int index = c0 + lane, i = index / sides, side = index % sides;
      const float s = base * float(points > 1 ? double(from) + (double(to) - double(from)) * i / double(points - 1) : double(from));
      const float signed_s = !asymmetric && side == 1 ? -s : s;
      const float z = asymmetric ? center + float(side == 0 ? 0 : side == 1 ? -1 : 1) : 0;
      const bool valid = index < candidates && (!asymmetric || (z >= low && z <= high));
      const float inverse = 1.f / signed_s;
      float loss = 0;
      for (int64_t p0 = 0; p0 < m; p0 += PIECE) {
        const int64_t n_piece = m - p0 < PIECE ? m - p0 : PIECE;
        __syncwarp();
        for (int64_t j = lane; j < n_piece; j += 32) {
          const float v = load(W.data, W.dtype, W.at(e, n) + first + p0 + j);
          w[j] = isfinite(v) ? v : 0.f;
          h[j] = !isfinite(v) ? 0.f : weighted ? weight[e * weight_batch + first + p0 + j] : 1.f;
        }
        __syncwarp();
        for (int64_t j = 0; j < n_piece; j++) {
          const float code = fminf(fmaxf(rintf(fmaf(w[j], inverse, z)), low), high);
          const float d = w[j] - (code - z) * signed_s;
          loss = fmaf(h[j] * d, d, loss);
        }
      }
      if (valid && loss < best) best = loss, best_scale = signed_s, best_zero = z, best_index = index;
    }
  }
  for (int d = 16; d; d >>= 1) {
    const float other = __shfl_xor_sync(~0u, best, d), s = __shfl_xor_sync(~0u, best_scale, d), z = __shfl_xor_sync(~0u, best_zero, d);
    const int index = __shfl_xor_sync(~0u, best_index, d);
    if (other < best || (other == best && index < best_index)) best = other, best_scale = s, best_zero = z, best_index = index;
  }
  if (lane == 0) {
    static_cast<float*>(scale.data)[scale.at(e, n) + g] = best_scale;
    if (asymmetric) static_cast<float*>(zero.data)[zero.at(e, n) + g] = best_zero;
  }
}

// --- LDLQ -----------------------------------------------------------------------------------------------------------
// v_j = W_j + sum_{i<j} (W_i - Q_i) R_ij / R_jj. Three levels: 16 columns are swept by one thread a row in registers;
// their errors reach the rest of a 128-column block through shared memory; blocks reach their 1,024-column panel, and
// panels the rest of the matrix, by bf16x3 products on tensor cores. `pending` (the sums above) lives in Q, whose
// columns are not needed before their block is swept.

constexpr int BLOCK = 128, MICRO = 16, SWEEP_ROWS = 64, SWEEP_THREADS = 256;

__global__ void __launch_bounds__(SWEEP_THREADS) sweep_block(Rows codes, Rows Q, Rows W, Rows R, Grid grid, float* error, int64_t error_batch, int64_t error_row, bool first, bf16* D, bf16* D_inner,
                                                             int64_t d_batch, int64_t d_row, int64_t d_part, int64_t rows, int64_t j0, int width) {
  extern __shared__ __align__(16) float memory[];
  float(*U)[BLOCK] = reinterpret_cast<float(*)[BLOCK]>(memory);                      // R_ij / R_jj
  float(*x)[BLOCK + 1] = reinterpret_cast<float(*)[BLOCK + 1]>(memory + BLOCK * BLOCK);  // v as it stands
  float* diagonal = memory + BLOCK * BLOCK + SWEEP_ROWS * (BLOCK + 1);
  float(*d)[SWEEP_ROWS] = reinterpret_cast<float(*)[SWEEP_ROWS]>(diagonal + BLOCK);
  int8_t(*code_tile)[BLOCK + 4] = reinterpret_cast<int8_t(*)[BLOCK + 4]>(d + MICRO);
  const int64_t e = blockIdx.y, row0 = blockIdx.x * int64_t(SWEEP_ROWS);
  const float* r = static_cast<const float*>(R.data) + e * R.batch;
  for (int i = threadIdx.x; i < BLOCK; i += SWEEP_THREADS) diagonal[i] = i < width ? r[(j0 + i) * R.row + j0 + i] : 1.f;
  __syncthreads();
  for (int i = threadIdx.x; i < BLOCK * BLOCK; i += SWEEP_THREADS) {
    const int a = i / BLOCK, b = i % BLOCK;
    U[a][b] = a < width && b < width && b > a ? r[(j0 + a) * R.row + j0 + b] / diagonal[b] : 0.f;
  }
  const float* w = static_cast<const float*>(W.data);
  float* q = static_cast<float*>(Q.data);
  for (int i = threadIdx.x; i < SWEEP_ROWS * BLOCK; i += SWEEP_THREADS) {
    const int a = i / BLOCK, b = i % BLOCK;
    x[a][b] = row0 + a < rows && b < width ? w[W.at(e, row0 + a) + j0 + b] + (first ? 0.f : q[Q.at(e, row0 + a) + j0 + b] / diagonal[b]) : 0.f;
  }
  __syncthreads();
  const int local = threadIdx.x % SWEEP_ROWS, part = threadIdx.x / SWEEP_ROWS;  // 4 threads a row for the updates
  const int64_t n = row0 + local;
  float loss = 0;
  for (int k0 = 0; k0 < BLOCK && k0 < width; k0 += MICRO) {
    if (part == 0 && n < rows) {
      // Everything the chain needs is fetched before it starts.
      float v[MICRO], w0[MICRO], s[MICRO], z[MICRO], r0[MICRO];
      const int64_t at = W.at(e, n) + j0 + k0;
      const bool same = grid.column_group == nullptr && grid.group % MICRO == 0;  // j0 and k0 are multiples of MICRO
      const int64_t g0 = same ? (j0 + k0) / grid.group : 0;
#pragma unroll
      for (int k = 0; k < MICRO; k++) {
        const bool in = k0 + k < width;
        const int64_t g = same ? g0 : in ? grid.group_of(j0 + k0 + k) : 0;
        v[k] = x[local][k0 + k];
        w0[k] = in ? w[at + k] : 0.f;
        s[k] = grid.scale_at(e, n, g);
        z[k] = grid.zero_at(e, n, g);
        r0[k] = diagonal[k0 + k];
      }
#pragma unroll
      for (int k = 0; k < MICRO; k++) {
        const float code = code_of(v[k], s[k], z[k], grid.low, grid.high), value = (code - z[k]) * s[k];
        const float difference = k0 + k < width ? w0[k] - value : 0.f;
        const float miss = k0 + k < width ? (v[k] - value) * r0[k] : 0.f;
        loss += miss * miss;
        code_tile[local][k0 + k] = int8_t(code);
        x[local][k0 + k] = value;  // v is not needed any more
        d[k][local] = difference;
#pragma unroll
        for (int i = k + 1; i < MICRO; i++) v[i] = fmaf(difference, U[k0 + k][k0 + i], v[i]);
      }
    }
    __syncthreads();
    float mine[MICRO];
#pragma unroll
    for (int k = 0; k < MICRO; k++) mine[k] = d[k][local];
    for (int j = k0 + MICRO + part * 4; j < BLOCK; j += 4 * SWEEP_THREADS / SWEEP_ROWS) {
      float sum[4];
#pragma unroll
      for (int i = 0; i < 4; i++) sum[i] = x[local][j + i];
#pragma unroll
      for (int k = 0; k < MICRO; k++) {
        const float4 u = *reinterpret_cast<const float4*>(&U[k0 + k][j]);
        sum[0] = fmaf(mine[k], u.x, sum[0]), sum[1] = fmaf(mine[k], u.y, sum[1]), sum[2] = fmaf(mine[k], u.z, sum[2]), sum[3] = fmaf(mine[k], u.w, sum[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) x[local][j + i] = sum[i];
    }
    __syncthreads();
  }
  // Everything out, neighbouring threads to neighbouring memory.
  for (int i = threadIdx.x; i < SWEEP_ROWS * BLOCK; i += SWEEP_THREADS) {
    const int a = i / BLOCK, b = i % BLOCK;
    const int64_t r1 = row0 + a;
    if (r1 >= rows || b >= width) continue;
    const float value = x[a][b];
    static_cast<int8_t*>(codes.data)[codes.at(e, r1) + j0 + b] = code_tile[a][b];
    q[Q.at(e, r1) + j0 + b] = value;
    if (D) {
      const float difference = w[W.at(e, r1) + j0 + b] - value;
      const bf16 high = from_float<bf16>(difference), low = from_float<bf16>(difference - to_float(high));
      bf16* out = D + e * d_batch + r1 * d_row + b;
      out[0] = high, out[d_part] = low, out[2 * d_part] = high;
      bf16* inner = D_inner + (e * rows + r1) * 3 * BLOCK + b;
      inner[0] = high, inner[width] = low, inner[2 * width] = high;
    }
  }
  if (part == 0 && n < rows && error) {
    float* out = error + e * error_batch + n * error_row;
    *out = (j0 == 0 ? 0.f : *out) + loss;
  }
}

// Rows i0..i0 + height of R, columns from..K, as three bf16 parts above each other: high, high, low.
__global__ void split_factor(bf16* out, int64_t out_batch, int64_t columns, Rows R, int64_t i0, int64_t height, int64_t from) {
  const int64_t e = blockIdx.y, n = height * columns;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const float v = static_cast<const float*>(R.data)[e * R.batch + (i0 + i / columns) * R.row + from + i % columns];
    const bf16 high = from_float<bf16>(v), low = from_float<bf16>(v - to_float(high));
    bf16* p = out + e * out_batch + i;
    p[0] = high, p[n] = high, p[2 * n] = low;
  }
}

// --- packing --------------------------------------------------------------------------------------------------------

struct Fields {
  int bits, order;
  __host__ __device__ int64_t per() const { return 32 / bits; }
  __host__ __device__ int64_t words(int64_t n) const { return order == 2 ? (n * bits + 31) / 32 : (n + per() - 1) / per(); }
  __device__ int64_t bit(int64_t i) const {
    if (order == 2) return i * bits;
    const int64_t within = i % per();
    const int place = order == 1 ? int(0x73625140u >> (within * 4) & 15) : int(within);
    return i / per() * 32 + place * bits;
  }
};

__global__ void pack_lines(dc_tensor words, dc_tensor codes, Fields fields, int bias, int axis, int64_t lines, int64_t per_line, int64_t n) {
  const uint32_t mask = (1u << fields.bits) - 1;
  const int64_t total = lines * per_line;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < total; i += int64_t(gridDim.x) * blockDim.x) {
    // neighbouring threads take neighbouring memory: along words for axis 1, along lines for axis 0
    const int64_t line = axis == 1 ? i / per_line : i % lines, word = axis == 1 ? i % per_line : i / lines;
    int64_t begin = fields.order == 2 ? word * 32 / fields.bits : word * fields.per(), end = fields.order == 2 ? (word * 32 + 31) / fields.bits + 1 : begin + fields.per();
    if (end > n) end = n;
    uint32_t value = 0;
    for (int64_t k = begin; k < end; k++) {
      const uint32_t field = uint32_t(static_cast<const int8_t*>(codes.data)[line * codes.stride[1 - axis] + k * codes.stride[axis]] + bias) & mask;
      const int64_t shift = fields.bit(k) - word * 32;
      value |= shift >= 0 ? field << shift : field >> -shift;
    }
    static_cast<uint32_t*>(words.data)[line * words.stride[1 - axis] + word * words.stride[axis]] = value;
  }
}
__global__ void unpack_lines(dc_tensor codes, dc_tensor words, Fields fields, int bias, int axis, int64_t lines, int64_t n) {
  const uint32_t mask = (1u << fields.bits) - 1;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < lines * n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t line = axis == 1 ? i / n : i % lines, k = axis == 1 ? i % n : i / lines;
    const int64_t bit = fields.bit(k), shift = bit % 32;
    const uint32_t* in = static_cast<const uint32_t*>(words.data) + line * words.stride[1 - axis];
    uint32_t field = in[bit / 32 * words.stride[axis]] >> shift;
    if (shift + fields.bits > 32) field |= in[(bit / 32 + 1) * words.stride[axis]] << (32 - shift);
    static_cast<int8_t*>(codes.data)[line * codes.stride[1 - axis] + k * codes.stride[axis]] = int8_t(int(field & mask) - bias);
  }
}

Grid grid_of(const dc_call* call, int scale, int zero, int column_group, int64_t low, int64_t high, int64_t group) {
  return {Rows(call->t[scale]), Rows(call->t[zero]), data<int32_t>(call->t[column_group]), group, float(low), float(high)};
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_scale_search(dc_context* c, const dc_call* call) {
  const dc_tensor &scale = call->t[0], &zero = call->t[1], &W = call->t[2], &weight = call->t[3];
  const Shape shape(W);
  const int64_t group = call->i[2], groups = ceil_div(shape.columns, group);
  if (count(W) == 0) return 0;
  search_scales<<<dim3(unsigned(ceil_div(shape.rows * groups, 4)), unsigned(shape.batch)), 128, 0, c->stream>>>(
      Rows(scale), Rows(zero), Rows(W), data<float>(weight), weight.rank == 2 ? weight.stride[0] : 0, shape.rows, shape.columns, float(call->i[0]), float(call->i[1]), group,
      groups, call->i[3] < 1 ? 1 : int(call->i[3]), call->i[4] != 0, float(call->f[0]), float(call->f[1]));
  return launched(c, "scale_search");
}

extern "C" int dc_cuda_quantize(dc_context* c, const dc_call* call) {
  const Shape shape(call->t[0]);
  if (count(call->t[0]) == 0) return 0;
  quantize_rows<<<dim3(unsigned(shape.rows), unsigned(shape.batch)), 128, 0, c->stream>>>(Rows(call->t[0]), Rows(call->t[1]), grid_of(call, 2, 3, 4, call->i[0], call->i[1], call->i[2]), shape.columns);
  return launched(c, "quantize");
}

extern "C" int dc_cuda_dequantize(dc_context* c, const dc_call* call) {
  const Shape shape(call->t[1]);
  if (count(call->t[1]) == 0) return 0;
  dequantize_rows<<<dim3(unsigned(shape.rows), unsigned(shape.batch)), 128, 0, c->stream>>>(Rows(call->t[0]), Rows(call->t[1]), grid_of(call, 2, 3, 4, 0, 0, call->i[0]), shape.columns);
  return launched(c, "dequantize");
}

extern "C" int dc_cuda_ldlq(dc_context* c, const dc_call* call) {
  const dc_tensor &codes = call->t[0], &Q = call->t[1], &W = call->t[2], &R = call->t[3], &error = call->t[7];
  const Shape shape(W);
  const int64_t K = shape.columns, N = shape.rows, E = shape.batch;
  if (count(W) == 0) return 0;
  for (const dc_tensor* t : {&codes, &Q, &W, &R})
    if (t->stride[t->rank - 1] != 1 && t->dim[t->rank - 1] > 1) return fail(c, "ldlq: rows of stride 1 expected");
  const Grid grid = grid_of(call, 4, 5, 6, call->i[0], call->i[1], call->i[2]);
  const Rows rq(Q), rr(R);
  const int64_t panel = K < 1024 ? ceil_div(K, BLOCK) * BLOCK : 1024;
  const bool single = K <= BLOCK;
  bf16 *D = nullptr, *S = nullptr, *D_inner = nullptr;
  if (!single) {
    D = static_cast<bf16*>(scratch(c, 0, size_t(E) * N * 3 * (panel + BLOCK) * 2));
    D_inner = D + E * N * 3 * panel;
    S = static_cast<bf16*>(scratch(c, 1, size_t(E) * 3 * panel * K * 2));
    if (!D || !S) return 1;
    for (int64_t e = 0; e < E; e++)  // pending sums start at zero
      DC_CUDA(cudaMemset2DAsync(data<float>(Q) + e * rq.batch, size_t(rq.row) * 4, 0, size_t(K) * 4, size_t(N), c->stream));
  }
  const size_t shared = (size_t(BLOCK) * BLOCK + SWEEP_ROWS * (BLOCK + 1) + BLOCK + MICRO * SWEEP_ROWS) * 4 + SWEEP_ROWS * (BLOCK + 4);
  DC_CUDA(cudaFuncSetAttribute(sweep_block, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  const int64_t d_row = 3 * panel, d_batch = N * d_row;
  // pending[:, from..to] += D R: the `height` columns of D that were swept last (`inner`: one block, else the panel),
  // R from row i0.
  auto spread = [&](bool inner, int64_t height, int64_t i0, int64_t from, int64_t to) -> int {
    const int64_t columns = to - from;
    if (columns <= 0) return 0;
    // D lies as [high | low | high], R as high above high above low: one product of three times the depth.
    const int64_t s_batch = 3 * height * columns;
    split_factor<<<dim3(grid_for(c, height * columns, 256), unsigned(E)), 256, 0, c->stream>>>(S, s_batch, columns, rr, i0, height, from);
    const dc_tensor C{data<float>(Q) + from, DC_F32, 3, {E, N, columns, 1}, {rq.batch, rq.row, 1, 0}};
    const dc_tensor A = inner ? dc_tensor{D_inner, DC_BF16, 3, {E, N, 3 * height, 1}, {N * 3 * BLOCK, 3 * BLOCK, 1, 0}}
                              : dc_tensor{D, DC_BF16, 3, {E, N, 3 * height, 1}, {d_batch, d_row, 1, 0}};
    const dc_tensor B{S, DC_BF16, 3, {E, 3 * height, columns, 1}, {s_batch, columns, 1, 0}};
    return gemm(c, C, A, B, 1, 1, 0);
  };
  for (int64_t p0 = 0; p0 < K; p0 += panel) {
    const int64_t p1 = K - p0 < panel ? K : p0 + panel, part = p1 - p0;
    for (int64_t j = p0; j < p1; j += BLOCK) {
      const int width = int(p1 - j < BLOCK ? p1 - j : BLOCK);
      const int64_t e_batch = error.rank == 2 ? error.stride[0] : 0, e_row = error.rank == 2 ? error.stride[1] : error.stride[0];
      sweep_block<<<dim3(unsigned(ceil_div(N, SWEEP_ROWS)), unsigned(E)), SWEEP_THREADS, shared, c->stream>>>(
          Rows(codes), rq, Rows(W), rr, grid, data<float>(error), e_batch, e_row, single, D ? D + (j - p0) : nullptr, D_inner, d_batch, d_row, part, N, j, width);
      if (launched(c, "ldlq")) return 1;
      if (spread(true, width, j, j + width, p1)) return 1;
    }
    if (p1 < K && spread(false, part, p0, p1, K)) return 1;
  }
  return 0;
}

extern "C" int dc_cuda_pack(dc_context* c, const dc_call* call) {
  const dc_tensor &words = call->t[0], &codes = call->t[1];
  const Fields fields{int(call->i[0]), int(call->i[3])};
  const int axis = int(call->i[2]);
  const int64_t lines = codes.dim[1 - axis], n = codes.dim[axis], per_line = fields.words(n);
  if (fields.bits < 1 || fields.bits > 8 || (fields.order == 1 && fields.bits != 4)) return fail(c, "pack: %d bits in order %d", fields.bits, fields.order);
  if (words.dim[axis] != per_line || words.dim[1 - axis] != lines) return fail(c, "pack: words do not fit codes");
  if (lines * per_line == 0) return 0;
  pack_lines<<<grid_for(c, lines * per_line, 256), 256, 0, c->stream>>>(words, codes, fields, int(call->i[1]), axis, lines, per_line, n);
  return launched(c, "pack");
}

extern "C" int dc_cuda_unpack(dc_context* c, const dc_call* call) {
  const dc_tensor &codes = call->t[0], &words = call->t[1];
  const Fields fields{int(call->i[0]), int(call->i[3])};
  const int axis = int(call->i[2]);
  const int64_t lines = codes.dim[1 - axis], n = codes.dim[axis];
  if (fields.bits < 1 || fields.bits > 8 || (fields.order == 1 && fields.bits != 4)) return fail(c, "unpack: %d bits in order %d", fields.bits, fields.order);
  if (words.dim[axis] < fields.words(n) || words.dim[1 - axis] != lines) return fail(c, "unpack: words do not fit codes");
  if (lines * n == 0) return 0;
  unpack_lines<<<grid_for(c, lines * n, 256), 256, 0, c->stream>>>(codes, words, fields, int(call->i[1]), axis, lines, n);
  return launched(c, "unpack");
}
