// Least-squares refit of scales under the full Hessian.
#include "grid.cuh"
#include "mma.cuh"

namespace dc {
namespace {

// Columns in the order of their groups, stably: place[j] = where column j goes.
__global__ void group_places(int32_t* place, const int32_t* column_group, int64_t K) {
  const int64_t j = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (j >= K) return;
  const int32_t g = column_group[j];
  int32_t rank = 0;
  for (int64_t i = 0; i < K; i++) rank += column_group[i] < g || (column_group[i] == g && i < j);
  place[j] = rank;
}

// codes - zero in bf16 (exact up to 256), columns at their places; with them the gradient where it is known, else 0 and W - Q.
__global__ void multiples_of(bf16* D, float* G, float* ordered, Rows codes, Rows W, Rows gradient, Grid grid, const int32_t* place, int64_t e, int64_t K, int64_t first) {
  const int64_t n = blockIdx.x;
  for (int64_t j = threadIdx.x; j < K; j += blockDim.x) {
    const int64_t g = grid.group_of(e, j), at = n * K + (place ? place[j] : j);
    const float m = float(static_cast<const int8_t*>(codes.data)[codes.at(e, first + n) + j]) - grid.zero_at(e, first + n, g);
    D[at] = from_float<bf16>(m);
    G[at] = gradient.data ? static_cast<const float*>(gradient.data)[gradient.at(e, first + n) + j] : 0.f;
    if (ordered) ordered[at] = static_cast<const float*>(W.data)[W.at(e, first + n) + j] - m * grid.scale_at(e, first + n, g);
  }
}
__global__ void permute_both(float* out, Rows H, const int32_t* place, int64_t e, int64_t K) {
  const int64_t i = blockIdx.x;
  const float* row = static_cast<const float*>(H.data) + H.at(e, i);
  for (int64_t j = threadIdx.x; j < K; j += blockDim.x) out[int64_t(place[i]) * K + place[j]] = row[j];
}
// Rows i0..i0 + height of H, columns 0..width, high parts above low parts.
__global__ void split_rows(bf16* out, const float* H, int64_t row, int64_t i0, int64_t height, int64_t width) {
  const int64_t n = height * width;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const float v = H[(i0 + i / width) * row + i % width];
    const bf16 high = from_float<bf16>(v);
    out[i] = high, out[n + i] = from_float<bf16>(v - to_float(high));
  }
}
// D of one group's columns, twice beside each other.
__global__ void twice(bf16* out, const bf16* D, int64_t K, int64_t from, int64_t width, int64_t rows) {
  const int64_t n = rows * width;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t r = i / width, j = i % width;
    out[r * 2 * width + j] = out[r * 2 * width + width + j] = D[r * K + from + j];
  }
}
// out[r] = sum of D product over each group's columns: a warp per row and group.
__global__ void group_dots(double* out, int64_t out_row, const bf16* D, const float* product, int64_t product_row, const int32_t* begins, int64_t groups, int64_t rows, int64_t K) {
  const int lane = threadIdx.x & 31;
  const int64_t item = blockIdx.x * int64_t(blockDim.x / 32) + (threadIdx.x >> 5);
  if (item >= rows * groups) return;
  const int64_t r = item / groups, g = item % groups;
  float sum = 0;
  for (int64_t j = begins[g] + lane; j < begins[g + 1]; j += 32) sum = fmaf(to_float(D[r * K + j]), product[r * product_row + j], sum);
  sum = warp_sum(sum);
  if (lane == 0) out[r * out_row + g] = sum;
}

// --- groups of 128 columns in their order ----------------------------------------------------------------------------
// D'HD of many rows on tensor cores: for a tile of 128 rows and a group g, D_g H[g, q] comes out 64 columns at a time and
// goes no further than registers, where each row's dot product with its D_q is taken. H is symmetric, in two bf16 parts.

constexpr int GROUP = 128, STEP = 64, TILE = 128, SYSTEM_THREADS = 256;

struct SystemMemory {
  bf16 h[2][2][STEP][GROUP + 8];    // two stages; high and low parts
  int8_t codes[2][TILE][STEP + 16];
  float sums[2][TILE];
};

// code - zero as it goes into the products.
__device__ __forceinline__ float multiple(int8_t code, bool zeros, float zero) { return zeros ? to_float(from_float<bf16>(float(code) - zero)) : float(code); }

// right[r, g] = D_g' gradient: a warp per row and group.
__global__ void right_sides(double* right, Rows codes, Rows gradient, Grid grid, int64_t e, int64_t first, int64_t rows, int groups) {
  const int lane = threadIdx.x & 31;
  const int64_t item = blockIdx.x * int64_t(blockDim.x / 32) + (threadIdx.x >> 5);
  if (item >= rows * groups) return;
  const int64_t r = first + item / groups, g = item % groups;
  const int8_t* c = static_cast<const int8_t*>(codes.data) + codes.at(e, r) + g * GROUP;
  const float *v = static_cast<const float*>(gradient.data) + gradient.at(e, r) + g * GROUP, zero = grid.zero_at(e, r, g);
  float sum = 0;
#pragma unroll
  for (int j = lane; j < GROUP; j += 32) sum = fmaf(multiple(c[j], grid.zero.data, zero), v[j], sum);
  sum = warp_sum(sum);
  if (lane == 0) right[item] = sum;
}

__global__ void __launch_bounds__(SYSTEM_THREADS) row_systems(double* systems, Rows codes, Grid grid, const bf16* high, const bf16* low, int64_t e, int64_t first, int64_t rows, int64_t K, int groups) {
  extern __shared__ __align__(16) unsigned char memory[];
  SystemMemory& m = *reinterpret_cast<SystemMemory*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wr = warp % 4 * 32, wc = warp / 4 * 32;
  const int g = groups - 1 - int(blockIdx.y);  // those with the most to do first
  const int64_t row0 = blockIdx.x * int64_t(TILE);
  const bool zeros = grid.zero.data != nullptr;
  const int8_t* base = static_cast<const int8_t*>(codes.data) + codes.at(e, first);
  auto clamped = [&](int64_t r) { return row0 + r < rows ? row0 + r : rows - 1; };
  // D_g stays in registers as the left operand: 32 rows a warp.
  uint32_t a[2][GROUP / 16][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t r = clamped(wr + i * 16 + half * 8 + lane / 4);
      const int8_t* c = base + r * codes.row + int64_t(g) * GROUP + lane % 4 * 2;
      const float zero = grid.zero_at(e, first + r, g);
#pragma unroll
      for (int k = 0; k < GROUP / 16; k++) {
        a[i][k][half] = pack2<bf16>(float(c[k * 16]) - zero, float(c[k * 16 + 1]) - zero);
        a[i][k][half + 2] = pack2<bf16>(float(c[k * 16 + 8]) - zero, float(c[k * 16 + 9]) - zero);
      }
    }
  auto fetch = [&](int t) {
    const int s = t & 1;
    const int64_t n0 = int64_t(t) * STEP;
#pragma unroll
    for (int i = 0; i < 2 * STEP * GROUP / 8 / SYSTEM_THREADS; i++) {
      const int piece = threadIdx.x + i * SYSTEM_THREADS, part = piece / (STEP * GROUP / 8), r = piece / (GROUP / 8) % STEP, k = piece % (GROUP / 8) * 8;
      __pipeline_memcpy_async(&m.h[s][part][r][k], (part ? low : high) + (n0 + r) * K + int64_t(g) * GROUP + k, 16);
    }
#pragma unroll
    for (int i = 0; i < TILE * STEP / 16 / SYSTEM_THREADS; i++) {
      const int piece = threadIdx.x + i * SYSTEM_THREADS, r = piece / (STEP / 16), k = piece % (STEP / 16) * 16;
      __pipeline_memcpy_async(&m.codes[s][r][k], base + clamped(r) * codes.row + n0 + k, 16);
    }
  };
  const int steps = (g + 1) * (GROUP / STEP);
  float dots[2][2] = {};
  fetch(0);
  __pipeline_commit();
#pragma unroll 1
  for (int t = 0; t < steps; t++) {
    if (t + 1 < steps) fetch(t + 1);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    const int s = t & 1, q = t * STEP / GROUP;
    float acc[2][4][4] = {};
#pragma unroll
    for (int k = 0; k < GROUP / 16; k++)
#pragma unroll
      for (int part = 0; part < 2; part++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          uint32_t b[4];
          ldmatrix(b, &m.h[s][part][wc + j * 16 + lane / 16 * 8 + lane % 8][k * 16 + lane / 8 % 2 * 8]);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            mma<bf16>(acc[i][2 * j], a[i][k], b[0], b[1]);
            mma<bf16>(acc[i][2 * j + 1], a[i][k], b[2], b[3]);
          }
        }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int r = wr + i * 16 + half * 8 + lane / 4;
        const float zero = zeros ? grid.zero_at(e, first + clamped(r), q) : 0.f;
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const char2 c = *reinterpret_cast<const char2*>(&m.codes[s][r][wc + n * 8 + lane % 4 * 2]);
          dots[i][half] = fmaf(acc[i][n][half * 2], multiple(c.x, zeros, zero), dots[i][half]);
          dots[i][half] = fmaf(acc[i][n][half * 2 + 1], multiple(c.y, zeros, zero), dots[i][half]);
        }
        if ((t + 1) * STEP % GROUP != 0) continue;
        float sum = dots[i][half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 4 == 0) m.sums[warp / 4][r] = sum;
        dots[i][half] = 0;
      }
    __syncthreads();
    const int r = threadIdx.x;
    if ((t + 1) * STEP % GROUP == 0 && r < TILE && row0 + r < rows) systems[((row0 + r) * groups + g) * groups + q] = double(m.sums[0][r]) + double(m.sums[1][r]);
  }
}

// One block a row: (A + damp mean(diag A) I) x = b by Cholesky in fp64, scale += x. A's lower triangle, [groups][groups];
// its rows one after another without gaps, in shared memory where `local`.
__global__ void __launch_bounds__(128) solve_scales(Rows scale, int64_t e, int64_t first, double* systems, const double* right, int groups, float damp, bool local) {
  extern __shared__ double b[];
  __shared__ double trace;
  double* in = systems + int64_t(blockIdx.x) * groups * groups;
  double* a = local ? b + groups : in;
  auto row = [&](int i) { return a + (local ? i * (i + 1) / 2 : i * groups); };
  for (int g = threadIdx.x; g < groups; g += blockDim.x) b[g] = right[int64_t(blockIdx.x) * groups + g];
  if (local)
    for (int i = threadIdx.x; i < groups * groups; i += blockDim.x)
      if (i % groups <= i / groups) row(i / groups)[i % groups] = in[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int g = 0; g < groups; g++) sum += row(g)[g];
    trace = sum;
  }
  __syncthreads();
  for (int g = threadIdx.x; g < groups; g += blockDim.x) row(g)[g] += double(damp) * trace / double(groups);
  __syncthreads();
  for (int j = 0; j < groups; j++) {
    const double pivot = row(j)[j];
    if (!(pivot > 0) || !isfinite(pivot)) return;  // the same for all threads: the scales stay
    const double inverse = 1 / sqrt(pivot);
    __syncthreads();
    for (int i = j + threadIdx.x; i < groups; i += blockDim.x) row(i)[j] *= inverse;
    if (threadIdx.x == 0) b[j] *= inverse;
    __syncthreads();
    // The rest of the triangle, a warp per row.
    const int rest = groups - j - 1;
    for (int i = threadIdx.x; i < rest; i += blockDim.x) b[j + 1 + i] -= row(j + 1 + i)[j] * b[j];
    for (int y = threadIdx.x / 32; y < rest; y += 4) {
      double* line = row(j + 1 + y);
      const double l = line[j];
      for (int x = threadIdx.x % 32; x <= y; x += 32) line[j + 1 + x] -= l * row(j + 1 + x)[j];
    }
    __syncthreads();
  }
  for (int j = groups - 1; j >= 0; j--) {
    if (threadIdx.x == 0) b[j] /= row(j)[j];
    __syncthreads();
    for (int i = threadIdx.x; i < j; i += blockDim.x) b[i] -= row(j)[i] * b[j];
    __syncthreads();
  }
  float* s = static_cast<float*>(scale.data) + scale.at(e, first + blockIdx.x);
  for (int g = threadIdx.x; g < groups; g += blockDim.x) {
    const float next = float(double(s[g]) + b[g]);
    if (isfinite(next) && next != 0) s[g] = next;
  }
}

}  // namespace
}  // namespace dc

using namespace dc;

namespace {

int solve_rows(dc_context* c, Rows scale, int64_t e, int64_t first, int64_t rows, double* systems, const double* right, int64_t groups, float damp) {
  const size_t packed = size_t(groups) * (groups + 3) / 2 * 8;
  const bool local = packed <= c->shared_limit - 1024;
  if (local) DC_CUDA(cudaFuncSetAttribute(solve_scales, cudaFuncAttributeMaxDynamicSharedMemorySize, int(packed)));
  solve_scales<<<unsigned(rows), 128, local ? packed : size_t(groups) * 8, c->stream>>>(scale, e, first, systems, right, int(groups), damp, local);
  return launched(c, "scale_refit");
}

bool in_pieces_of_16(const dc_tensor& codes) {
  for (int d = 0; d + 1 < codes.rank; d++)
    if (codes.stride[d] % 16 != 0) return false;
  return reinterpret_cast<uintptr_t>(codes.data) % 16 == 0;
}

// Groups of 128 columns in their order, the gradient known.
int refit_in_order(dc_context* c, Rows scale, const dc_tensor& codes, const dc_tensor& H, Rows gradient, const Grid& grid, const Shape& shape, float damp) {
  const int64_t K = shape.columns, groups = K / GROUP, chunk = chunk_rows(groups * (groups + 1) * 8, shape.rows);
  const size_t systems_bytes = size_t(chunk) * groups * groups * 8, right_bytes = size_t(chunk) * groups * 8;
  char* memory = static_cast<char*>(scratch(c, 2, systems_bytes + right_bytes + size_t(K) * K * 4));
  if (!memory) return 1;
  auto *systems = reinterpret_cast<double*>(memory), *right = reinterpret_cast<double*>(memory + systems_bytes);
  auto* parts = reinterpret_cast<bf16*>(memory + systems_bytes + right_bytes);
  DC_CUDA(cudaFuncSetAttribute(row_systems, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(SystemMemory))));
  for (int64_t e = 0; e < shape.batch; e++) {
    const float* h = data<float>(H) + (H.rank == 3 ? e * H.stride[0] : 0);
    split_rows<<<grid_for(c, K * K, 256), 256, 0, c->stream>>>(parts, h, H.stride[H.rank - 2], 0, K, K);
    for (int64_t first = 0; first < shape.rows; first += chunk) {
      const int64_t n = shape.rows - first < chunk ? shape.rows - first : chunk;
      right_sides<<<unsigned(ceil_div(n * groups, 8)), 256, 0, c->stream>>>(right, Rows(codes), gradient, grid, e, first, n, int(groups));
      row_systems<<<dim3(unsigned(ceil_div(n, TILE)), unsigned(groups)), SYSTEM_THREADS, sizeof(SystemMemory), c->stream>>>(systems, Rows(codes), grid, parts, parts + K * K, e, first, n, K, int(groups));
      if (solve_rows(c, scale, e, first, n, systems, right, groups, damp)) return 1;
    }
  }
  return 0;
}

Rows dense(void* data, int64_t rows, int64_t K) { return Rows(dc_tensor{data, DC_F32, 3, {1, rows, K, 1}, {rows * K, K, 1, 0}}); }

}  // namespace

extern "C" int dc_cuda_scale_refit(dc_context* c, const dc_call* call) {
  const dc_tensor &scale = call->t[0], &codes = call->t[1], &W = call->t[2], &H = call->t[3], &column_group = call->t[5], &gradient = call->t[6];
  const Shape shape(W);
  const int64_t K = shape.columns, groups = scale.dim[scale.rank - 1];
  if (count(W) == 0) return 0;
  const Grid grid = grid_of(call, 0, 4, 5, 0, 0, call->i[0]);
  const float damp = float(call->f[0]);
  const bool known = present(gradient);
  if (known && !present(column_group) && call->i[0] == GROUP && K == groups * GROUP && in_pieces_of_16(codes) && sizeof(SystemMemory) <= c->shared_limit)
    return refit_in_order(c, Rows(scale), codes, H, Rows(gradient), grid, shape, damp);
  const int64_t chunk = chunk_rows(K * 14 + groups * (groups + 1) * 8, shape.rows);
  for (int64_t e = 0; e < shape.batch; e++) {
    std::string begins_memory(size_t(groups + 1) * 4, 0);
    auto* begins = reinterpret_cast<int32_t*>(&begins_memory[0]);
    int64_t widest = 0;
    if (present(column_group)) {
      std::string host(size_t(K) * 4, 0);
      const auto* from = data<int32_t>(column_group) + (column_group.rank == 2 ? e * column_group.stride[0] : 0);
      DC_CUDA(cudaMemcpyAsync(&host[0], from, size_t(K) * 4, cudaMemcpyDeviceToHost, c->stream));
      DC_CUDA(cudaStreamSynchronize(c->stream));
      for (int64_t j = 0; j < K; j++) begins[reinterpret_cast<const int32_t*>(host.data())[j] + 1]++;
      for (int64_t g = 0; g < groups; g++) begins[g + 1] += begins[g];
    } else {
      for (int64_t g = 0; g <= groups; g++) begins[g] = int32_t(g * call->i[0] < K ? g * call->i[0] : K);
    }
    for (int64_t g = 0; g < groups; g++) widest = begins[g + 1] - begins[g] > widest ? begins[g + 1] - begins[g] : widest;
    // Work memory: D, W - Q, gradient / product, D twice, H's parts, systems; H in order and its places.
    size_t at = 0;
    auto take = [&](size_t bytes) {
      const size_t here = at;
      at += (bytes + 255) / 256 * 256;
      return here;
    };
    const bool permuted = present(column_group);
    const size_t d_at = take(size_t(chunk) * K * 2), error_at = take(known ? 0 : size_t(chunk) * K * 4), product_at = take(size_t(chunk) * K * 4), twice_at = take(size_t(chunk) * widest * 4);
    const size_t systems_at = take(size_t(chunk) * groups * groups * 8), right_at = take(size_t(chunk) * groups * 8), begins_at = take(size_t(groups + 1) * 4);
    const size_t parts_at = take(size_t(2 * widest) * K * 2), place_at = take(size_t(K) * 4), zeros_at = take(known ? 0 : size_t(chunk) * K * 4), h_at = take(permuted ? size_t(K) * K * 4 : 0);
    char* memory = static_cast<char*>(scratch(c, 2, at));
    if (!memory) return 1;
    auto* D = reinterpret_cast<bf16*>(memory + d_at);
    auto *error = known ? nullptr : reinterpret_cast<float*>(memory + error_at), *product = reinterpret_cast<float*>(memory + product_at);
    auto *doubled = reinterpret_cast<bf16*>(memory + twice_at), *parts = reinterpret_cast<bf16*>(memory + parts_at);
    auto *systems = reinterpret_cast<double*>(memory + systems_at), *right = reinterpret_cast<double*>(memory + right_at);
    auto *device_begins = reinterpret_cast<int32_t*>(memory + begins_at), *place = reinterpret_cast<int32_t*>(memory + place_at);
    auto* zeros = reinterpret_cast<float*>(memory + zeros_at);
    DC_CUDA(cudaMemcpyAsync(device_begins, begins, size_t(groups + 1) * 4, cudaMemcpyHostToDevice, c->stream));  // pageable: copied before it returns
    if (!known) DC_CUDA(cudaMemsetAsync(zeros, 0, size_t(chunk) * K * 4, c->stream));
    const float* h = data<float>(H) + (H.rank == 3 ? e * H.stride[0] : 0);
    int64_t h_row = H.stride[H.rank - 2];
    if (permuted) {
      group_places<<<unsigned(ceil_div(K, 128)), 128, 0, c->stream>>>(place, data<int32_t>(column_group) + (column_group.rank == 2 ? e * column_group.stride[0] : 0), K);
      permute_both<<<unsigned(K), 256, 0, c->stream>>>(reinterpret_cast<float*>(memory + h_at), Rows(H), place, e, K);
      h = reinterpret_cast<float*>(memory + h_at), h_row = K;
    }
    const Rows h_rows(dc_tensor{const_cast<float*>(h), DC_F32, 3, {1, K, K, 1}, {0, h_row, 1, 0}});
    for (int64_t first = 0; first < shape.rows; first += chunk) {
      Shape part = shape;
      part.batch = 1, part.rows = shape.rows - first < chunk ? shape.rows - first : chunk;
      const int64_t n = part.rows;
      multiples_of<<<unsigned(n), 256, 0, c->stream>>>(D, product, error, Rows(codes), Rows(W), Rows(gradient), grid, permuted ? place : nullptr, e, K, first);
      if (!known && add_gradient(c, dense(product, n, K), dense(error, n, K), dense(zeros, n, K), h_rows, part)) return 1;
      const unsigned dot_blocks = unsigned(ceil_div(n * groups, 8));
      group_dots<<<dot_blocks, 256, 0, c->stream>>>(right, groups, D, product, K, device_begins, groups, n, K);
      for (int64_t g = 0; g < groups; g++) {
        const int64_t from = begins[g], m = begins[g + 1] - from, width = begins[g + 1];
        if (m == 0) {  // a group without columns: nothing but damping in its row
          DC_CUDA(cudaMemset2DAsync(systems + g * groups, size_t(groups) * groups * 8, 0, size_t(g + 1) * 8, size_t(n), c->stream));
          continue;
        }
        split_rows<<<grid_for(c, m * width, 256), 256, 0, c->stream>>>(parts, h, h_row, from, m, width);
        twice<<<grid_for(c, n * m, 256), 256, 0, c->stream>>>(doubled, D, K, from, m, n);
        if (gemm(c, matrix(product, DC_F32, n, width, width), matrix(doubled, DC_BF16, n, 2 * m, 2 * m), matrix(parts, DC_BF16, 2 * m, width, width), 1, 0, 0)) return 1;
        group_dots<<<unsigned(ceil_div(n * (g + 1), 8)), 256, 0, c->stream>>>(systems + g * groups, groups * groups, D, product, width, device_begins, g + 1, n, K);
      }
      if (solve_rows(c, Rows(scale), e, first, n, systems, right, groups, damp)) return 1;
    }
  }
  return launched(c, "scale_refit");
}
