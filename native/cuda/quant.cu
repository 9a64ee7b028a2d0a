// Quantization to integer grids: search of the grids, rounding, the LDLQ sweep.
#include "grid.cuh"

namespace dc {
namespace {

__global__ void quantize_rows(Rows codes, Rows W, Grid grid, int64_t columns) {
  const int64_t n = blockIdx.x, e = blockIdx.y;
  for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
    const int64_t g = grid.group_of(e, j);
    static_cast<int8_t*>(codes.data)[codes.at(e, n) + j] =
        int8_t(code_of(load(W.data, W.dtype, W.at(e, n) + j), grid.scale_at(e, n, g), grid.zero_at(e, n, g), grid.low, grid.high));
  }
}
__global__ void dequantize_rows(Rows W, Rows codes, Grid grid, int64_t columns) {
  const int64_t n = blockIdx.x, e = blockIdx.y;
  for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
    const int64_t g = grid.group_of(e, j);
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
// v_j = W_j + sum_{i<j} (W_i - Q_i) R_ij / R_jj. Three levels: 128 columns of a row are swept in the registers of four
// lanes, the factor's block in shared memory; blocks reach their 1,024-column panel, and panels the rest of the matrix,
// by bf16x3 products on tensor cores. `pending` (the sums above) may live in Q, whose columns are not needed before their
// block is swept.

constexpr int BLOCK = 128, PANEL = 1024, SWEEP_ROWS = 64, SWEEP_THREADS = 256, PITCH = BLOCK + 4;

struct SweepMemory {
  float U[BLOCK][BLOCK];          // R_ij / R_jj; columns 16 c + 4 i + l stand at 16 c + 4 l + i, the four of a lane together
  float tile[SWEEP_ROWS][PITCH];  // v, then W, then the values
  float diagonal[BLOCK], inverse[BLOCK];
  int8_t codes[SWEEP_ROWS][PITCH];
};

struct RowGrid {
  const Grid& grid;
  int64_t e, n, j0;
  bool uniform;  // one group for all columns of the block
  int width;
  __device__ void at(int column, float& s, float& z) const {
    const int64_t j = j0 + (column < width ? column : width - 1), g = grid.group_of(e, j);
    s = grid.scale_at(e, n, g), z = grid.zero_at(e, n, g);
  }
};

// Sixteen columns from k0 on, one after another; v[i] is this lane's column k0 + 4 i + l, of LIVE that remain or more.
// `loss` grows by ((v - Q) R_jj)^2, or where W's values are KEPT by R_jj ((v - W)^2 - (v - Q)^2): what the step gains.
// The loops around it are not unrolled: what does not fit the instruction cache takes five times as long.
template <int LIVE, bool KEEP>
__device__ __forceinline__ void sweep_sixteen(float (&v)[32], float (&s)[4], float (&z)[4], float& loss, SweepMemory& m, const RowGrid& row, int local, int l, int k0) {
  float next_s[4], next_z[4];  // on their way while this sixteen is swept
  if (!row.uniform && k0 + 16 < BLOCK)
#pragma unroll
    for (int i = 0; i < 4; i++) row.at(k0 + 16 + 4 * i + l, next_s[i], next_z[i]);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int column = k0 + 4 * i + l;
    const float w = m.tile[local][column], r = m.diagonal[column], inverse = __frcp_rn(s[i]);
    float value_here = 0, code_here = 0, miss = 0;
#pragma unroll
    for (int owner = 0; owner < 4; owner++) {
      const float now = KEEP && v[i] != v[i] ? w : v[i];  // what has no gradient stays
      const float code = code_near(now, s[i], inverse, z[i], row.grid.low, row.grid.high), value = (code - z[i]) * s[i];
      const float difference = __shfl_sync(~0u, w - value, owner, 4);
      if (l == owner) value_here = value, code_here = code, miss = KEEP ? r * (value - w) * ((now - w) + (now - value)) : (v[i] - value) * r;
      const float4* u = reinterpret_cast<const float4*>(m.U[k0 + 4 * i + owner] + k0 + 4 * l);
#pragma unroll
      for (int c = 0; c < LIVE / 4; c++) {
        const float4 x = u[4 * c];  // beyond the block: of no use, and inside SweepMemory
        v[4 * c] = fmaf(difference, x.x, v[4 * c]), v[4 * c + 1] = fmaf(difference, x.y, v[4 * c + 1]);
        v[4 * c + 2] = fmaf(difference, x.z, v[4 * c + 2]), v[4 * c + 3] = fmaf(difference, x.w, v[4 * c + 3]);
      }
    }
    loss = KEEP ? loss + miss : fmaf(miss, miss, loss);
    m.tile[local][column] = value_here;
    m.codes[local][column] = int8_t(code_here);
  }
#pragma unroll
  for (int i = 0; i + 4 < LIVE; i++) v[i] = v[i + 4];
  if (!row.uniform && k0 + 16 < BLOCK)
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = next_s[i], z[i] = next_z[i];
}

template <bool KEEP>
__global__ void __launch_bounds__(SWEEP_THREADS, 2) sweep_block(Rows codes, Rows Q, Rows pending, Rows W, Rows R, Grid grid, float* error, int64_t error_batch, int64_t error_row, bool first, bf16* D,
                                                                bf16* D_inner, int64_t d_batch, int64_t d_row, int64_t d_part, int64_t rows, int64_t j0, int width) {
  extern __shared__ __align__(16) unsigned char memory[];
  SweepMemory& m = *reinterpret_cast<SweepMemory*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t e = blockIdx.y, row0 = blockIdx.x * int64_t(SWEEP_ROWS);
  const float* r = static_cast<const float*>(R.data) + e * R.batch;
  const float* w = static_cast<const float*>(W.data);
  float* q = static_cast<float*>(Q.data);
  const float d = threadIdx.x < width ? r[(j0 + threadIdx.x) * R.row + j0 + threadIdx.x] : 0.f;
  if (threadIdx.x < BLOCK) m.diagonal[threadIdx.x] = d, m.inverse[threadIdx.x] = d == 0 ? 0.f : 1.f / d;
  __syncthreads();
  // A thread has one column of the factor's block; 16 of its elements are asked for before the first is needed.
  {
    const int b = threadIdx.x % BLOCK, place = b / 16 * 16 + b % 4 * 4 + b / 4 % 4;
    const float* column = r + j0 * R.row + j0 + b;
    const float inverse = m.inverse[b];
#pragma unroll 1
    for (int a0 = threadIdx.x / BLOCK; a0 < BLOCK; a0 += 32) {
      float u[16];
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const int a = a0 + 2 * i;
        u[i] = a < width && b < width && b > a ? column[a * R.row] : 0.f;
      }
#pragma unroll
      for (int i = 0; i < 16; i++) m.U[a0 + 2 * i][place] = u[i] * inverse;
    }
  }
  // A warp brings in its own eight rows, a lane the columns lane, lane + 32, ...: v to the tile, W to the lane.
  const int64_t first_row = row0 + warp * 8;
  float own[8][4];
#pragma unroll
  for (int a = 0; a < 8; a++) {
    const float *from = w + W.at(e, first_row + a) + j0, *sums = static_cast<const float*>(pending.data) + pending.at(e, first_row + a) + j0;
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const int column = lane + 32 * b;
      const bool in = first_row + a < rows && column < width;
      own[a][b] = in ? from[column] : 0.f;
      m.tile[warp * 8 + a][column] = in && !first ? sums[column] : 0.f;
    }
  }
#pragma unroll
  for (int a = 0; a < 8; a++)
#pragma unroll
    for (int b = 0; b < 4; b++) {
      float& at = m.tile[warp * 8 + a][lane + 32 * b];
      at = fmaf(at, m.inverse[lane + 32 * b], own[a][b]);
    }
  __syncwarp();
  const int local = threadIdx.x / 4, l = threadIdx.x % 4;
  const int64_t n = row0 + local;
  float v[32], s[4], z[4], loss = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) v[i] = m.tile[local][4 * i + l];
  __syncwarp();
#pragma unroll
  for (int a = 0; a < 8; a++)
#pragma unroll
    for (int b = 0; b < 4; b++) m.tile[warp * 8 + a][lane + 32 * b] = own[a][b];
  const bool uniform = grid.column_group == nullptr && grid.group % BLOCK == 0;
  const RowGrid row{grid, e, n < rows ? n : rows - 1, j0, uniform, width};
#pragma unroll
  for (int i = 0; i < 4; i++) row.at(4 * i + l, s[i], z[i]);
  __syncthreads();
#pragma unroll 1
  for (int k0 = 0; k0 < BLOCK / 2 && k0 < width; k0 += 16) sweep_sixteen<32, KEEP>(v, s, z, loss, m, row, local, l, k0);
#pragma unroll 1
  for (int k0 = BLOCK / 2; k0 < width; k0 += 16) sweep_sixteen<16, KEEP>(v, s, z, loss, m, row, local, l, k0);
  __syncwarp();
  // A warp's rows out again, neighbouring lanes to neighbouring memory.
#pragma unroll 1
  for (int a = 0; a < 8 && first_row + a < rows; a++) {
    const int64_t r1 = first_row + a;
    const float* from = w + W.at(e, r1) + j0;
    float* values = q + Q.at(e, r1) + j0;
    int8_t* out_codes = static_cast<int8_t*>(codes.data) + codes.at(e, r1) + j0;
    bf16 *out = D + e * d_batch + r1 * d_row, *inner = D_inner + (e * rows + r1) * 3 * BLOCK;
    float before[4];
    if (D)
#pragma unroll
      for (int b = 0; b < 4; b++) before[b] = lane + 32 * b < width ? from[lane + 32 * b] : 0.f;
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const int column = lane + 32 * b;
      if (column >= width) continue;
      const float value = m.tile[warp * 8 + a][column];
      out_codes[column] = m.codes[warp * 8 + a][column];
      values[column] = value;
      if (!D) continue;
      const float difference = before[b] - value;
      const bf16 high = from_float<bf16>(difference), low = from_float<bf16>(difference - to_float(high));
      out[column] = high, out[d_part + column] = low, out[2 * d_part + column] = high;
      inner[column] = high, inner[width + column] = low, inner[2 * width + column] = high;
    }
  }
  loss += __shfl_xor_sync(~0u, loss, 1);
  loss += __shfl_xor_sync(~0u, loss, 2);
  if (l == 0 && n < rows && error) {
    float* out = error + e * error_batch + n * error_row;
    *out = (j0 == 0 && !KEEP ? 0.f : *out) + loss;
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

// W - Q of columns j0..j0 + width, in two bf16 parts: high, low, high.
__global__ void split_difference(bf16* out, int64_t out_batch, int64_t out_row, Rows W, Rows Q, int64_t j0, int64_t width, int64_t rows) {
  const int64_t e = blockIdx.y, n = rows * width;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t r = i / width, j = i % width;
    const float v = static_cast<const float*>(W.data)[W.at(e, r) + j0 + j] - static_cast<const float*>(Q.data)[Q.at(e, r) + j0 + j];
    const bf16 high = from_float<bf16>(v), low = from_float<bf16>(v - to_float(high));
    bf16* p = out + e * out_batch + r * out_row + j;
    p[0] = high, p[width] = low, p[2 * width] = high;
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

namespace {

// Products of fp32 matrices [E][N x height] and [E][height x columns] on tensor cores: two bf16 parts each, three of the
// four products of parts (accuracy about 2^-16 of each term). The left one lies as [high | low | high], the right one as
// high above high above low, so that one product of three times the depth does it.
struct Split {
  dc_context* c;
  Shape shape;
  bf16 *left = nullptr, *block = nullptr, *right = nullptr;  // left: PANEL columns, block: the 128 swept last
  int open() {
    const size_t rows = size_t(shape.batch) * shape.rows;
    left = static_cast<bf16*>(scratch(c, 0, rows * 3 * (PANEL + BLOCK) * 2));
    right = static_cast<bf16*>(scratch(c, 1, size_t(shape.batch) * 3 * PANEL * shape.columns * 2));
    if (!left || !right) return 1;
    block = left + rows * 3 * PANEL;
    return 0;
  }
  int64_t row() const { return 3 * PANEL; }
  int64_t batch() const { return shape.rows * row(); }
  // C[:, from..to] += left R[i0..i0 + height, from..to]
  int add(Rows C, bool inner, int64_t height, Rows R, int64_t i0, int64_t from, int64_t to) const {
    const int64_t columns = to - from, E = shape.batch, N = shape.rows, s_batch = 3 * height * columns;
    if (columns <= 0) return 0;
    split_factor<<<dim3(grid_for(c, height * columns, 256), unsigned(E)), 256, 0, c->stream>>>(right, s_batch, columns, R, i0, height, from);
    const dc_tensor c_view{static_cast<float*>(C.data) + from, DC_F32, 3, {E, N, columns, 1}, {C.batch, C.row, 1, 0}};
    const dc_tensor a_view = inner ? dc_tensor{block, DC_BF16, 3, {E, N, 3 * height, 1}, {N * 3 * BLOCK, 3 * BLOCK, 1, 0}}
                                   : dc_tensor{left, DC_BF16, 3, {E, N, 3 * height, 1}, {batch(), row(), 1, 0}};
    const dc_tensor b_view{right, DC_BF16, 3, {E, 3 * height, columns, 1}, {s_batch, columns, 1, 0}};
    return gemm(c, c_view, a_view, b_view, 1, 1, 0);
  }
};

}  // namespace

int dc::sweep(dc_context* c, Rows codes, Rows Q, Rows pending, Rows W, Rows R, const Grid& grid, const dc_tensor* error, const Shape& shape, bool given, bool complete) {
  const int64_t K = shape.columns, N = shape.rows, E = shape.batch;
  const bool single = K <= BLOCK;
  Split split{c, shape};
  if (!single || complete) {
    if (split.open()) return 1;
    if (!given)
      for (int64_t e = 0; e < E; e++)
        DC_CUDA(cudaMemset2DAsync(static_cast<float*>(pending.data) + e * pending.batch, size_t(pending.row) * 4, 0, size_t(K) * 4, size_t(N), c->stream));
  }
  const auto kernel = given ? sweep_block<true> : sweep_block<false>;
  DC_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(SweepMemory))));
  const int64_t e_batch = error && error->rank == 2 ? error->stride[0] : 0, e_row = !error ? 0 : error->rank == 2 ? error->stride[1] : error->stride[0];
  for (int64_t p0 = 0; p0 < K; p0 += PANEL) {
    const int64_t p1 = K - p0 < PANEL ? K : p0 + PANEL, part = p1 - p0;
    for (int64_t j = p0; j < p1; j += BLOCK) {
      const int width = int(p1 - j < BLOCK ? p1 - j : BLOCK);
      kernel<<<dim3(unsigned(ceil_div(N, SWEEP_ROWS)), unsigned(E)), SWEEP_THREADS, sizeof(SweepMemory), c->stream>>>(
          codes, Q, pending, W, R, grid, error ? data<float>(*error) : nullptr, e_batch, e_row, single && !given, split.left ? split.left + (j - p0) : nullptr, split.block, split.batch(),
          split.row(), part, N, j, width);
      if (launched(c, "sweep")) return 1;
      if (split.left && split.add(pending, true, width, R, j, complete ? p0 : j + width, p1)) return 1;
    }
    if (complete && p0 > 0 && split.add(pending, false, part, R, p0, 0, p0)) return 1;
    if (p1 < K && split.add(pending, false, part, R, p0, p1, K)) return 1;
  }
  return 0;
}

int dc::add_gradient(dc_context* c, Rows G, Rows W, Rows Q, Rows H, const Shape& shape) {
  Split split{c, shape};
  if (split.open()) return 1;
  for (int64_t p0 = 0; p0 < shape.columns; p0 += PANEL) {
    const int64_t part = shape.columns - p0 < PANEL ? shape.columns - p0 : PANEL;
    split_difference<<<dim3(grid_for(c, shape.rows * part, 256), unsigned(shape.batch)), 256, 0, c->stream>>>(split.left, split.batch(), split.row(), W, Q, p0, part, shape.rows);
    if (split.add(G, false, part, H, p0, 0, shape.columns)) return 1;
  }
  return 0;
}

extern "C" int dc_cuda_ldlq(dc_context* c, const dc_call* call) {
  const dc_tensor &codes = call->t[0], &Q = call->t[1], &W = call->t[2], &R = call->t[3], &error = call->t[7];
  if (count(W) == 0) return 0;
  for (const dc_tensor* t : {&codes, &Q, &W, &R})
    if (t->stride[t->rank - 1] != 1 && t->dim[t->rank - 1] > 1) return fail(c, "ldlq: rows of stride 1 expected");
  return sweep(c, Rows(codes), Rows(Q), Rows(Q), Rows(W), Rows(R), grid_of(call, 4, 5, 6, call->i[0], call->i[1], call->i[2]), present(error) ? &error : nullptr, Shape(W), false, false);
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
