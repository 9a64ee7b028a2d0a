// How far two models' attention rows differ: on tensor cores for 16-bit inputs, a plain kernel for the rest.
#include "attention.cuh"

namespace dc {
namespace {

// --- comparison ---------------------------------------------------------------------------------------------------------
// A block per query: both rows of scores in shared memory (long rows: in work memory), then the three figures.

__global__ void __launch_bounds__(128) compare_rows(float* out, dc_tensor qa, dc_tensor ka, dc_tensor qb, dc_tensor kb, Problem p, float scale_b, float cap_b, int Ga, int Gb, int Db, float* work) {
  extern __shared__ float row_memory[];
  __shared__ float shared[33];
  __shared__ float best_value[4];
  __shared__ int best_index[4], chosen[2][8];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int s = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  float* result = out + ((int64_t(b) * p.H + h) * p.S + s) * 3;
  const int first = max(1, p.first(s)), last = p.last(b, s), n = last - first;
  if (n <= 0) {
    if (tid < 3) result[tid] = NAN;
    return;
  }
  float* query = row_memory;  // both queries
  float* rows = work ? work + ((int64_t(b) * gridDim.y + h) * gridDim.x + s) * 2 * p.T : row_memory + p.D + Db;
  for (int d = tid; d < p.D; d += 128) query[d] = load(qa.data, qa.dtype, b * qa.stride[0] + s * qa.stride[1] + h * qa.stride[2] + d);
  for (int d = tid; d < Db; d += 128) query[p.D + d] = load(qb.data, qb.dtype, b * qb.stride[0] + s * qb.stride[1] + h * qb.stride[2] + d);
  __syncthreads();
  float lse[2];
  for (int side = 0; side < 2; side++) {
    const dc_tensor& k = side ? kb : ka;
    const int D = side ? Db : p.D, kh = h / (side ? Gb : Ga);
    const float scale = side ? scale_b : p.scale, cap = side ? cap_b : p.cap;
    const float* qs = query + (side ? p.D : 0);
    float* row = rows + side * n;
    float top = -INFINITY;
    for (int i = warp; i < n; i += 4) {  // a warp per key: coalesced
      const int64_t ki = b * k.stride[0] + int64_t(first + i) * k.stride[1] + kh * k.stride[2];
      float dot = 0;
      for (int d = lane; d < D; d += 32) dot = fmaf(qs[d], load(k.data, k.dtype, ki + d), dot);
      dot = warp_sum(dot) * scale;
      if (cap > 0) dot = cap * tanhf(dot / cap);
      if (lane == 0) row[i] = dot;
      top = fmaxf(top, dot);
    }
    top = block_max(top, shared);
    float sum = 0;
    for (int i = tid; i < n; i += 128) sum += expf(row[i] - top);
    sum = block_sum(sum, shared);
    lse[side] = top + logf(sum);
  }
  float js = 0, ab = 0, aa = 0, bb = 0;
  for (int i = tid; i < n; i += 128) {
    const float a = expf(rows[i] - lse[0]), q = expf(rows[n + i] - lse[1]), m = 0.5f * (a + q);
    js += 0.5f * ((a > 0 ? a * logf(a / m) : 0.f) + (q > 0 ? q * logf(q / m) : 0.f));  // exactly 0 where they are equal
    ab += a * q, aa += a * a, bb += q * q;
    rows[i] = a;  // the top-8 is of probabilities: ties to the lower index
    rows[n + i] = q;
  }
  js = block_sum(js, shared);
  ab = block_sum(ab, shared);
  aa = block_sum(aa, shared);
  bb = block_sum(bb, shared);
  const int wanted = min(8, n);
  for (int side = 0; side < 2; side++)
    for (int j = 0; j < wanted; j++) {
      float value = -1;
      int index = INT32_MAX;
      for (int i = tid; i < n; i += 128) {
        const float x = rows[side * n + i];
        if (x > value) value = x, index = i;
      }
      for (int d = 16; d; d >>= 1) {
        const float v = __shfl_xor_sync(~0u, value, d);
        const int at = __shfl_xor_sync(~0u, index, d);
        if (v > value || (v == value && at < index)) value = v, index = at;
      }
      if (lane == 0) best_value[warp] = value, best_index[warp] = index;
      __syncthreads();
      if (tid == 0) {
        for (int w = 1; w < 4; w++)
          if (best_value[w] > best_value[0] || (best_value[w] == best_value[0] && best_index[w] < best_index[0])) best_value[0] = best_value[w], best_index[0] = best_index[w];
        chosen[side][j] = best_index[0];
        if (best_index[0] < n) rows[side * n + best_index[0]] = -2;
      }
      __syncthreads();
    }
  if (tid == 0) {
    int common = 0;
    for (int i = 0; i < wanted; i++)
      for (int j = 0; j < wanted; j++) common += chosen[0][i] == chosen[1][j];
    result[0] = fmaxf(js, 0.f);
    result[1] = ab / sqrtf(aa * bb);
    result[2] = float(common) / float(wanted);
  }
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_attention_compare(dc_context* c, const dc_call* call) {
  const dc_tensor &out = call->t[0], &qa = call->t[1], &ka = call->t[2], &qb = call->t[3], &kb = call->t[4];
  if (count(out) == 0) return 0;
  Problem p = problem_of(call, qa, ka, 0, call->t[5]);
  p.cap = float(call->f[2]);
  const size_t queries = size_t(qa.dim[3] + qb.dim[3]) * 4, rows = size_t(p.T) * 8;
  size_t shared = queries + rows;
  float* work = nullptr;
  if (shared > c->shared_limit - 2048) {
    work = static_cast<float*>(scratch(c, 0, size_t(p.B) * p.H * p.S * rows));
    if (!work) return 1;
    shared = queries;
  }
  DC_CUDA(cudaFuncSetAttribute(compare_rows, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  compare_rows<<<dim3(unsigned(p.S), unsigned(p.H), unsigned(p.B)), 128, shared, c->stream>>>(
      data<float>(out), qa, ka, qb, kb, p, float(call->f[1]), float(call->f[3]), p.G, int(qb.dim[2] / kb.dim[2]), int(qb.dim[3]), work);
  return launched(c, "attention_compare");
}
