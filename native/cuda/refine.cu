// Refinement of quantized weights under the full Hessian: scales by least squares, codes by coordinate descent.
#include "grid.cuh"

namespace dc {
namespace {

// Q and, where asked for, the old codes.
__global__ void values_of(float* Q, int8_t* before, Rows codes, Grid grid, int64_t rows, int64_t K, int64_t first) {
  const int64_t n = blockIdx.x, e = blockIdx.y;
  for (int64_t j = threadIdx.x; j < K; j += blockDim.x) {
    const int8_t code = static_cast<const int8_t*>(codes.data)[codes.at(e, first + n) + j];
    const int64_t g = grid.group_of(e, j);
    Q[(e * rows + n) * K + j] = (float(code) - grid.zero_at(e, first + n, g)) * grid.scale_at(e, first + n, g);
    if (before) before[(e * rows + n) * K + j] = code;
  }
}
__global__ void count_changes(int32_t* changed, int64_t changed_batch, int64_t changed_row, const int8_t* before, Rows codes, int64_t rows, int64_t K, int64_t first) {
  __shared__ float shared[33];
  const int64_t n = blockIdx.x, e = blockIdx.y;
  int differ = 0;
  for (int64_t j = threadIdx.x; j < K; j += blockDim.x) differ += before[(e * rows + n) * K + j] != static_cast<const int8_t*>(codes.data)[codes.at(e, first + n) + j];
  const float sum = block_sum(float(differ), shared);  // exact: K < 2^24
  if (threadIdx.x == 0) changed[e * changed_batch + (first + n) * changed_row] = int32_t(sum);
}

// Columns in the order of their groups, stably: place[j] = where column j goes.
__global__ void group_places(int32_t* place, const int32_t* column_group, int64_t K) {
  const int64_t j = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (j >= K) return;
  const int32_t g = column_group[j];
  int32_t rank = 0;
  for (int64_t i = 0; i < K; i++) rank += column_group[i] < g || (column_group[i] == g && i < j);
  place[j] = rank;
}

// codes - zero in bf16 (exact up to 256), W - Q in fp32, columns at their places.
__global__ void multiples_of(bf16* D, float* G, float* ordered, Rows codes, Rows W, Grid grid, const int32_t* place, int64_t e, int64_t K, int64_t first) {
  const int64_t n = blockIdx.x;
  for (int64_t j = threadIdx.x; j < K; j += blockDim.x) {
    const int64_t g = grid.group_of(e, j), at = n * K + (place ? place[j] : j);
    const float m = float(static_cast<const int8_t*>(codes.data)[codes.at(e, first + n) + j]) - grid.zero_at(e, first + n, g);
    D[at] = from_float<bf16>(m);
    G[at] = 0;
    ordered[at] = static_cast<const float*>(W.data)[W.at(e, first + n) + j] - m * grid.scale_at(e, first + n, g);
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

// Rows at a time: work memory of some hundred MB.
int64_t chunk_rows(int64_t per_row, int64_t rows) {
  int64_t most = (int64_t(512) << 20) / (per_row < 1 ? 1 : per_row);
  most = most < 64 ? 64 : most / 64 * 64;
  return most < rows ? most : rows;
}
Rows dense(void* data, int64_t rows, int64_t K) { return Rows(dc_tensor{data, DC_F32, 3, {1, rows, K, 1}, {rows * K, K, 1, 0}}); }
Rows from_row(Rows r, int64_t e, int64_t first, int64_t size) {
  r.data = static_cast<char*>(r.data) + (e * r.batch + first * r.row) * size;
  return r;
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_code_descent(dc_context* c, const dc_call* call) {
  const dc_tensor &codes = call->t[0], &W = call->t[1], &H = call->t[2], &changed = call->t[6];
  const Shape shape(W);
  const int64_t K = shape.columns, passes = call->i[3];
  if (count(W) == 0) return 0;
  const Grid grid = grid_of(call, 3, 4, 5, call->i[0], call->i[1], call->i[2]);
  const int64_t chunk = chunk_rows(shape.batch * K * 9, shape.rows);
  const size_t values = size_t(shape.batch) * chunk * K * 4;
  char* memory = static_cast<char*>(scratch(c, 2, 2 * values + values / 4));
  if (!memory) return 1;
  for (int64_t first = 0; first < shape.rows; first += chunk) {
    Shape part = shape;
    part.rows = shape.rows - first < chunk ? shape.rows - first : chunk;
    float *old = reinterpret_cast<float*>(memory), *next = reinterpret_cast<float*>(memory + values);
    int8_t* before = present(changed) ? reinterpret_cast<int8_t*>(memory + 2 * values) : nullptr;
    const dim3 rows(unsigned(part.rows), unsigned(shape.batch));
    values_of<<<rows, 256, 0, c->stream>>>(old, before, Rows(codes), grid, part.rows, K, first);
    Grid here = grid;
    here.scale = from_row(grid.scale, 0, first, 4);
    if (grid.zero.data) here.zero = from_row(grid.zero, 0, first, 4);
    const Rows code_rows = from_row(Rows(codes), 0, first, 1), w_rows = from_row(Rows(W), 0, first, 4);
    for (int64_t pass = 0; pass < passes; pass++) {
      // Rounding v = Q + g / H_jj and passing (Q - Q') H on is LDLQ's sweep of Q with H for R, from the gradient as it is.
      const dc_tensor view{old, DC_F32, 3, {shape.batch, part.rows, K, 1}, {part.rows * K, K, 1, 0}};
      const Rows was(view);
      Rows is = was;
      is.data = next;
      DC_CUDA(cudaMemsetAsync(next, 0, size_t(shape.batch) * part.rows * K * 4, c->stream));
      if (add_gradient(c, is, w_rows, was, Rows(H), part)) return 1;
      if (sweep(c, code_rows, is, was, Rows(H), here, nullptr, part, true)) return 1;
      float* swap = old;
      old = next, next = swap;
    }
    if (before)
      count_changes<<<rows, 256, 0, c->stream>>>(data<int32_t>(changed), changed.rank == 2 ? changed.stride[0] : 0, changed.rank == 2 ? changed.stride[1] : changed.stride[0], before, Rows(codes),
                                                 part.rows, K, first);
  }
  return launched(c, "code_descent");
}

extern "C" int dc_cuda_scale_refit(dc_context* c, const dc_call* call) {
  const dc_tensor &scale = call->t[0], &codes = call->t[1], &W = call->t[2], &H = call->t[3], &column_group = call->t[5];
  const Shape shape(W);
  const int64_t K = shape.columns, groups = scale.dim[scale.rank - 1];
  if (count(W) == 0) return 0;
  const Grid grid = grid_of(call, 0, 4, 5, 0, 0, call->i[0]);
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
    const size_t d_at = take(size_t(chunk) * K * 2), error_at = take(size_t(chunk) * K * 4), product_at = take(size_t(chunk) * K * 4), twice_at = take(size_t(chunk) * widest * 4);
    const size_t systems_at = take(size_t(chunk) * groups * groups * 8), right_at = take(size_t(chunk) * groups * 8), begins_at = take(size_t(groups + 1) * 4);
    const size_t parts_at = take(size_t(2 * widest) * K * 2), place_at = take(size_t(K) * 4), zeros_at = take(size_t(chunk) * K * 4), h_at = take(permuted ? size_t(K) * K * 4 : 0);
    char* memory = static_cast<char*>(scratch(c, 2, at));
    if (!memory) return 1;
    auto* D = reinterpret_cast<bf16*>(memory + d_at);
    auto *error = reinterpret_cast<float*>(memory + error_at), *product = reinterpret_cast<float*>(memory + product_at);
    auto *doubled = reinterpret_cast<bf16*>(memory + twice_at), *parts = reinterpret_cast<bf16*>(memory + parts_at);
    auto *systems = reinterpret_cast<double*>(memory + systems_at), *right = reinterpret_cast<double*>(memory + right_at);
    auto *device_begins = reinterpret_cast<int32_t*>(memory + begins_at), *place = reinterpret_cast<int32_t*>(memory + place_at);
    auto* zeros = reinterpret_cast<float*>(memory + zeros_at);
    DC_CUDA(cudaMemcpyAsync(device_begins, begins, size_t(groups + 1) * 4, cudaMemcpyHostToDevice, c->stream));  // pageable: copied before it returns
    DC_CUDA(cudaMemsetAsync(zeros, 0, size_t(chunk) * K * 4, c->stream));
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
      multiples_of<<<unsigned(n), 256, 0, c->stream>>>(D, product, error, Rows(codes), Rows(W), grid, permuted ? place : nullptr, e, K, first);
      if (add_gradient(c, dense(product, n, K), dense(error, n, K), dense(zeros, n, K), h_rows, part)) return 1;
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
      const size_t packed = size_t(groups) * (groups + 3) / 2 * 8;
      const bool local = packed <= c->shared_limit - 1024;
      if (local) DC_CUDA(cudaFuncSetAttribute(solve_scales, cudaFuncAttributeMaxDynamicSharedMemorySize, int(packed)));
      solve_scales<<<unsigned(n), 128, local ? packed : size_t(groups) * 8, c->stream>>>(Rows(scale), e, first, systems, right, int(groups), float(call->f[0]), local);
    }
  }
  return launched(c, "scale_refit");
}
