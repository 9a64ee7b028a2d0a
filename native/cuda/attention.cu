// Attention: flash forward on tensor cores for 16-bit inputs, a plain kernel for fp32 and unusual widths.
#include "attention.cuh"

namespace dc {
namespace {

// --- plain: a warp per query --------------------------------------------------------------------------------------------

template <int DMAX>
__global__ void __launch_bounds__(128) plain_attention(dc_tensor o, dc_tensor q, dc_tensor k, dc_tensor v, Problem p) {
  __shared__ float qs[4][DMAX];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t item = blockIdx.x * 4ll + warp;
  if (item >= int64_t(p.B) * p.H * p.S) return;
  const int s = int(item % p.S), h = int(item / p.S % p.H), b = int(item / p.S / p.H), kh = h / p.G;
  const int64_t qi = b * q.stride[0] + s * q.stride[1] + h * q.stride[2];
  for (int d = lane; d < p.D; d += 32) qs[warp][d] = load(q.data, q.dtype, qi + d);
  __syncwarp();
  const int first = p.first(s), last = p.last(b, s);
  float top = -INFINITY, sum = 0, acc[DMAX / 32] = {};
  for (int t0 = first; t0 < last; t0 += 32) {
    const int t = t0 + lane;
    float x = -INFINITY;
    if (t < last) {
      const int64_t ki = b * k.stride[0] + t * k.stride[1] + kh * k.stride[2];
      float dot = 0;
      for (int d = 0; d < p.D; d++) dot = fmaf(qs[warp][d], load(k.data, k.dtype, ki + d), dot);
      x = p.score(dot);
    }
    const float new_top = fmaxf(top, warp_max(x));
    const float shrink = top == -INFINITY ? 0.f : expf(top - new_top);
    const float w = x == -INFINITY ? 0.f : expf(x - new_top);
    sum = sum * shrink + warp_sum(w);
    top = new_top;
#pragma unroll
    for (int i = 0; i < DMAX / 32; i++) acc[i] *= shrink;
    const int n = min(32, last - t0);
    for (int j = 0; j < n; j++) {
      const float wj = __shfl_sync(~0u, w, j);
      const int64_t vi = b * v.stride[0] + (t0 + j) * v.stride[1] + kh * v.stride[2];
#pragma unroll
      for (int i = 0; i < DMAX / 32; i++)
        if (lane + i * 32 < p.DV) acc[i] = fmaf(wj, load(v.data, v.dtype, vi + lane + i * 32), acc[i]);
    }
  }
  if (p.sinks) {
    const float sink = p.sinks[h], new_top = fmaxf(top, sink), shrink = top == -INFINITY ? 0.f : expf(top - new_top);
    sum = sum * shrink + expf(sink - new_top);
    top = new_top;
#pragma unroll
    for (int i = 0; i < DMAX / 32; i++) acc[i] *= shrink;
  }
  const float inverse = sum > 0 ? 1.f / sum : 0.f;
  const int64_t oi = b * o.stride[0] + s * o.stride[1] + h * o.stride[2];
#pragma unroll
  for (int i = 0; i < DMAX / 32; i++)
    if (lane + i * 32 < p.DV) store(o.data, o.dtype, oi + lane + i * 32, acc[i] * inverse);
  if (p.lse && lane == 0) p.lse[(int64_t(b) * p.H + h) * p.S + s] = sum > 0 ? top + logf(sum) : -INFINITY;
}

// --- flash forward ------------------------------------------------------------------------------------------------------
// Dao 2023 (FlashAttention-2): a block takes QM queries of one head, each warp 16 of them, and walks the keys in tiles
// of KN; scores and probabilities stay in registers.

template <class T, int D, int DV, int WARPS>
__global__ void __launch_bounds__(WARPS * 32) flash_attention(View4 o, View4 q, View4 k, View4 v, Problem p) {
  constexpr int QM = WARPS * 16, KN = 64, THREADS = WARPS * 32;
  extern __shared__ __align__(16) unsigned char memory[];
  T(*Qs)[D + 8] = reinterpret_cast<T(*)[D + 8]>(memory);
  T(*Ks)[D + 8] = Qs + QM;  // two stages
  T(*Vs)[DV + 8] = reinterpret_cast<T(*)[DV + 8]>(Ks + 2 * KN);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int tile = gridDim.x - 1 - blockIdx.x;  // the longest rows first
  const int h = blockIdx.y, b = blockIdx.z, kh = h / p.G, s0 = tile * QM;
  const T* qb = static_cast<const T*>(q.data) + b * q.b + h * q.h;
  const T* kb = static_cast<const T*>(k.data) + b * k.b + kh * k.h;
  const T* vb = static_cast<const T*>(v.data) + b * v.b + kh * v.h;
  const int s_last = min(s0 + QM, p.S) - 1;
  const int key_end = p.last(b, s_last), key_begin = p.first(s0) / KN * KN;

  load_tile<T, D, QM, THREADS>(Qs, qb, q.s, s0, p.S, p.D);
  load_tile<T, D, KN, THREADS>(Ks, kb, k.s, key_begin, key_end, p.D);
  load_tile<T, DV, KN, THREADS>(Vs, vb, v.s, key_begin, key_end, p.DV);
  __pipeline_commit();

  float acc[DV / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  uint32_t fq[D / 16][4];
  int stage = 0;
  for (int t0 = key_begin; t0 < key_end; t0 += KN, stage ^= 1) {
    if (t0 + KN < key_end) {
      load_tile<T, D, KN, THREADS>(Ks + (stage ^ 1) * KN, kb, k.s, t0 + KN, key_end, p.D);
      load_tile<T, DV, KN, THREADS>(Vs + (stage ^ 1) * KN, vb, v.s, t0 + KN, key_end, p.DV);
    }
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    if (t0 == key_begin) {
#pragma unroll
      for (int i = 0; i < D / 16; i++) ldmatrix(fq[i], &Qs[warp * 16 + (lane & 15)][i * 16 + (lane >> 4) * 8]);
    }
    T(*K)[D + 8] = Ks + stage * KN;
    T(*V)[DV + 8] = Vs + stage * KN;
    float x[KN / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; i++)
#pragma unroll
      for (int n = 0; n < KN / 16; n++) {
        uint32_t f[4];  // keys n*16..+16, channels i*16..+16
        ldmatrix(f, &K[n * 16 + (lane & 7) + (lane >> 4) * 8][i * 16 + (lane >> 3 & 1) * 8]);
        mma<T>(x[2 * n], fq[i], f[0], f[1]);
        mma<T>(x[2 * n + 1], fq[i], f[2], f[3]);
      }
    // Mask, running softmax. Element (row lane / 4 + 8 r, column n * 8 + lane % 4 * 2 + c) is x[n][2 r + c].
    const bool edge = t0 + KN > p.last(b, s0) || p.window > 0 || s0 + QM > p.S;
    float new_top[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < KN / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        x[n][j] = p.score(x[n][j]);
        if (edge) {
          const int s = s0 + warp * 16 + (lane >> 2) + (j >> 1) * 8, t = t0 + n * 8 + (lane & 3) * 2 + (j & 1);
          if (t >= p.last(b, s) || t < p.first(s)) x[n][j] = -INFINITY;
        }
        new_top[j >> 1] = fmaxf(new_top[j >> 1], x[n][j]);
      }
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      new_top[r] = fmaxf(new_top[r], __shfl_xor_sync(~0u, new_top[r], 1));
      new_top[r] = fmaxf(new_top[r], __shfl_xor_sync(~0u, new_top[r], 2));
      shrink[r] = top[r] == -INFINITY ? 0.f : exp2f((top[r] - new_top[r]) * 1.4426950408889634f);
      top[r] = new_top[r];
      sum[r] *= shrink[r];
    }
#pragma unroll
    for (int n = 0; n < KN / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        x[n][j] = x[n][j] == -INFINITY ? 0.f : exp2f((x[n][j] - top[j >> 1]) * 1.4426950408889634f);
        sum[j >> 1] += x[n][j];
      }
#pragma unroll
    for (int n = 0; n < DV / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) acc[n][j] *= shrink[j >> 1];
#pragma unroll
    for (int i = 0; i < KN / 16; i++) {
      const uint32_t a[4] = {pack2<T>(x[2 * i][0], x[2 * i][1]), pack2<T>(x[2 * i][2], x[2 * i][3]), pack2<T>(x[2 * i + 1][0], x[2 * i + 1][1]), pack2<T>(x[2 * i + 1][2], x[2 * i + 1][3])};
#pragma unroll
      for (int n = 0; n < DV / 16; n++) {
        uint32_t f[4];
        ldmatrix_transposed(f, &V[i * 16 + (lane & 15)][n * 16 + (lane >> 4) * 8]);
        mma<T>(acc[2 * n], a, f[0], f[1]);
        mma<T>(acc[2 * n + 1], a, f[2], f[3]);
      }
    }
    __syncthreads();
  }
  __pipeline_wait_prior(0);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    const int s = s0 + warp * 16 + (lane >> 2) + r * 8;
    float factor = 1;
    if (p.sinks) {
      const float sink = p.sinks[h], new_top = fmaxf(top[r], sink);
      factor = top[r] == -INFINITY ? 0.f : expf(top[r] - new_top);
      sum[r] = sum[r] * factor + expf(sink - new_top);
      top[r] = new_top;
    }
    const float inverse = sum[r] > 0 ? factor / sum[r] : 0.f;
    if (s >= p.S) continue;
    T* out = static_cast<T*>(o.data) + b * o.b + s * o.s + h * o.h;
#pragma unroll
    for (int n = 0; n < DV / 8; n++) {
      const int c = n * 8 + (lane & 3) * 2;
      if (c < p.DV) *reinterpret_cast<uint32_t*>(out + c) = pack2<T>(acc[n][2 * r] * inverse, acc[n][2 * r + 1] * inverse);
    }
    if (p.lse && (lane & 3) == 0) p.lse[(int64_t(b) * p.H + h) * p.S + s] = sum[r] > 0 ? top[r] + logf(sum[r]) : -INFINITY;
  }
}

template <class T, int D, int DV, int WARPS>
int launch_flash(dc_context* c, const View4& o, const View4& q, const View4& k, const View4& v, const Problem& p) {
  constexpr int QM = WARPS * 16, KN = 64;
  const size_t shared = (size_t(QM + 2 * KN) * (D + 8) + 2 * KN * (DV + 8)) * 2;
  auto kernel = flash_attention<T, D, DV, WARPS>;
  DC_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  kernel<<<dim3(unsigned(ceil_div(p.S, QM)), unsigned(p.H), unsigned(p.B)), WARPS * 32, shared, c->stream>>>(o, q, k, v, p);
  return launched(c, "attention");
}
template <class T>
int choose_flash(dc_context* c, const View4& o, const View4& q, const View4& k, const View4& v, const Problem& p) {
  const int d = p.D, dv = p.DV;
  if (d <= 32 && dv <= 32) return launch_flash<T, 32, 32, 4>(c, o, q, k, v, p);
  if (d <= 64 && dv <= 64) return launch_flash<T, 64, 64, 4>(c, o, q, k, v, p);
  if (d <= 96 && dv <= 96) return launch_flash<T, 96, 96, 4>(c, o, q, k, v, p);
  if (d <= 128 && dv <= 128) return launch_flash<T, 128, 128, 4>(c, o, q, k, v, p);
  if (d <= 192 && dv <= 128) return launch_flash<T, 192, 128, 4>(c, o, q, k, v, p);
  return launch_flash<T, 256, 256, 4>(c, o, q, k, v, p);
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_attention(dc_context* c, const dc_call* call) {
  const dc_tensor &o = call->t[0], &q = call->t[1], &k = call->t[2], &v = call->t[3];
  if (count(o) == 0) return 0;
  Problem p = problem_of(call, q, k, int(v.dim[3]), call->t[4]);
  p.sinks = data<float>(call->t[5]);
  p.lse = data<float>(call->t[6]);
  p.cap = float(call->f[1]);
  const bool same = q.dtype != DC_F32 && q.dtype == k.dtype && q.dtype == v.dtype && q.dtype == o.dtype;
  if (same && p.T > 0 && p.S > 1 && p.D <= 256 && p.DV <= 256 && p.D % 8 == 0 && p.DV % 8 == 0 && sixteen(q) && sixteen(k) && sixteen(v) && sixteen(o) && p.H < 65536 && p.B < 65536)
    return q.dtype == DC_BF16 ? choose_flash<bf16>(c, View4(o), View4(q), View4(k), View4(v), p) : choose_flash<f16>(c, View4(o), View4(q), View4(k), View4(v), p);
  const unsigned grid = unsigned(ceil_div(int64_t(p.B) * p.H * p.S, 4));
  if (p.D <= 128 && p.DV <= 128) plain_attention<128><<<grid, 128, 0, c->stream>>>(o, q, k, v, p);
  else if (p.D <= 640 && p.DV <= 640) plain_attention<640><<<grid, 128, 0, c->stream>>>(o, q, k, v, p);
  else return fail(c, "attention: head width %d / %d is beyond 640", p.D, p.DV);
  return launched(c, "attention");
}
