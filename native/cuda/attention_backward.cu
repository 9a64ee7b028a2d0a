// Attention, backward. With P = exp(score - lse): dV = P' dO, dS = P (dO V' - delta), delta = rowsum(dO O),
// dQ = scale dS K, dK = scale dS' Q. Weights are computed again from the log-sum-exp (Dao 2023, FlashAttention-2), in one
// pass over keys for dK and dV and one over queries for dQ: nothing is summed across blocks, so every run gives the same
// bytes. 16-bit tensors go through tensor cores, fp32 and unusual strides through plain kernels.
#include "attention.cuh"

namespace dc {
namespace {

constexpr bool kTensorCores = true;  // false: 16-bit tensors take the plain kernels too
constexpr int kWarps = 4, kThreads = kWarps * 32, kOwn = kWarps * 16;  // rows that a block owns, 16 a warp
constexpr int kWalk = 32;                                              // rows of the other side that it takes at a time
constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ bool visible(const Problem& p, int s, int t, int length) {
  return t < length && t >= p.first(s) && (!p.causal || t <= s + p.offset);
}

// rows[b,h,s] = {lse in units of log 2, delta}, s < padded. Of queries that see nothing and of padding {infinity, 0}: P is
// 0 there.
template <class T>
__global__ void __launch_bounds__(128) prepare_rows(float2* rows, View4 dO, View4 o, const float* lse, Problem p, int padded) {
  const int part = threadIdx.x & 15;  // of 16 lanes to a row
  const int64_t item = blockIdx.x * 8ll + (threadIdx.x >> 4), bh = item / padded;
  const int s = int(item % padded), h = int(bh % p.H), b = int(bh / p.H);
  float sum = 0;
  if (s < p.S) {
    const T* x = static_cast<const T*>(dO.data) + b * dO.b + s * dO.s + h * dO.h;
    const T* y = static_cast<const T*>(o.data) + b * o.b + s * o.s + h * o.h;
    for (int d = part * 8; d < p.DV; d += 128) {
      const uint4 xs = *reinterpret_cast<const uint4*>(x + d), ys = *reinterpret_cast<const uint4*>(y + d);
#pragma unroll
      for (int i = 0; i < 8; i++) sum = fmaf(to_float(reinterpret_cast<const T*>(&xs)[i]), to_float(reinterpret_cast<const T*>(&ys)[i]), sum);
    }
  }
#pragma unroll
  for (int d = 8; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  if (part) return;
  const float shift = s < p.S ? lse[bh * p.S + s] : -INFINITY;
  rows[item] = shift == -INFINITY ? make_float2(INFINITY, 0) : make_float2(shift * kLog2e, sum);
}

// 16 rows from `row` on and 16 columns from `column` on as operand A; as operand B of a product with the tile's
// transpose; as operand B of a product with the tile.
template <class Tile>
__device__ __forceinline__ void operand_a(uint32_t (&f)[4], Tile tile, int row, int column) {
  const int lane = threadIdx.x & 31;
  ldmatrix(f, &tile[row + (lane & 15)][column + (lane >> 4) * 8]);
}
template <class Tile>
__device__ __forceinline__ void operand_b_transposed(uint32_t (&f)[4], Tile tile, int row, int column) {
  const int lane = threadIdx.x & 31;
  ldmatrix(f, &tile[row + (lane & 7) + (lane >> 4) * 8][column + (lane >> 3 & 1) * 8]);
}
template <class Tile>
__device__ __forceinline__ void operand_b(uint32_t (&f)[4], Tile tile, int row, int column) {
  const int lane = threadIdx.x & 31;
  ldmatrix_transposed(f, &tile[row + (lane & 15)][column + (lane >> 4) * 8]);
}

// c [16, kWalk] += 16 channels of own rows (a) times those of the walked tile.
template <class T, class Tile>
__device__ __forceinline__ void add_scores(float (&c)[kWalk / 8][4], const uint32_t (&a)[4], Tile walked, int channel) {
#pragma unroll
  for (int n = 0; n < kWalk / 16; n++) {
    uint32_t f[4];
    operand_b_transposed(f, walked, n * 16, channel);
    mma<T>(c[2 * n], a, f[0], f[1]);
    mma<T>(c[2 * n + 1], a, f[2], f[3]);
  }
}
// sum [16, W] += w [16, kWalk] walked [kWalk, W], w rounded to T.
template <class T, int W, class Tile>
__device__ __forceinline__ void add_product(float (&sum)[W / 8][4], const float (&w)[kWalk / 8][4], Tile walked) {
#pragma unroll
  for (int i = 0; i < kWalk / 16; i++) {
    const uint32_t a[4] = {pack2<T>(w[2 * i][0], w[2 * i][1]), pack2<T>(w[2 * i][2], w[2 * i][3]), pack2<T>(w[2 * i + 1][0], w[2 * i + 1][1]), pack2<T>(w[2 * i + 1][2], w[2 * i + 1][3])};
#pragma unroll
    for (int n = 0; n < W / 16; n++) {
      uint32_t f[4];
      operand_b(f, walked, i * 16, n * 16);
      mma<T>(sum[2 * n], a, f[0], f[1]);
      mma<T>(sum[2 * n + 1], a, f[2], f[3]);
    }
  }
}
// The warp's 16 rows, `row` the first, below `limit`.
template <class T, int W>
__device__ __forceinline__ void store_rows(T* base, int64_t stride, const float (&sum)[W / 8][4], float scale, int row, int limit, int columns) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int at = row + (lane >> 2) + r * 8;
    if (at >= limit) continue;
#pragma unroll
    for (int n = 0; n < W / 8; n++) {
      const int c = n * 8 + (lane & 3) * 2;
      if (c < columns) *reinterpret_cast<uint32_t*>(base + at * stride + c) = pack2<T>(sum[n][2 * r] * scale, sum[n][2 * r + 1] * scale);
    }
  }
}

// dK and dV of kOwn keys of one key head: walks the queries of its group. Everything is transposed (rows are keys), so
// that P' and dS' go from the accumulators straight into the next product. With K or V alone the sums of wide heads fit.
template <class T, int D, int DV, bool K, bool V, bool HOLD_K, bool HOLD_V>
__global__ void __launch_bounds__(kThreads) flash_backward_keys(View4 dk, View4 dv, View4 dO, View4 q, View4 k, View4 v, const float2* rows, Problem p, int padded) {
  extern __shared__ __align__(16) unsigned char memory[];
  T(*Ks)[D + 8] = reinterpret_cast<T(*)[D + 8]>(memory);
  T(*Qs)[D + 8] = Ks + kOwn;  // two stages
  T(*Vs)[DV + 8] = reinterpret_cast<T(*)[DV + 8]>(Qs + 2 * kWalk);
  T(*Gs)[DV + 8] = Vs + kOwn;  // dO
  float2* Ls = reinterpret_cast<float2*>(Gs + 2 * kWalk);
  const int lane = threadIdx.x & 31, own = (threadIdx.x >> 5) * 16, heads = p.H / p.G;
  const int b = blockIdx.x / heads, kh = blockIdx.x % heads, t0 = blockIdx.y * kOwn, tw = t0 + own;  // the longest walks first
  const int length = p.lengths ? min(p.T, p.lengths[b]) : p.T;
  const int begin = p.causal ? max(0, t0 - p.offset) / kWalk * kWalk : 0;
  const int end = t0 >= length ? 0 : p.window > 0 ? min(p.S, t0 + kOwn - 1 + p.window - p.offset) : p.S;
  const int last_head = (kh + 1) * p.G;

  auto load = [&](int h, int s0, int stage) {
    load_tile<T, D, kWalk, kThreads>(Qs + stage * kWalk, static_cast<const T*>(q.data) + b * q.b + h * q.h, q.s, s0, p.S, p.D);
    load_tile<T, DV, kWalk, kThreads>(Gs + stage * kWalk, static_cast<const T*>(dO.data) + b * dO.b + h * dO.h, dO.s, s0, p.S, p.DV);
    if (threadIdx.x < kWalk / 2)
      __pipeline_memcpy_async(Ls + stage * kWalk + threadIdx.x * 2, rows + (int64_t(b) * p.H + h) * padded + s0 + threadIdx.x * 2, 16);
  };
  float sum_k[K ? D / 8 : 1][4] = {}, sum_v[V ? DV / 8 : 1][4] = {};
  uint32_t fk[HOLD_K ? D / 16 : 1][4], fv[HOLD_V ? DV / 16 : 1][4];
  bool held = false;
  int h = begin < end ? kh * p.G : last_head, s0 = begin;
  if (h < last_head) {
    load_tile<T, D, kOwn, kThreads>(Ks, static_cast<const T*>(k.data) + b * k.b + kh * k.h, k.s, t0, length, p.D);
    if (K) load_tile<T, DV, kOwn, kThreads>(Vs, static_cast<const T*>(v.data) + b * v.b + kh * v.h, v.s, t0, length, p.DV);
    load(h, s0, 0);
  }
  __pipeline_commit();
  for (int stage = 0; h < last_head; stage ^= 1) {
    int next = s0 + kWalk;
    if (next >= end) h++, next = begin;
    if (h < last_head) load(h, next, stage ^ 1);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    if (!held) {
      held = true;
#pragma unroll
      for (int i = 0; HOLD_K && i < D / 16; i++) operand_a(fk[i], Ks, own, i * 16);
#pragma unroll
      for (int i = 0; HOLD_V && i < DV / 16; i++) operand_a(fv[i], Vs, own, i * 16);
    }
    const bool unseen = tw >= length || (p.causal && tw > s0 + kWalk - 1 + p.offset) || tw + 15 < p.first(s0);
    if (!unseen) {
      const auto Q = Qs + stage * kWalk;
      const auto G = Gs + stage * kWalk;
      float x[kWalk / 8][4] = {}, g[kWalk / 8][4] = {};
#pragma unroll
      for (int i = 0; i < (D > DV ? D : DV) / 16; i++) {
        if (i < D / 16) {
          uint32_t a[4];
          if (!HOLD_K) operand_a(a, Ks, own, i * 16);
          add_scores<T>(x, HOLD_K ? fk[HOLD_K ? i : 0] : a, Q, i * 16);
        }
        if (K && i < DV / 16) {
          uint32_t a[4];
          if (!HOLD_V) operand_a(a, Vs, own, i * 16);
          add_scores<T>(g, HOLD_V ? fv[HOLD_V ? i : 0] : a, G, i * 16);
        }
      }
      // Element (key lane / 4 + 8 r, query n * 8 + lane % 4 * 2 + c) is x[n][2 r + c].
      const bool edge = tw + 16 > length || (p.causal && tw + 15 > s0 + p.offset) || tw < p.first(s0 + kWalk - 1);
#pragma unroll
      for (int n = 0; n < kWalk / 8; n++) {
        const int at = n * 8 + (lane & 3) * 2;
        const float4 two = *reinterpret_cast<const float4*>(Ls + stage * kWalk + at);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float w = exp2_fast(fmaf(x[n][j], p.scale * kLog2e, -(j & 1 ? two.z : two.x)));
          if (edge && !visible(p, s0 + at + (j & 1), tw + (lane >> 2) + (j >> 1) * 8, length)) w = 0;
          x[n][j] = w;
          g[n][j] = w * (g[n][j] - (j & 1 ? two.w : two.y));
        }
      }
      if constexpr (V) add_product<T, DV>(sum_v, x, G);
      if constexpr (K) add_product<T, D>(sum_k, g, Q);
    }
    s0 = next;
    __syncthreads();
  }
  __pipeline_wait_prior(0);
  if constexpr (K) store_rows<T, D>(static_cast<T*>(dk.data) + b * dk.b + kh * dk.h, dk.s, sum_k, p.scale, tw, p.T, p.D);
  if constexpr (V) store_rows<T, DV>(static_cast<T*>(dv.data) + b * dv.b + kh * dv.h, dv.s, sum_v, 1, tw, p.T, p.DV);
}

// dQ of kOwn queries of one head: walks the keys.
template <class T, int D, int DV, bool HOLD>
__global__ void __launch_bounds__(kThreads) flash_backward_queries(View4 dq, View4 dO, View4 q, View4 k, View4 v, const float2* rows, Problem p, int padded) {
  extern __shared__ __align__(16) unsigned char memory[];
  T(*Qs)[D + 8] = reinterpret_cast<T(*)[D + 8]>(memory);
  T(*Ks)[D + 8] = Qs + kOwn;  // two stages
  T(*Gs)[DV + 8] = reinterpret_cast<T(*)[DV + 8]>(Ks + 2 * kWalk);
  T(*Vs)[DV + 8] = Gs + kOwn;
  const int lane = threadIdx.x & 31, own = (threadIdx.x >> 5) * 16;
  const int b = blockIdx.x / p.H, h = blockIdx.x % p.H, kh = h / p.G;
  const int s0 = (gridDim.y - 1 - blockIdx.y) * kOwn, sw = s0 + own;  // the longest walks first
  const int length = p.lengths ? min(p.T, p.lengths[b]) : p.T;
  const int key_begin = p.first(s0) / kWalk * kWalk, key_end = p.last(b, min(s0 + kOwn, p.S) - 1);
  const T* kb = static_cast<const T*>(k.data) + b * k.b + kh * k.h;
  const T* vb = static_cast<const T*>(v.data) + b * v.b + kh * v.h;
  const float2* row = rows + (int64_t(b) * p.H + h) * padded + sw + (lane >> 2);
  const float2 two[2] = {row[0], row[8]};

  load_tile<T, D, kOwn, kThreads>(Qs, static_cast<const T*>(q.data) + b * q.b + h * q.h, q.s, s0, p.S, p.D);
  load_tile<T, DV, kOwn, kThreads>(Gs, static_cast<const T*>(dO.data) + b * dO.b + h * dO.h, dO.s, s0, p.S, p.DV);
  load_tile<T, D, kWalk, kThreads>(Ks, kb, k.s, key_begin, key_end, p.D);
  load_tile<T, DV, kWalk, kThreads>(Vs, vb, v.s, key_begin, key_end, p.DV);
  __pipeline_commit();
  float sum[D / 8][4] = {};
  uint32_t fq[HOLD ? D / 16 : 1][4], fg[HOLD ? DV / 16 : 1][4];
  int stage = 0;
  for (int t0 = key_begin; t0 < key_end; t0 += kWalk, stage ^= 1) {
    if (t0 + kWalk < key_end) {
      load_tile<T, D, kWalk, kThreads>(Ks + (stage ^ 1) * kWalk, kb, k.s, t0 + kWalk, key_end, p.D);
      load_tile<T, DV, kWalk, kThreads>(Vs + (stage ^ 1) * kWalk, vb, v.s, t0 + kWalk, key_end, p.DV);
    }
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    if (HOLD && t0 == key_begin) {
#pragma unroll
      for (int i = 0; i < D / 16; i++) operand_a(fq[i], Qs, own, i * 16);
#pragma unroll
      for (int i = 0; i < DV / 16; i++) operand_a(fg[i], Gs, own, i * 16);
    }
    const bool unseen = (p.causal && t0 > sw + 15 + p.offset) || t0 + kWalk <= p.first(sw);
    if (!unseen) {
      const auto K = Ks + stage * kWalk;
      const auto V = Vs + stage * kWalk;
      float x[kWalk / 8][4] = {}, g[kWalk / 8][4] = {};
#pragma unroll
      for (int i = 0; i < (D > DV ? D : DV) / 16; i++) {
        if (i < D / 16) {
          uint32_t a[4];
          if (!HOLD) operand_a(a, Qs, own, i * 16);
          add_scores<T>(x, HOLD ? fq[HOLD ? i : 0] : a, K, i * 16);
        }
        if (i < DV / 16) {
          uint32_t a[4];
          if (!HOLD) operand_a(a, Gs, own, i * 16);
          add_scores<T>(g, HOLD ? fg[HOLD ? i : 0] : a, V, i * 16);
        }
      }
      const bool edge = t0 + kWalk > length || (p.causal && t0 + kWalk - 1 > sw + p.offset) || t0 < p.first(sw + 15);
#pragma unroll
      for (int n = 0; n < kWalk / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float w = exp2_fast(fmaf(x[n][j], p.scale * kLog2e, -two[j >> 1].x));
          if (edge && !visible(p, sw + (lane >> 2) + (j >> 1) * 8, t0 + n * 8 + (lane & 3) * 2 + (j & 1), length)) w = 0;
          g[n][j] = w * (g[n][j] - two[j >> 1].y);
        }
      add_product<T, D>(sum, g, K);
    }
    __syncthreads();
  }
  __pipeline_wait_prior(0);
  store_rows<T, D>(static_cast<T*>(dq.data) + b * dq.b + h * dq.h, dq.s, sum, p.scale, sw, p.S, p.D);
}

struct Tensors {
  View4 dq, dk, dv, dO, o, q, k, v;
  const float* lse;
};
template <int D, int DV>
constexpr size_t tiles_bytes() {
  return size_t(kOwn + 2 * kWalk) * (D + 8 + DV + 8) * 2 + 2 * kWalk * sizeof(float2);
}

template <class T, int D, int DV, bool K, bool V>
int launch_keys(dc_context* c, const Tensors& t, const float2* rows, const Problem& p, int padded) {
  auto kernel = flash_backward_keys<T, D, DV, K, V, (D <= 128), (D + DV <= 128)>;
  constexpr size_t bytes = tiles_bytes<D, DV>();
  DC_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  kernel<<<dim3(unsigned(p.B * (p.H / p.G)), unsigned(ceil_div(p.T, kOwn))), kThreads, bytes, c->stream>>>(t.dk, t.dv, t.dO, t.q, t.k, t.v, rows, p, padded);
  return launched(c, "attention_backward");
}
template <class T, int D, int DV>
int launch_flash(dc_context* c, const Tensors& t, const Problem& p) {
  const int padded = int(ceil_div(p.S, kOwn)) * kOwn;
  const int64_t count = int64_t(p.B) * p.H * padded;
  float2* rows = static_cast<float2*>(scratch(c, 0, size_t(count) * sizeof(float2)));
  if (!rows) return 1;
  prepare_rows<T><<<unsigned(count / 8), 128, 0, c->stream>>>(rows, t.dO, t.o, t.lse, p, padded);
  auto queries = flash_backward_queries<T, D, DV, (D + DV <= 256)>;
  constexpr size_t bytes = tiles_bytes<D, DV>();
  DC_CUDA(cudaFuncSetAttribute(queries, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  queries<<<dim3(unsigned(p.B * p.H), unsigned(padded / kOwn)), kThreads, bytes, c->stream>>>(t.dq, t.dO, t.q, t.k, t.v, rows, p, padded);
  if constexpr (D + DV <= 320) return launch_keys<T, D, DV, true, true>(c, t, rows, p, padded);
  else return launch_keys<T, D, DV, true, false>(c, t, rows, p, padded) || launch_keys<T, D, DV, false, true>(c, t, rows, p, padded);
}
template <class T>
int choose_flash(dc_context* c, const Tensors& t, const Problem& p) {
  if (p.D <= 64 && p.DV <= 64) return launch_flash<T, 64, 64>(c, t, p);
  if (p.D <= 128 && p.DV <= 128) return launch_flash<T, 128, 128>(c, t, p);
  if (p.D <= 192 && p.DV <= 128) return launch_flash<T, 192, 128>(c, t, p);
  return launch_flash<T, 256, 256>(c, t, p);
}
bool flash_takes(const dc_context* c, const dc_tensor* t, const Problem& p) {
  if (t[0].dtype == DC_F32 || p.T == 0 || p.D > 256 || p.DV > 256 || p.D % 8 || p.DV % 8) return false;
  if ((p.D > 192 || p.DV > 128) && c->shared_limit < tiles_bytes<256, 256>()) return false;
  for (int i = 0; i < 8; i++)
    if (t[i].dtype != t[0].dtype || !sixteen(t[i])) return false;
  return true;
}

// --- any dtype, any stride ----------------------------------------------------------------------------------------------
// In fp32: a block owns OWN rows of one side (keys, or queries), four to a warp, and walks the other side by OWN rows.

__global__ void row_dots(float* delta, dc_tensor a, dc_tensor b, int64_t rows, int S, int H, int DV) {
  const int lane = threadIdx.x & 31;
  const int64_t item = blockIdx.x * int64_t(blockDim.x / 32) + (threadIdx.x >> 5);
  if (item >= rows) return;
  const int64_t s = item % S, h = item / S % H, n = item / S / H;
  float sum = 0;
  for (int d = lane; d < DV; d += 32)
    sum += load(a.data, a.dtype, n * a.stride[0] + s * a.stride[1] + h * a.stride[2] + d) * load(b.data, b.dtype, n * b.stride[0] + s * b.stride[1] + h * b.stride[2] + d);
  sum = warp_sum(sum);
  if (lane == 0) delta[item] = sum;
}

// Rows [first, first + ROWS) of a head in fp32, zeros at and beyond `limit` and `columns`.
template <int W, int ROWS>
__device__ __forceinline__ void load_floats(float (*tile)[W + 4], const dc_tensor& x, int b, int h, int first, int limit, int columns) {
  const int64_t base = b * x.stride[0] + h * x.stride[2];
  for (int i = threadIdx.x; i < ROWS * W; i += ROWS * 8) {
    const int r = i / W, c = i % W;
    tile[r][c] = first + r < limit && c < columns ? load(x.data, x.dtype, base + (first + r) * x.stride[1] + c) : 0.f;
  }
}
template <int W, int ROWS>
__device__ __forceinline__ void add_dots(float (&c)[ROWS / 8], const float* own, const float (*walked)[W + 4], int columns) {
  for (int d = 0; d < columns; d += 4) {
    const float4 a = *reinterpret_cast<const float4*>(own + d);
#pragma unroll
    for (int i = 0; i < ROWS / 8; i++) {
      const float4 w = *reinterpret_cast<const float4*>(&walked[(threadIdx.x & 7) + i * 8][d]);
      c[i] = fmaf(a.x, w.x, fmaf(a.y, w.y, fmaf(a.z, w.z, fmaf(a.w, w.w, c[i]))));
    }
  }
}
// The warp's four rows of sums, a lane four columns of 128, += weights' walked.
template <int W, int ROWS>
__device__ __forceinline__ void add_rows(float (&sum)[W / 128][4][4], const float (*weights)[ROWS + 4], const float (*walked)[W + 4]) {
  const int lane = threadIdx.x & 31, own = (threadIdx.x >> 5) * 4;
#pragma unroll 2
  for (int s = 0; s < ROWS; s++) {
    const float4 four = *reinterpret_cast<const float4*>(&weights[s][own]);
    const float w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int n = 0; n < W / 128; n++) {
      const float4 y = *reinterpret_cast<const float4*>(&walked[s][n * 128 + lane * 4]);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        sum[n][r][0] = fmaf(w[r], y.x, sum[n][r][0]);
        sum[n][r][1] = fmaf(w[r], y.y, sum[n][r][1]);
        sum[n][r][2] = fmaf(w[r], y.z, sum[n][r][2]);
        sum[n][r][3] = fmaf(w[r], y.w, sum[n][r][3]);
      }
    }
  }
}
template <int W>
__device__ __forceinline__ void store_floats(const dc_tensor& y, const float (&sum)[W / 128][4][4], float scale, int b, int h, int first, int columns) {
  const int lane = threadIdx.x & 31, own = first + (threadIdx.x >> 5) * 4;
  const int64_t base = b * y.stride[0] + h * y.stride[2];
#pragma unroll
  for (int n = 0; n < W / 128; n++)
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int c = n * 128 + lane * 4 + j;
        if (own + r < y.dim[1] && c < columns) store(y.data, y.dtype, base + (own + r) * y.stride[1] + c, sum[n][r][j] * scale);
      }
}

// KEYS: own rows are keys, x = dk, y = dv; else own rows are queries, x = dq.
template <bool KEYS, int W, int ROWS>
__global__ void __launch_bounds__(ROWS * 8, W > 128 ? 1 : 2) plain_backward(dc_tensor x, dc_tensor y, dc_tensor dO, dc_tensor q, dc_tensor k, dc_tensor v, const float* lse, const float* delta, Problem p) {
  extern __shared__ __align__(16) unsigned char memory[];
  float(*own_a)[W + 4] = reinterpret_cast<float(*)[W + 4]>(memory);
  float(*own_b)[W + 4] = own_a + ROWS;
  float(*walked_a)[W + 4] = own_b + ROWS;
  float(*walked_b)[W + 4] = walked_a + ROWS;
  float(*weights)[ROWS + 4] = reinterpret_cast<float(*)[ROWS + 4]>(walked_b + ROWS);  // [walked][own]
  float(*slopes)[ROWS + 4] = weights + ROWS;
  const int heads = KEYS ? p.H / p.G : p.H, b = blockIdx.x / heads, own_head = blockIdx.x % heads, group = KEYS ? p.G : 1;
  const int first = blockIdx.y * ROWS, length = p.lengths ? min(p.T, p.lengths[b]) : p.T;
  int begin, end;  // of the walked side
  if (KEYS) {
    begin = p.causal ? max(0, first - p.offset) / ROWS * ROWS : 0;
    end = first >= length ? 0 : p.window > 0 ? min(p.S, first + ROWS - 1 + p.window - p.offset) : p.S;
  } else {
    begin = p.first(first) / ROWS * ROWS;
    end = p.last(b, min(first + ROWS, p.S) - 1);
  }
  load_floats<W, ROWS>(own_a, KEYS ? k : q, b, own_head, first, KEYS ? p.T : p.S, p.D);
  load_floats<W, ROWS>(own_b, KEYS ? v : dO, b, own_head, first, KEYS ? p.T : p.S, p.DV);
  float sum_a[W / 128][4][4] = {}, sum_b[W / 128][4][4] = {};
  for (int head = own_head * group; head < (own_head + 1) * group; head++)
    for (int at = begin; at < end; at += ROWS) {
      __syncthreads();
      load_floats<W, ROWS>(walked_a, KEYS ? q : k, b, KEYS ? head : head / p.G, at, end, p.D);
      load_floats<W, ROWS>(walked_b, KEYS ? dO : v, b, KEYS ? head : head / p.G, at, end, p.DV);
      __syncthreads();
      const int r = threadIdx.x / 8;
      float score[ROWS / 8] = {}, dp[ROWS / 8] = {};
      add_dots<W, ROWS>(score, own_a[r], walked_a, p.D);
      add_dots<W, ROWS>(dp, own_b[r], walked_b, p.DV);
#pragma unroll
      for (int i = 0; i < ROWS / 8; i++) {
        const int c = (threadIdx.x & 7) + i * 8, s = KEYS ? at + c : first + r, t = KEYS ? first + r : at + c;
        const int64_t row = (int64_t(b) * p.H + head) * p.S + s;
        float w = 0, ds = 0;
        if (s < p.S && visible(p, s, t, length) && lse[row] != -INFINITY) {
          w = expf(p.scale * score[i] - lse[row]);
          ds = w * (dp[i] - delta[row]);
        }
        weights[c][r] = w;
        slopes[c][r] = ds;
      }
      __syncthreads();
      add_rows<W, ROWS>(sum_a, slopes, walked_a);
      if (KEYS) add_rows<W, ROWS>(sum_b, weights, walked_b);
    }
  store_floats<W>(x, sum_a, p.scale, b, own_head, first, p.D);
  if (KEYS) store_floats<W>(y, sum_b, 1, b, own_head, first, p.DV);
}

template <bool KEYS, int W, int ROWS>
int launch_plain(dc_context* c, const dc_tensor* t, const float* lse, const float* delta, const Problem& p) {
  auto kernel = plain_backward<KEYS, W, ROWS>;
  constexpr size_t bytes = (4 * ROWS * (W + 4) + 2 * ROWS * (ROWS + 4)) * sizeof(float);
  DC_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  const dim3 grid(unsigned(p.B * (KEYS ? p.H / p.G : p.H)), unsigned(ceil_div(KEYS ? p.T : p.S, ROWS)));
  kernel<<<grid, ROWS * 8, bytes, c->stream>>>(t[KEYS ? 1 : 0], t[2], t[3], t[5], t[6], t[7], lse, delta, p);
  return launched(c, "attention_backward");
}
template <int W, int ROWS>
int plain(dc_context* c, const dc_tensor* t, const Problem& p) {
  const int64_t rows = int64_t(p.B) * p.H * p.S;
  float* delta = static_cast<float*>(scratch(c, 0, size_t(rows) * sizeof(float)));
  if (!delta) return 1;
  row_dots<<<unsigned(ceil_div(rows, 4)), 128, 0, c->stream>>>(delta, t[3], t[4], rows, p.S, p.H, p.DV);
  const int code = launch_plain<false, W, ROWS>(c, t, data<float>(t[8]), delta, p);
  return code || p.T == 0 ? code : launch_plain<true, W, ROWS>(c, t, data<float>(t[8]), delta, p);
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_attention_backward(dc_context* c, const dc_call* call) {
  const dc_tensor *t = call->t, &q = t[5], &k = t[6], &v = t[7];
  if (count(q) == 0) return zero(c, t[1]) || zero(c, t[2]);
  const Problem p = problem_of(call, q, k, int(v.dim[3]), t[9]);
  if (p.D > 256 || p.DV > 256) return fail(c, "attention_backward: head width %d / %d is beyond 256", p.D, p.DV);
  if (ceil_div(p.S, 16) >= 65536 || ceil_div(p.T, 16) >= 65536) return fail(c, "attention_backward: %d queries or %d keys are beyond 2^20", p.S, p.T);
  if (kTensorCores && flash_takes(c, t, p)) {
    const Tensors views{View4(t[0]), View4(t[1]), View4(t[2]), View4(t[3]), View4(t[4]), View4(q), View4(k), View4(v), data<float>(t[8])};
    return q.dtype == DC_BF16 ? choose_flash<bf16>(c, views, p) : choose_flash<f16>(c, views, p);
  }
  return p.D <= 128 && p.DV <= 128 ? plain<128, 32>(c, t, p) : plain<256, 16>(c, t, p);
}
