// Mixture of experts: routing, stable sort by expert, weighted combination; their gradients.
#include "cuda.cuh"

namespace dc {
namespace {

// A warp per token; its scores and selection keys lie in shared memory.
__global__ void route_tokens(float* w, int32_t* idx, dc_tensor logits, const float* bias, int scoring, int groups, int top_groups,
                             int group_score, int normalize, float scale, int64_t tokens, int E, int k) {
  extern __shared__ float memory[];
  const int lane = threadIdx.x & 31;
  const int64_t t = blockIdx.x * int64_t(blockDim.x / 32) + (threadIdx.x >> 5);
  if (t >= tokens) return;
  float* score = memory + (threadIdx.x >> 5) * (2 * E + groups);
  float* key = score + E;
  float* group = key + E;
  float top = -INFINITY;
  for (int e = lane; e < E; e += 32) top = fmaxf(top, score[e] = load(logits.data, logits.dtype, t * logits.stride[0] + e * logits.stride[1]));
  if (scoring == 0) {
    top = warp_max(top);
    float sum = 0;
    for (int e = lane; e < E; e += 32) sum += score[e] = expf(score[e] - top);
    sum = warp_sum(sum);
    for (int e = lane; e < E; e += 32) score[e] /= sum;
  } else if (scoring == 1) {
    for (int e = lane; e < E; e += 32) score[e] = 1.f / (1.f + expf(-score[e]));
  } else {
    for (int e = lane; e < E; e += 32) score[e] = sqrtf(score[e] > 20.f ? score[e] : log1pf(expf(score[e])));
  }
  for (int e = lane; e < E; e += 32) key[e] = score[e] + (bias ? bias[e] : 0.f);
  __syncwarp();
  if (groups > 1 && top_groups < groups) {
    const int size = E / groups;
    for (int g = lane; g < groups; g += 32) {
      float first = -INFINITY, second = -INFINITY;
      for (int e = g * size; e < (g + 1) * size; e++) {
        if (key[e] > first) second = first, first = key[e];
        else if (key[e] > second) second = key[e];
      }
      group[g] = group_score == 1 && size > 1 ? first + second : first;
    }
    __syncwarp();
    // A group stays when fewer than top_groups others are better (ties: the lower index is better).
    for (int g = lane; g < groups; g += 32) {
      int better = 0;
      for (int o = 0; o < groups; o++) better += group[o] > group[g] || (group[o] == group[g] && o < g);
      if (better >= top_groups)
        for (int e = g * size; e < (g + 1) * size; e++) key[e] = -INFINITY;
    }
    __syncwarp();
  }
  float total = 0;
  for (int j = 0; j < k; j++) {
    float best = -INFINITY;
    int at = INT32_MAX;
    for (int e = lane; e < E; e += 32)
      if (!isnan(key[e]) && (key[e] > best || (key[e] == best && e < at && best != -INFINITY))) best = key[e], at = e;
    for (int d = 16; d; d >>= 1) {
      const float other = __shfl_xor_sync(~0u, best, d);
      const int where = __shfl_xor_sync(~0u, at, d);
      if (other > best || (other == best && where < at)) best = other, at = where;
    }
    if (at == INT32_MAX) {  // nothing left (masked groups, NaN): the lowest that was not taken
      for (int e = E - 1; e >= 0; e--) {
        bool taken = false;
        for (int q = 0; q < j; q++) taken |= idx[t * k + q] == e;
        if (!taken) at = e;
      }
    }
    total += score[at];
    __syncwarp();
    if (lane == 0) {
      idx[t * k + j] = at;
      w[t * k + j] = score[at];
      key[at] = -INFINITY;
    }
    __syncwarp();
  }
  const float factor = normalize ? scale / (total + 1e-20f) : scale;
  for (int j = lane; j < k; j += 32) w[t * k + j] *= factor;
}

// A warp per token, its scores in shared memory. `shift`: how far below a score tau lies where that score's p is active / E.
__global__ void choice_grad(dc_tensor ds, dc_tensor s, dc_tensor c, float active, float temperature, float shift, float scale, int64_t tokens, int E) {
  extern __shared__ float memory[];
  const int lane = threadIdx.x & 31;
  const int64_t t = blockIdx.x * int64_t(blockDim.x / 32) + (threadIdx.x >> 5);
  if (t >= tokens) return;
  float* score = memory + (threadIdx.x >> 5) * E;
  float low = INFINITY, high = -INFINITY, sum = 0;
  for (int e = lane; e < E; e += 32) {
    const float v = score[e] = load(s.data, s.dtype, t * s.stride[0] + e * s.stride[1]);
    low = fminf(low, v), high = fmaxf(high, v), sum += v;
  }
  low = -warp_max(-low) - shift, high = warp_max(high) - shift;
  const float rate = 1.f / temperature;
  float tau = warp_sum(sum) / float(E) - shift;
  auto odds = [&](int e) { return expf(fminf((tau - score[e]) * rate, 80.f)); };  // (1 - p) / p
  // Newton's steps within what brackets tau, the last one from where it squares an error that is small already. What p
  // lacks of 0 or 1 is summed, so that tokens that leave nothing open are balanced as well as others.
  for (int i = 0; i < 40; i++) {
    float rest = 0, slope = 0, taken = 0;
    for (int e = lane; e < E; e += 32) {
      const float o = odds(e), p = 1.f / (1.f + o);
      if (o > 1.f) rest += p;
      else rest -= o * p, taken += 1.f;
      slope += o * p * p;
    }
    const float excess = warp_sum(rest) + (warp_sum(taken) - active);
    slope = warp_sum(slope);
    (excess > 0 ? low : high) = tau;
    const float next = tau + excess * temperature / slope;
    tau = next >= low && next <= high ? next : 0.5f * (low + high);
    if (!(fabsf(excess) > 1e-3f * slope)) break;
  }
  float weight = 0, mean = 0;
  for (int e = lane; e < E; e += 32) {
    const float o = odds(e), p = 1.f / (1.f + o), q = o * p * p;
    score[e] = q;
    weight += q;
    mean += q * load(c.data, c.dtype, t * c.stride[0] + e * c.stride[1]);
  }
  mean = warp_sum(mean) / fmaxf(warp_sum(weight), 1e-30f);
  for (int e = lane; e < E; e += 32)
    store(ds.data, ds.dtype, t * ds.stride[0] + e * ds.stride[1], scale * rate * score[e] * (load(c.data, c.dtype, t * c.stride[0] + e * c.stride[1]) - mean));
}

constexpr int CHUNK = 256;

__global__ void sort_count(const int32_t* idx, int64_t n, int E, int32_t* counts) {
  extern __shared__ int32_t histogram[];
  for (int e = threadIdx.x; e < E; e += blockDim.x) histogram[e] = 0;
  __syncthreads();
  const int64_t i = blockIdx.x * int64_t(CHUNK) + threadIdx.x;
  if (i < n && idx[i] >= 0 && idx[i] < E) atomicAdd(&histogram[idx[i]], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += blockDim.x) counts[blockIdx.x * int64_t(E) + e] = histogram[e];
}
__global__ void sort_scan(int32_t* counts, int64_t chunks, int E, int32_t* offsets) {
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    int32_t sum = 0;
    for (int64_t k = 0; k < chunks; k++) {
      const int32_t n = counts[k * E + e];
      counts[k * E + e] = sum;
      sum += n;
    }
    offsets[e + 1] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    offsets[0] = 0;
    for (int e = 0; e < E; e++) offsets[e + 1] += offsets[e];
  }
}
__global__ void sort_place(const int32_t* idx, int64_t n, int E, int k, const int32_t* counts, const int32_t* offsets, int32_t* slots, int32_t* tokens, int32_t* place) {
  __shared__ int32_t expert[CHUNK];
  const int64_t i = blockIdx.x * int64_t(CHUNK) + threadIdx.x;
  expert[threadIdx.x] = i < n ? idx[i] : -1;
  __syncthreads();
  if (i >= n) return;
  const int e = expert[threadIdx.x];
  if (e < 0 || e >= E) return;
  int rank = 0;
  for (unsigned j = 0; j < threadIdx.x; j++) rank += expert[j] == e;
  const int32_t to = offsets[e] + counts[blockIdx.x * int64_t(E) + e] + rank;
  slots[to] = int32_t(i);
  tokens[to] = int32_t(i / k);
  place[i] = to;
}

__global__ void combine_tokens(dc_tensor out, dc_tensor y, const int32_t* place, const float* w, dc_tensor base, int k) {
  const int64_t t = blockIdx.x;
  for (int64_t c = threadIdx.x; c < out.dim[1]; c += blockDim.x) {
    float sum = 0;
    for (int j = 0; j < k; j++) sum += w[t * k + j] * load(y.data, y.dtype, place[t * k + j] * y.stride[0] + c);
    if (base.data) sum += load(base.data, base.dtype, t * base.stride[0] + c);
    store(out.data, out.dtype, t * out.stride[0] + c, sum);
  }
}

// A 32 x 32 tile of dB[e] a block: sums over the expert's rows in fp32.
__global__ void grouped_outer_tiles(dc_tensor dB, dc_tensor dC, dc_tensor A, const int32_t* offsets) {
  const int e = blockIdx.z, x = threadIdx.x, y = threadIdx.y;  // 32 x 8
  const int64_t begin = offsets[e], end = offsets[e + 1], row0 = blockIdx.y * 32ll, col0 = blockIdx.x * 32ll;
  const int64_t N = dB.dim[1], K = dB.dim[2];
  __shared__ float Cs[32][33], As[32][33];
  float sum[4] = {};
  for (int64_t r0 = begin; r0 < end; r0 += 32) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int r = y + j * 8;
      Cs[r][x] = r0 + r < end && row0 + x < N ? load(dC.data, dC.dtype, (r0 + r) * dC.stride[0] + (row0 + x) * dC.stride[1]) : 0.f;
      As[r][x] = r0 + r < end && col0 + x < K ? load(A.data, A.dtype, (r0 + r) * A.stride[0] + (col0 + x) * A.stride[1]) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 32; r++)
#pragma unroll
      for (int j = 0; j < 4; j++) sum[j] += Cs[r][y + j * 8] * As[r][x];
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int64_t n = row0 + y + j * 8;
    if (n < N && col0 + x < K) static_cast<float*>(dB.data)[e * dB.stride[0] + n * dB.stride[1] + (col0 + x) * dB.stride[2]] += sum[j];
  }
}

// A block per token and choice.
__global__ void combine_grad(dc_tensor dy, float* dw, dc_tensor out, dc_tensor y, const int32_t* place, const float* w, int k) {
  const int64_t slot = blockIdx.x, t = slot / k, row = place[slot];
  const float weight = w[slot];
  float dot = 0;
  for (int64_t c = threadIdx.x; c < out.dim[1]; c += blockDim.x) {
    const float d = load(out.data, out.dtype, t * out.stride[0] + c * out.stride[1]);
    dot += d * load(y.data, y.dtype, row * y.stride[0] + c * y.stride[1]);
    store(dy.data, dy.dtype, row * dy.stride[0] + c * dy.stride[1], weight * d);
  }
  __shared__ float parts[8];
  dot = warp_sum(dot);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = dot;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < int(blockDim.x) / 32; i++) sum += parts[i];
    dw[slot] = sum;
  }
}

// A warp per token; gradients of the chosen scores lie in shared memory.
__global__ void route_grad(dc_tensor dlogits, const float* dw, dc_tensor logits, const int32_t* idx, int scoring, int normalize,
                           float scale, int64_t tokens, int E, int k) {
  extern __shared__ float memory[];
  const int lane = threadIdx.x & 31;
  const int64_t t = blockIdx.x * int64_t(blockDim.x / 32) + (threadIdx.x >> 5);
  if (t >= tokens) return;
  float* d = memory + (threadIdx.x >> 5) * (2 * E);
  float* score = d + E;
  float top = -INFINITY;
  for (int e = lane; e < E; e += 32) top = fmaxf(top, score[e] = load(logits.data, logits.dtype, t * logits.stride[0] + e * logits.stride[1]));
  if (scoring == 0) {
    top = warp_max(top);
    float sum = 0;
    for (int e = lane; e < E; e += 32) sum += score[e] = expf(score[e] - top);
    sum = warp_sum(sum);
    for (int e = lane; e < E; e += 32) score[e] /= sum;
  } else if (scoring == 1) {
    for (int e = lane; e < E; e += 32) score[e] = 1.f / (1.f + expf(-score[e]));
  } else {
    for (int e = lane; e < E; e += 32) score[e] = sqrtf(score[e] > 20.f ? score[e] : log1pf(expf(score[e])));
  }
  for (int e = lane; e < E; e += 32) d[e] = 0;
  __syncwarp();
  float sum = 0, dot = 0;
  for (int j = lane; j < k; j += 32) {
    const float s = score[idx[t * k + j]];
    sum += s, dot += scale * dw[t * k + j] * s;
  }
  sum = warp_sum(sum) + 1e-20f, dot = warp_sum(dot);
  float through = 0;  // sum of gradient times score over the chosen: what softmax takes away from all
  for (int j = lane; j < k; j += 32) {
    const int e = idx[t * k + j];
    float slope = scale * dw[t * k + j];
    if (normalize) slope = (slope - dot / sum) / sum;
    d[e] = slope;
    through += slope * score[e];
  }
  through = warp_sum(through);
  __syncwarp();
  for (int e = lane; e < E; e += 32) {
    const float x = load(logits.data, logits.dtype, t * logits.stride[0] + e * logits.stride[1]), s = score[e];
    const float slope = scoring == 0 ? s * (d[e] - through) : scoring == 1 ? d[e] * s * (1 - s) : d[e] / (1.f + expf(-x)) / (2 * s);
    store(dlogits.data, dlogits.dtype, t * dlogits.stride[0] + e * dlogits.stride[1], slope);
  }
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_route(dc_context* c, const dc_call* call) {
  const dc_tensor &w = call->t[0], &idx = call->t[1], &logits = call->t[2], &bias = call->t[3];
  const int E = int(logits.dim[1]), k = int(w.dim[1]), groups = int(call->i[1]);
  const int64_t tokens = logits.dim[0];
  if (tokens == 0) return 0;
  if (k > E || groups < 1 || E % groups != 0) return fail(c, "route: %d of %d experts in %d groups", k, E, groups);
  const int warps = 4;
  const size_t shared = size_t(warps) * (2 * E + groups) * 4;
  if (shared > 48 << 10) return fail(c, "route: %d experts are more than this kernel holds", E);
  route_tokens<<<unsigned(ceil_div(tokens, warps)), warps * 32, shared, c->stream>>>(
      data<float>(w), data<int32_t>(idx), logits, data<float>(bias), int(call->i[0]), groups, int(call->i[2]), int(call->i[3]), int(call->i[4]), float(call->f[0]), tokens, E, k);
  return launched(c, "route");
}

extern "C" int dc_cuda_expert_sort(dc_context* c, const dc_call* call) {
  const dc_tensor &slots = call->t[0], &tokens = call->t[1], &offsets = call->t[2], &place = call->t[3], &idx = call->t[4];
  const int64_t n = count(idx), chunks = ceil_div(n, CHUNK);
  const int E = int(offsets.dim[0]) - 1, k = int(idx.dim[1]);
  if (n == 0) {
    DC_CUDA(cudaMemsetAsync(offsets.data, 0, size_t(E + 1) * 4, c->stream));
    return 0;
  }
  int32_t* counts = static_cast<int32_t*>(scratch(c, 0, size_t(chunks) * E * 4));
  if (!counts) return 1;
  sort_count<<<unsigned(chunks), CHUNK, size_t(E) * 4, c->stream>>>(data<int32_t>(idx), n, E, counts);
  sort_scan<<<1, 256, 0, c->stream>>>(counts, chunks, E, data<int32_t>(offsets));
  sort_place<<<unsigned(chunks), CHUNK, 0, c->stream>>>(data<int32_t>(idx), n, E, k, counts, data<int32_t>(offsets), data<int32_t>(slots), data<int32_t>(tokens), data<int32_t>(place));
  return launched(c, "expert_sort");
}

extern "C" int dc_cuda_expert_combine(dc_context* c, const dc_call* call) {
  const dc_tensor &out = call->t[0], &y = call->t[1], &place = call->t[2], &w = call->t[3], &base = call->t[4];
  if (count(out) == 0) return 0;
  combine_tokens<<<unsigned(out.dim[0]), 256, 0, c->stream>>>(out, y, data<int32_t>(place), data<float>(w), base, int(place.dim[1]));
  return launched(c, "expert_combine");
}

extern "C" int dc_cuda_grouped_outer(dc_context* c, const dc_call* call) {
  const dc_tensor &dB = call->t[0], &dC = call->t[1], &A = call->t[2], &offsets = call->t[3];
  if (count(dB) == 0) return 0;
  const dim3 grid(unsigned(ceil_div(dB.dim[2], 32)), unsigned(ceil_div(dB.dim[1], 32)), unsigned(dB.dim[0]));
  grouped_outer_tiles<<<grid, dim3(32, 8), 0, c->stream>>>(dB, dC, A, data<int32_t>(offsets));
  return launched(c, "grouped_outer");
}

extern "C" int dc_cuda_expert_combine_backward(dc_context* c, const dc_call* call) {
  const dc_tensor &dy = call->t[0], &dw = call->t[1], &out = call->t[2], &y = call->t[3], &place = call->t[4], &w = call->t[5];
  if (count(out) == 0) return 0;
  combine_grad<<<unsigned(count(place)), 256, 0, c->stream>>>(dy, data<float>(dw), out, y, data<int32_t>(place), data<float>(w), int(place.dim[1]));
  return launched(c, "expert_combine_backward");
}

extern "C" int dc_cuda_route_backward(dc_context* c, const dc_call* call) {
  const dc_tensor &dlogits = call->t[0], &dw = call->t[1], &logits = call->t[2], &idx = call->t[3];
  const int E = int(logits.dim[1]), k = int(idx.dim[1]), warps = 4;
  const int64_t tokens = logits.dim[0];
  if (tokens == 0) return 0;
  const size_t shared = size_t(warps) * 2 * E * 4;
  if (shared > 48 << 10) return fail(c, "route_backward: %d experts are more than this kernel holds", E);
  route_grad<<<unsigned(ceil_div(tokens, warps)), warps * 32, shared, c->stream>>>(dlogits, data<float>(dw), logits, data<int32_t>(idx), int(call->i[0]), int(call->i[1]), float(call->f[0]), tokens, E, k);
  return launched(c, "route_backward");
}

extern "C" int dc_cuda_choice_gradient(dc_context* c, const dc_call* call) {
  const dc_tensor &ds = call->t[0], &s = call->t[1], &gains = call->t[2];
  const int E = int(s.dim[1]), warps = 4;
  const int64_t tokens = s.dim[0];
  const double active = double(call->i[0]), temperature = call->f[0];
  if (!(active > 0 && active < E)) return fail(c, "choice_gradient: %g chosen of %d", active, E);
  if (tokens == 0) return 0;
  const size_t shared = size_t(warps) * E * 4;
  if (shared > 48 << 10) return fail(c, "choice_gradient: %d experts are more than this kernel holds", E);
  choice_grad<<<unsigned(ceil_div(tokens, warps)), warps * 32, shared, c->stream>>>(ds, s, gains, float(active), float(temperature), float(temperature * log(active / (E - active))), float(call->f[1]), tokens, E);
  return launched(c, "choice_gradient");
}
