// Draws tokens: one of each row of logits.
#include "cuda.cuh"

namespace dc {
namespace {

constexpr int kWarps = 32;  // of a block, at most

// Order of logits as that of whole numbers; -0 is 0.
__device__ uint32_t key_of(float x) {
  const uint32_t u = __float_as_uint(x + 0.f);
  return u >> 31 ? ~u : u | 1u << 31;
}
__device__ float value_of(uint32_t key) { return __uint_as_float(key >> 31 ? key ^ 1u << 31 : ~key); }

__device__ double warp_sum(double x) {
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// A row of logits, of which each warp has a stretch of ids.
struct Row {
  const void* data;
  int dtype;
  int64_t first;  // element
  int from, to, lane, warp, warps;
  float top, inverse, min_p;

  __device__ float at(int i) const { return load(data, dtype, first + i); }
  __device__ float weight(float x) const {
    const float e = expf((x - top) * inverse);
    return e < min_p ? 0.f : e;
  }
  // Of a value for each id; parts: what each warp has of it.
  template <class F>
  __device__ double sum(double* parts, F of) const {
    double x = 0;
    for (int i = from + lane; i < to; i += 32) x += of(at(i));
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < warps; w++) x += parts[w];
    return x;
  }
  // The largest key at and above which the values sum to `goal`.
  template <class F>
  __device__ uint32_t reaching(double* parts, double goal, F of) const {
    uint32_t key = 0;
    const uint32_t most = key_of(top);
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
      const uint32_t tried = key | bit;
      if (tried <= most && sum(parts, [&](float x) { return key_of(x) >= tried ? of(x) : 0.0; }) >= goal) key = tried;
    }
    return key;
  }
};

// Ids that are left: those above the key, and the first `equals` at it.
struct Kept {
  uint32_t key = 0;
  double equals = 0;
};

__device__ Kept truncated(const Row& row, double* parts, int64_t top_k, double top_p, int64_t n) {
  Kept kept;
  const auto one = [](float) { return 1.0; };
  const auto weight = [&](float x) { return double(row.weight(x)); };
  const auto above = [&](uint32_t key, auto of) { return row.sum(parts, [&](float x) { return key_of(x) > key ? of(x) : 0.0; }); };
  if (top_k > 0 && top_k < n) {
    kept.key = row.reaching(parts, double(top_k), one);
    kept.equals = double(top_k) - above(kept.key, one);
  }
  if (top_p < 1) {
    double goal = above(kept.key, weight);
    if (kept.equals > 0) goal += kept.equals * weight(value_of(kept.key));
    goal *= top_p;
    const uint32_t key = row.reaching(parts, goal, weight);
    const double most = key > kept.key ? double(n) : kept.equals;
    kept.key = key > kept.key ? key : kept.key;
    const double each = weight(value_of(kept.key));
    const double missing = each > 0 ? ceil((goal - above(kept.key, weight)) / each) : 0;
    // The most probable token stays, whatever is asked for.
    kept.equals = fmin(most, fmax(missing, kept.key == key_of(row.top) ? 1.0 : 0.0));
  }
  return kept;
}

// One block a row.
__global__ void __launch_bounds__(32 * kWarps) sample_rows(int32_t* tokens, dc_tensor logits, const double* u, float* logprob, int64_t top_k, float temperature, double top_p, float min_p) {
  __shared__ double parts[kWarps], equals[kWarps];
  __shared__ float shared[33];
  __shared__ int token;
  const int64_t r = blockIdx.x;
  const int n = int(logits.dim[1]), lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, stretch = (n + warps - 1) / warps;
  Row row{logits.data, logits.dtype, r * logits.stride[0], min(n, warp * stretch), min(n, (warp + 1) * stretch), lane, warp, warps, 0, temperature > 0 ? 1 / temperature : 1, min_p};

  float top = -INFINITY;
  bool odd = false;
  for (int i = row.from + lane; i < row.to; i += 32) {
    const float x = row.at(i);
    odd |= !(x < INFINITY);
    top = fmaxf(top, x);
  }
  row.top = top = block_max(top, shared);
  if (threadIdx.x == 0) token = n;
  if (__syncthreads_or(odd || top == -INFINITY)) {
    if (threadIdx.x == 0) {
      tokens[r] = -1;
      if (logprob) logprob[r] = NAN;
    }
    return;
  }

  if (temperature == 0) {
    for (int i = row.from + lane; i < row.to; i += 32)
      if (row.at(i) == top) atomicMin(&token, i);
  } else {
    const Kept kept = truncated(row, parts, top_k, top_p, n);
    const double tied = kept.equals > 0 ? row.weight(value_of(kept.key)) : 0;
    const auto above = [&](float x) { return key_of(x) > kept.key ? double(row.weight(x)) : 0.0; };
    const auto equal = [&](float x) { return kept.equals > 0 && key_of(x) == kept.key; };
    row.sum(equals, [&](float x) { return equal(x) ? 1.0 : 0.0; });
    row.sum(parts, above);
    // What each warp has, with its share of the first `equals` at the key; the warp in which the sum passes u.
    double before = 0, total = 0, sum = 0, seen = 0;
    const auto part = [&](int w, double rank) { return parts[w] + tied * fmin(fmax(kept.equals - rank, 0.0), equals[w]); };
    for (int w = 0; w < warps; w++) total += part(w, seen), seen += equals[w];
    const double goal = u[r] * total;
    int chosen = -1;
    double rank = 0;
    seen = 0;
    for (int w = 0; w < warps && sum <= goal; w++) {
      const double more = part(w, seen);
      if (more > 0) chosen = w, before = sum, rank = seen;
      sum += more, seen += equals[w];
    }
    if (warp == chosen) {
      int last = row.from;
      for (int base = row.from; base < row.to; base += 32) {
        const int i = base + lane;
        const float x = i < row.to ? row.at(i) : -INFINITY;
        const bool even = i < row.to && equal(x);
        const unsigned ties = __ballot_sync(~0u, even);
        const double w = i >= row.to ? 0 : even ? (rank + __popc(ties & ((1u << lane) - 1)) < kept.equals ? tied : 0) : above(x);
        rank += __popc(ties);
        double running = w;
        for (int d = 1; d < 32; d <<= 1) {
          const double left = __shfl_up_sync(~0u, running, d);
          if (lane >= d) running += left;
        }
        const unsigned some = __ballot_sync(~0u, w > 0), passed = __ballot_sync(~0u, w > 0 && before + running > goal);
        if (passed) {
          last = base + __ffs(passed) - 1;
          break;
        }
        if (some) last = base + 31 - __clz(some);  // rounding may keep the sum from passing
        before += __shfl_sync(~0u, running, 31);
      }
      if (lane == 0) token = last;
    }
  }
  __syncthreads();
  const int drawn = token;
  if (threadIdx.x == 0) tokens[r] = drawn;
  if (!logprob) return;
  const double sum = row.sum(parts, [&](float x) { return double(expf(x - top)); });
  if (threadIdx.x == 0) logprob[r] = float(double(row.at(drawn)) - top - log(sum));
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_sample(dc_context* c, const dc_call* call) {
  const dc_tensor &tokens = call->t[0], &logits = call->t[1], &u = call->t[2], &logprob = call->t[3];
  if (logits.dim[0] == 0) return 0;
  const int threads = logits.dim[1] >= 4096 ? 1024 : 256;
  sample_rows<<<unsigned(logits.dim[0]), threads, 0, c->stream>>>(data<int32_t>(tokens), logits, data<double>(u), data<float>(logprob), call->i[0], float(call->f[0]), call->f[1], float(call->f[2]));
  return launched(c, "sample");
}
