// Coordinate descent over the codes of quantized weights under the full Hessian.
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

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_code_descent(dc_context* c, const dc_call* call) {
  const dc_tensor &codes = call->t[0], &W = call->t[1], &H = call->t[2], &changed = call->t[6], &gradient = call->t[7], &gain = call->t[8];
  const Shape shape(W);
  const int64_t K = shape.columns, passes = call->i[3];
  if (present(gain) && zero(c, gain)) return 1;
  if (count(W) == 0) return 0;
  const Grid grid = grid_of(call, 3, 4, 5, call->i[0], call->i[1], call->i[2]);
  const bool known = present(gradient);
  const int64_t chunk = chunk_rows(shape.batch * K * (known ? 5 : 9), shape.rows);
  const size_t values = size_t(shape.batch) * chunk * K * 4;
  char* memory = static_cast<char*>(scratch(c, 2, values + values / 4 + (known ? 0 : values)));
  if (!memory) return 1;
  for (int64_t first = 0; first < shape.rows; first += chunk) {
    Shape part = shape;
    part.rows = shape.rows - first < chunk ? shape.rows - first : chunk;
    auto* q = reinterpret_cast<float*>(memory);
    int8_t* before = present(changed) ? reinterpret_cast<int8_t*>(memory + values) : nullptr;
    const dc_tensor view{q, DC_F32, 3, {shape.batch, part.rows, K, 1}, {part.rows * K, K, 1, 0}};
    const Rows Q(view), w_rows = from_row(Rows(W), 0, first, 4), code_rows = from_row(Rows(codes), 0, first, 1);
    const dim3 rows(unsigned(part.rows), unsigned(shape.batch));
    values_of<<<rows, 256, 0, c->stream>>>(q, before, Rows(codes), grid, part.rows, K, first);
    Grid here = grid;
    here.scale = from_row(grid.scale, 0, first, 4);
    if (grid.zero.data) here.zero = from_row(grid.zero, 0, first, 4);
    Rows G = Q;
    if (known) {
      G = from_row(Rows(gradient), 0, first, 4);
    } else {
      G.data = memory + values + values / 4;
      DC_CUDA(cudaMemsetAsync(G.data, 0, size_t(shape.batch) * part.rows * K * 4, c->stream));
      if (add_gradient(c, G, w_rows, Q, Rows(H), part)) return 1;
    }
    dc_tensor gains = gain;
    if (present(gain)) gains.data = data<float>(gain) + first * gain.stride[gain.rank - 1];
    // Rounding v = Q + g / H_jj and passing (Q - Q') H on is LDLQ's sweep of Q with H for R, from the gradient as it is;
    // with the rest of (Q - Q') H it is the gradient of the next pass.
    for (int64_t pass = 0; pass < passes; pass++)
      if (sweep(c, code_rows, Q, G, Q, Rows(H), here, present(gain) ? &gains : nullptr, part, true, pass + 1 < passes)) return 1;
    if (before)
      count_changes<<<rows, 256, 0, c->stream>>>(data<int32_t>(changed), changed.rank == 2 ? changed.stride[0] : 0, changed.rank == 2 ? changed.stride[1] : changed.stride[0], before, Rows(codes),
                                                 part.rows, K, first);
  }
  return launched(c, "code_descent");
}
