// How far two models' attention rows differ: on tensor cores for 16-bit inputs, a plain kernel for the rest.
#include <float.h>
#include <limits.h>

#include <algorithm>

#include "attention.cuh"

namespace dc {
namespace {

// --- plain --------------------------------------------------------------------------------------------------------------
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

int launch_rows(dc_context* c, const dc_call* call, Problem p) {
  const dc_tensor &out = call->t[0], &qa = call->t[1], &ka = call->t[2], &qb = call->t[3], &kb = call->t[4];
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

// --- on tensor cores ----------------------------------------------------------------------------------------------------
// A block takes 16 queries a warp of one head and sweeps the keys twice in tiles of KN, as flash attention does: first for
// each row's log-sum-exp in both models, then for the probabilities. The first sweep also gives each row a value that at
// least eight of its scores reach; the second keeps those scores alone as candidates for the eight greatest.

constexpr int kTop = 8;

struct Side {
  View4 q, k;
  int G, D;
  float squash;  // soft cap: level = tanh(dot squash), else 0: level = dot. Greater scores have greater levels.
  float rate;    // score = level rate, in units of log 2
  Side(const dc_tensor& q_, const dc_tensor& k_, float scale, float cap)
      : q(q_), k(k_), G(int(q_.dim[2] / k_.dim[2])), D(int(q_.dim[3])), squash(cap > 0 ? scale / cap : 0), rate((cap > 0 ? cap : scale) * 1.4426950408889634f) {}
};
struct Candidate {
  float level;
  int key;
};

__device__ __forceinline__ float power2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float logarithm2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Element (row lane / 4 + 8 r, key t0 + n * 8 + lane % 4 * 2 + c) is x[n][2 r + c]; -infinity where the row does not see the key.
template <class T, int D, int KN>
__device__ __forceinline__ void levels(float (&x)[KN / 8][4], const uint32_t (&fq)[D / 16][4], T (*K)[D + 8], float squash, int t0, bool edge, const int (&first)[2], const int (&last)[2]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < KN / 8; n++)
#pragma unroll
    for (int j = 0; j < 4; j++) x[n][j] = 0;
#pragma unroll
  for (int i = 0; i < D / 16; i++)
#pragma unroll
    for (int n = 0; n < KN / 16; n++) {
      uint32_t f[4];  // keys n*16..+16, channels i*16..+16
      ldmatrix(f, &K[n * 16 + (lane & 7) + (lane >> 4) * 8][i * 16 + (lane >> 3 & 1) * 8]);
      mma<T>(x[2 * n], fq[i], f[0], f[1]);
      mma<T>(x[2 * n + 1], fq[i], f[2], f[3]);
    }
  if (squash > 0) {
#pragma unroll
    for (int n = 0; n < KN / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) x[n][j] = tanhf(x[n][j] * squash);
  }
  if (edge) {
#pragma unroll
    for (int n = 0; n < KN / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int t = t0 + n * 8 + (lane & 3) * 2 + (j & 1);
        if (t < first[j >> 1] || t >= last[j >> 1]) x[n][j] = -INFINITY;
      }
  }
}

// A full list takes one more candidate if that is greater than its least; ties stay with the lower key. Returns what
// the next one has to reach.
template <int THREADS>
__device__ __noinline__ float replace_least(Candidate* list, float level, int key) {
  int least = 0;
  for (int i = 1; i < kTop; i++) {
    const Candidate x = list[i * THREADS], y = list[least * THREADS];
    if (x.level < y.level || (x.level == y.level && x.key > y.key)) least = i;
  }
  if (level > list[least * THREADS].level) list[least * THREADS] = {level, key};
  float low = INFINITY;
  for (int i = 0; i < kTop; i++) low = fminf(low, list[i * THREADS].level);
  return nextafterf(low, INFINITY);
}

// The keys of a row's eight greatest candidates, ties to the lower key; INT_MAX where there are fewer.
template <int THREADS>
__device__ __forceinline__ void greatest(int (&keys)[kTop], const Candidate* list, int held) {
  Candidate x[kTop];
#pragma unroll
  for (int i = 0; i < kTop; i++) x[i] = i < held ? list[i * THREADS] : Candidate{-INFINITY, INT_MAX};
#pragma unroll
  for (int j = 0; j < kTop; j++) {
    Candidate best = x[0];
#pragma unroll
    for (int i = 1; i < kTop; i++)
      if (x[i].level > best.level || (x[i].level == best.level && x[i].key < best.key)) best = x[i];
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
      const Candidate y = {__shfl_xor_sync(~0u, best.level, d), __shfl_xor_sync(~0u, best.key, d)};
      if (y.level > best.level || (y.level == best.level && y.key < best.key)) best = y;
    }
    keys[j] = best.key;
#pragma unroll
    for (int i = 0; i < kTop; i++)
      if (x[i].key == best.key) x[i] = {-INFINITY, INT_MAX};
  }
}

template <class T, int D, int KN, int WARPS>
struct CompareShape {
  static constexpr int QM = WARPS * 16, THREADS = WARPS * 32;
  static constexpr size_t queries = size_t(2) * QM * (D + 8) * sizeof(T), lists = size_t(4) * kTop * THREADS * sizeof(Candidate);
  static constexpr size_t front = queries > lists ? queries : lists;  // the lists take the queries' place
  static constexpr size_t bytes = front + size_t(4) * KN * (D + 8) * sizeof(T);
};

template <class T, int D, int KN, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) compare_tiles(float* out, Side a, Side b, Problem p) {
  using Shape = CompareShape<T, D, KN, WARPS>;
  constexpr int QM = Shape::QM, THREADS = Shape::THREADS;
  extern __shared__ __align__(16) unsigned char memory[];
  T(*Qs)[D + 8] = reinterpret_cast<T(*)[D + 8]>(memory);
  T(*Ks)[D + 8] = reinterpret_cast<T(*)[D + 8]>(memory + Shape::front);  // four stages
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int tile = gridDim.x - 1 - blockIdx.x;  // the longest rows first
  const int h = blockIdx.y, batch = blockIdx.z, s0 = tile * QM;
  const T* ka = static_cast<const T*>(a.k.data) + batch * a.k.b + h / a.G * a.k.h;
  const T* kb = static_cast<const T*>(b.k.data) + batch * b.k.b + h / b.G * b.k.h;
  const int key_end = p.last(batch, min(s0 + QM, p.S) - 1), key_begin = p.first(s0) / KN * KN;
  const int tiles = key_end > key_begin ? (key_end - key_begin + KN - 1) / KN : 0;

  // What the warp and its rows see, key 0 left out.
  const int ws = s0 + warp * 16, warp_first = p.first(ws), warp_last = ws < p.S ? p.last(batch, min(ws + 16, p.S) - 1) : 0;
  const int all_first = max(1, p.first(ws + 15)), all_last = ws + 16 > p.S ? 0 : p.last(batch, ws);  // seen by each of its rows
  int first[2], last[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int s = ws + (lane >> 2) + r * 8;
    first[r] = max(1, p.first(s)), last[r] = s < p.S ? p.last(batch, s) : 0;
  }

  // Items 0..tiles are a's tiles, the next `tiles` are b's, then tiles of a and b by turns; item i is in stage i % 4.
  const auto fetch = [&](int item) {
    const int side = item < 2 * tiles ? item >= tiles : item & 1, at = item < 2 * tiles ? item - side * tiles : (item - 2 * tiles) >> 1;
    load_tile<T, D, KN, THREADS>(Ks + (item & 3) * KN, side ? kb : ka, side ? b.k.s : a.k.s, key_begin + at * KN, key_end, side ? b.D : a.D);
  };
  if (tiles > 0) {
    load_tile<T, D, QM, THREADS>(Qs, static_cast<const T*>(a.q.data) + batch * a.q.b + h * a.q.h, a.q.s, s0, p.S, a.D);
    load_tile<T, D, QM, THREADS>(Qs + QM, static_cast<const T*>(b.q.data) + batch * b.q.b + h * b.q.h, b.q.s, s0, p.S, b.D);
    for (int item = 0; item < 3; item++) {
      fetch(item);
      __pipeline_commit();
    }
  }

  // First sweep. `top` and `second` are the greatest levels of a thread's own quarter of the row.
  uint32_t fq[2][D / 16][4];
  float top[2][2], second[2][2], sum[2][2];
#pragma unroll
  for (int side = 0; side < 2; side++) {
    const float rate = side ? b.rate : a.rate;
#pragma unroll
    for (int r = 0; r < 2; r++) top[side][r] = second[side][r] = -INFINITY, sum[side][r] = 0;
    for (int i = 0; i < tiles; i++) {
      const int item = side * tiles + i, t0 = key_begin + i * KN;
      __pipeline_wait_prior(2);
      __syncthreads();
      if (item + 3 < 2 * tiles + 2) fetch(item + 3);
      __pipeline_commit();
      if (i == 0) {
#pragma unroll
        for (int d = 0; d < D / 16; d++) ldmatrix(fq[side][d], &Qs[side * QM + warp * 16 + (lane & 15)][d * 16 + (lane >> 4) * 8]);
      }
      if (t0 >= warp_last || t0 + KN <= warp_first) continue;
      float x[KN / 8][4];
      levels<T, D, KN>(x, fq[side], Ks + (item & 3) * KN, side ? b.squash : a.squash, t0, t0 < all_first || t0 + KN > all_last, first, last);
      const float before[2] = {top[side][0], top[side][1]};
#pragma unroll
      for (int n = 0; n < KN / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float &most = top[side][j >> 1], &next = second[side][j >> 1];
          next = fmaxf(next, fminf(most, x[n][j]));
          most = fmaxf(most, x[n][j]);
        }
      float base[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        base[r] = top[side][r] == -INFINITY ? 0.f : top[side][r] * rate;
        sum[side][r] *= power2(fmaf(before[r], rate, -base[r]));
      }
#pragma unroll
      for (int n = 0; n < KN / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[side][j >> 1] += power2(fmaf(x[n][j], rate, -base[j >> 1]));
    }
  }
  float lse[2][2], bound[2][2];
#pragma unroll
  for (int side = 0; side < 2; side++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float rate = side ? b.rate : a.rate, most = row_max(top[side][r]), base = most == -INFINITY ? 0.f : most * rate;
      lse[side][r] = base + log2f(row_sum(sum[side][r] * power2(fmaf(top[side][r], rate, -base))));
      bound[side][r] = fmaxf(-row_max(-second[side][r]), -FLT_MAX);  // two of each of four quarters reach it
    }

  // Second sweep. Each thread lists at most eight candidates of its own quarter.
  Candidate* lists = reinterpret_cast<Candidate*>(memory) + threadIdx.x;
  int held[2][2] = {};
  float js[2] = {}, ab[2] = {}, aa[2] = {}, bb[2] = {};
  for (int i = 0; i < tiles; i++) {
    const int item = 2 * tiles + 2 * i, t0 = key_begin + i * KN;
    __pipeline_wait_prior(0);
    __syncthreads();
    if (i + 1 < tiles) fetch(item + 2), fetch(item + 3);
    __pipeline_commit();
    if (t0 >= warp_last || t0 + KN <= warp_first) continue;
    const bool edge = t0 < all_first || t0 + KN > all_last;
    float x[2][KN / 8][4];
    levels<T, D, KN>(x[0], fq[0], Ks + (item & 3) * KN, a.squash, t0, edge, first, last);
    levels<T, D, KN>(x[1], fq[1], Ks + ((item + 1) & 3) * KN, b.squash, t0, edge, first, last);
#pragma unroll
    for (int n = 0; n < KN / 8; n++) {
      bool some = false;
#pragma unroll
      for (int j = 0; j < 4; j++) some |= x[0][n][j] >= bound[0][j >> 1] || x[1][n][j] >= bound[1][j >> 1];
      if (some) {
#pragma unroll
        for (int side = 0; side < 2; side++)
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int r = j >> 1, key = t0 + n * 8 + (lane & 3) * 2 + (j & 1);
            Candidate* list = lists + (side * 2 + r) * kTop * THREADS;
            if (!(x[side][n][j] >= bound[side][r])) continue;
            if (held[side][r] < kTop) list[held[side][r]++ * THREADS] = {x[side][n][j], key};
            else bound[side][r] = replace_least<THREADS>(list, x[side][n][j], key);
          }
      }
      // With m = (a + b) / 2 and u = (a - b) / (a + b), the divergence is the sum of m f(u),
      // f(u) = ((1 - u) log(1 - u) + (1 + u) log(1 + u)) / 2 = u^2 / 2 + u^4 / 12 + u^6 / 30 + ...: nothing cancels.
      float u[4], both[4], f[4];
      bool far = false;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int r = j >> 1;
        const float pa = power2(fmaf(x[0][n][j], a.rate, -lse[0][r])), pb = power2(fmaf(x[1][n][j], b.rate, -lse[1][r]));
        both[j] = pa + pb;
        u[j] = (pa - pb) * reciprocal(fmaxf(both[j], 1e-37f));
        ab[r] = fmaf(pa, pb, ab[r]), aa[r] = fmaf(pa, pa, aa[r]), bb[r] = fmaf(pb, pb, bb[r]);
        const float z = u[j] * u[j];
        far |= z > 0.25f;
        f[j] = z * fmaf(z, fmaf(z, fmaf(z, fmaf(z, fmaf(z, fmaf(z, fmaf(z, 1 / 240.f, 1 / 182.f), 1 / 132.f), 1 / 90.f), 1 / 56.f), 1 / 30.f), 1 / 12.f), 0.5f);
      }
      if (far) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float low = fmaxf(1 - fabsf(u[j]), 0.f), high = 1 + fabsf(u[j]);
          if (u[j] * u[j] > 0.25f) f[j] = 0.34657359f * fmaf(low, logarithm2(fmaxf(low, 1e-37f)), high * logarithm2(high));
        }
      }
#pragma unroll
      for (int j = 0; j < 4; j++) js[j >> 1] = fmaf(both[j], f[j], js[j >> 1]);
    }
  }
  __pipeline_wait_prior(0);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int keys[2][kTop], common = 0;
#pragma unroll
    for (int side = 0; side < 2; side++) greatest<THREADS>(keys[side], lists + (side * 2 + r) * kTop * THREADS, held[side][r]);
#pragma unroll
    for (int i = 0; i < kTop; i++)
#pragma unroll
      for (int j = 0; j < kTop; j++) common += keys[0][i] == keys[1][j] && keys[0][i] != INT_MAX;
    js[r] = row_sum(js[r]), ab[r] = row_sum(ab[r]), aa[r] = row_sum(aa[r]), bb[r] = row_sum(bb[r]);
    const int s = ws + (lane >> 2) + r * 8, n = last[r] - first[r];
    if (s >= p.S || (lane & 3) != 0) continue;
    float* result = out + ((int64_t(batch) * p.H + h) * p.S + s) * 3;
    result[0] = n > 0 ? 0.5f * js[r] : NAN;
    result[1] = n > 0 ? ab[r] / sqrtf(aa[r] * bb[r]) : NAN;
    result[2] = n > 0 ? float(common) / float(min(kTop, n)) : NAN;
  }
}

template <class T, int D, int KN, int WARPS, int BLOCKS>
int launch_tiles(dc_context* c, const dc_call* call, const Problem& p) {
  using Shape = CompareShape<T, D, KN, WARPS>;
  if (Shape::bytes > c->shared_limit) return launch_rows(c, call, p);
  const Side a(call->t[1], call->t[2], float(call->f[0]), float(call->f[2])), b(call->t[3], call->t[4], float(call->f[1]), float(call->f[3]));
  const auto kernel = compare_tiles<T, D, KN, WARPS, BLOCKS>;
  DC_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(Shape::bytes)));
  kernel<<<dim3(unsigned(ceil_div(p.S, Shape::QM)), unsigned(p.H), unsigned(p.B)), Shape::THREADS, Shape::bytes, c->stream>>>(data<float>(call->t[0]), a, b, p);
  return launched(c, "attention_compare");
}
template <class T>
int choose_tiles(dc_context* c, const dc_call* call, const Problem& p) {
  const int64_t d = std::max(call->t[1].dim[3], call->t[3].dim[3]);
  if (d <= 64) return launch_tiles<T, 64, 64, 4, 2>(c, call, p);
  if (d <= 128) return launch_tiles<T, 128, 32, 4, 3>(c, call, p);
  if (d <= 192) return launch_tiles<T, 192, 32, 4, 2>(c, call, p);
  return launch_tiles<T, 256, 32, 4, 1>(c, call, p);
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_attention_compare(dc_context* c, const dc_call* call) {
  const dc_tensor &out = call->t[0], &qa = call->t[1], &ka = call->t[2], &qb = call->t[3], &kb = call->t[4];
  if (count(out) == 0) return 0;
  const Problem p = problem_of(call, qa, ka, 0, call->t[5]);
  bool tiles = p.H < 65536 && p.B < 65536 && call->f[0] > 0 && call->f[1] > 0;
  for (const dc_tensor* t : {&qa, &ka, &qb, &kb})
    tiles = tiles && t->dtype == qa.dtype && t->dtype != DC_F32 && t->dim[3] <= 256 && t->dim[3] % 8 == 0 && sixteen(*t);
  if (!tiles) return launch_rows(c, call, p);
  return qa.dtype == DC_BF16 ? choose_tiles<bf16>(c, call, p) : choose_tiles<f16>(c, call, p);
}
