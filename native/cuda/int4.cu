// y = x W' for packed 4-bit weights. Few rows of x: a kernel that reads every weight once and multiplies on tensor
// cores; many: the weights are unpacked once into 16 bits and cuBLAS does the rest.
#include <algorithm>

#include "cuda.cuh"

namespace dc {
namespace {

__device__ __forceinline__ void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Codes 0..15 at bits 0 and 16 -> two bf16 of 128 + code, exactly.
__device__ __forceinline__ uint32_t widen(uint32_t word, int shift) { return (word >> shift & 0x000F000Fu) | 0x43004300u; }

__device__ __forceinline__ void fetch_async(void* shared, const void* global, int bytes, bool there) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  const int size = there ? bytes : 0;  // the rest is filled with zeros
  if (bytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size));
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(size));
}

// A block takes tiles of 16 rows of W one after another, K split over its warps in pieces of 128 columns; M <= 8 rows of
// x, brought in once. A lane fetches the weights that itself multiplies, AHEAD pieces (also of the next tile) before it
// needs them, so that nothing waits for another lane. A word gives the pairs (k, k + 4): x is kept in that order in
// shared memory. Per group: sum (128 + u) x on tensor cores, exact products, times the scale; minus (128 + zero) scale
// sum x, for all groups at the end of a tile.
constexpr int WARPS = 4, AHEAD = 8, ROWS = 16, THREADS = WARPS * 32;

struct Int4Layout {
  int pieces, groups, words, M, scale_bytes;  // of a row of scales, in shared memory
  __host__ __device__ Int4Layout(int K, int group, int M, int scale_size) : pieces((K + 127) / 128), groups((K + group - 1) / group), words(pieces * 16 + 4), M(M), scale_bytes((groups * scale_size + 3) / 4 * 4) {}
  __host__ __device__ size_t x() const { return size_t(WARPS) * AHEAD * 64 * 16; }
  __host__ __device__ size_t sums() const { return x() + size_t(M) * words * 16; }  // of x by group
  __host__ __device__ size_t scales() const { return sums() + size_t(M) * groups * 4; }
  __host__ __device__ size_t partial() const { return scales() + 2 * size_t(ROWS) * scale_bytes; }
  __host__ __device__ size_t bytes() const { return partial() + size_t(WARPS) * ROWS * 8 * 4; }
};

// WIDE: groups of 128 or multiples. Else of 32 or 64. S: of the scales.
template <bool WIDE, class S>
__global__ void __launch_bounds__(THREADS) int4_rows(dc_tensor y, dc_tensor x, const uint32_t* __restrict__ words, int64_t word_row, dc_tensor scale, int scale_size, const uint32_t* zero, int64_t zero_row,
                                                     dc_tensor bias, int64_t N, int K, int group, int m0, int M) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Int4Layout layout(K, group, M, scale_size);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, thread = threadIdx.x;
  uint4* ring = reinterpret_cast<uint4*>(memory) + warp * AHEAD * 64;
  uint4* xp = reinterpret_cast<uint4*>(memory + layout.x());
  float* sums = reinterpret_cast<float*>(memory + layout.sums());
  unsigned char* scales = memory + layout.scales();
  float* partial = reinterpret_cast<float*>(memory + layout.partial());
  const int whole = K / 128, word_count = (K + 7) / 8;  // pieces that lie wholly within a row
  const int tiles = int((N + ROWS - 1) / ROWS);
  const int per_group = group >> 7, shift = group == 64 ? 1 : 0;  // pieces of a group; or groups are of one or two parts of 32
  auto row_of = [&](int tile, int r) { return min(int64_t(tile) * ROWS + r, N - 1); };
  // The next piece to be fetched; a lane's four words of it: neighbours, or (where they have groups of their own) t,
  // t + 4, t + 8, t + 12.
  int fetch_tile = blockIdx.x, fetch_piece = warp;
  const uint32_t *wa, *wb;
  auto fetch_from = [&] { wa = words + row_of(fetch_tile, g) * word_row, wb = words + row_of(fetch_tile, g + 8) * word_row; };
  fetch_from();
  auto fetch = [&](int slot) {
    if (fetch_tile < tiles) {
      const int p = fetch_piece;
      uint4 *a = ring + slot * 64 + lane, *b = a + 32;
      if (WIDE && p < whole) {
        fetch_async(a, wa + p * 16 + t * 4, 16, true);
        fetch_async(b, wb + p * 16 + t * 4, 16, true);
      } else if (p < layout.pieces) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int w = p * 16 + j * 4 + t;
          fetch_async(reinterpret_cast<uint32_t*>(a) + j, wa + (w < word_count ? w : 0), 4, w < word_count);
          fetch_async(reinterpret_cast<uint32_t*>(b) + j, wb + (w < word_count ? w : 0), 4, w < word_count);
        }
      }
      fetch_piece += WARPS;
      if (fetch_piece >= layout.pieces) {
        fetch_piece = warp, fetch_tile += gridDim.x;
        if (fetch_tile < tiles) fetch_from();
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  // A tile's scales, as they are; rows of odd length are copied by hand.
  const bool aligned = (scale.stride[0] * scale_size) % 4 == 0 && (layout.groups * scale_size) % 4 == 0 && reinterpret_cast<uintptr_t>(scale.data) % 4 == 0;
  auto fetch_scales = [&](int tile, int buffer) {
    if (tile >= tiles) return;
    unsigned char* to = scales + buffer * ROWS * layout.scale_bytes;
    const int per = aligned ? layout.scale_bytes / 4 : layout.groups;
    for (int i = thread; i < ROWS * per; i += THREADS) {
      const int r = i / per, k = i % per;
      const char* from = static_cast<const char*>(scale.data) + row_of(tile, r) * scale.stride[0] * scale_size;
      if (aligned) fetch_async(to + r * layout.scale_bytes + k * 4, from + k * 4, 4, true);
      else if (scale_size == 4) reinterpret_cast<float*>(to + r * layout.scale_bytes)[k] = reinterpret_cast<const float*>(from)[k];
      else reinterpret_cast<uint16_t*>(to + r * layout.scale_bytes)[k] = reinterpret_cast<const uint16_t*>(from)[k];
    }
  };
  fetch_scales(blockIdx.x, 0);
#pragma unroll
  for (int i = 0; i < AHEAD; i++) fetch(i);
  // x, pair by pair.
  const bool vector = K % 8 == 0 && x.stride[0] % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int m = 0; m < M; m++)
    for (int w0 = thread; w0 < layout.pieces * 16; w0 += 4 * THREADS) {
      uint4 v[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int w = w0 + i * THREADS;
        const bf16* from = static_cast<const bf16*>(x.data) + (m0 + m) * x.stride[0] + int64_t(w) * 8;
        v[i] = make_uint4(0, 0, 0, 0);
        if (vector) {
          if (w * 8 < K) v[i] = *reinterpret_cast<const uint4*>(from);
        } else {
          bf16* each = reinterpret_cast<bf16*>(&v[i]);
          for (int k = 0; k < 8; k++)
            if (w * 8 + k < K) each[k] = from[k];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int w = w0 + i * THREADS;
        if (w >= layout.pieces * 16) break;
        const int place = WIDE && w < whole * 16 ? (w & ~15) + (w & 3) * 4 + (w >> 2 & 3) : w;  // read by [4 j + t]
        xp[m * layout.words + place] = make_uint4(__byte_perm(v[i].x, v[i].z, 0x5410), __byte_perm(v[i].x, v[i].z, 0x7632), __byte_perm(v[i].y, v[i].w, 0x5410), __byte_perm(v[i].y, v[i].w, 0x7632));
      }
    }
  __syncthreads();
  // Sums of x by group, eight threads to a group.
  const int part = thread % 8;
  for (int i0 = 0; i0 < M * layout.groups; i0 += THREADS / 8) {
    const int i = i0 + thread / 8, m = i / layout.groups, gi = i % layout.groups;
    float sum = 0;
    if (i < M * layout.groups)
      for (int w = gi * (group / 8) + part; w < min((gi + 1) * (group / 8), layout.pieces * 16); w += 8) {
        const int place = WIDE && w < whole * 16 ? (w & ~15) + (w & 3) * 4 + (w >> 2 & 3) : w;
        const uint4 v = xp[m * layout.words + place];
#pragma unroll
        for (uint32_t pair : {v.x, v.y, v.z, v.w}) sum += __uint_as_float(pair << 16) + __uint_as_float(pair & 0xFFFF0000u);
      }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    sum += __shfl_xor_sync(~0u, sum, 4);
    if (part == 0 && i < M * layout.groups) sums[i] = sum;
  }
  auto multiply = [&](float (&c)[4], uint32_t a, uint32_t b, const uint4& v) {
    mma_bf16(c, widen(a, 0), widen(b, 0), widen(a, 4), widen(b, 4), v.x, v.y);
    mma_bf16(c, widen(a, 8), widen(b, 8), widen(a, 12), widen(b, 12), v.z, v.w);
  };
  const uint4 none = make_uint4(0, 0, 0, 0);
  int slot = 0, buffer = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
    // The scales were asked for a tile ago: before the last AHEAD pieces, or everything is waited for.
    if (tile == int(blockIdx.x) || layout.pieces < WARPS * AHEAD) asm volatile("cp.async.wait_group 0;");
    else asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1));
    __syncthreads();
    fetch_scales(tile + gridDim.x, buffer ^ 1);  // joins the next group
    const unsigned char* tile_scales = scales + buffer * ROWS * layout.scale_bytes;
    auto scale_at = [&](int r, int gi) { return to_float(reinterpret_cast<const S*>(tile_scales + r * layout.scale_bytes)[gi]); };
    float acc[4] = {};
    auto add = [&](const float (&c)[4], int gi) {
      const float s0 = scale_at(g, gi), s1 = scale_at(g + 8, gi);
      acc[0] = fmaf(s0, c[0], acc[0]), acc[1] = fmaf(s0, c[1], acc[1]);
      acc[2] = fmaf(s1, c[2], acc[2]), acc[3] = fmaf(s1, c[3], acc[3]);
    };
    for (int p = warp; p < layout.pieces; p += WARPS) {
      asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1));
      const uint4 a = ring[slot * 64 + lane], b = ring[slot * 64 + 32 + lane];
      const uint4* v = xp + g * layout.words + p * 16 + t;
      uint4 x4[4];
#pragma unroll
      for (int j = 0; j < 4; j++) x4[j] = g < M ? v[4 * j] : none;
      if (WIDE && p < whole) {
        float c[4] = {};
        multiply(c, a.x, b.x, x4[0]);
        multiply(c, a.y, b.y, x4[1]);
        multiply(c, a.z, b.z, x4[2]);
        multiply(c, a.w, b.w, x4[3]);
        add(c, per_group == 1 ? p : p / per_group);
      } else {
        const uint32_t a4[4] = {a.x, a.y, a.z, a.w}, b4[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float c[4] = {};
          multiply(c, a4[j], b4[j], x4[j]);
          add(c, min(per_group == 0 ? (p * 4 + j) >> shift : p / per_group, layout.groups - 1));
        }
      }
      fetch(slot);
      slot = slot + 1 == AHEAD ? 0 : slot + 1;
    }
    float* here = partial + warp * (ROWS * 8);
    here[g * 8 + 2 * t] = acc[0], here[g * 8 + 2 * t + 1] = acc[1];
    here[(g + 8) * 8 + 2 * t] = acc[2], here[(g + 8) * 8 + 2 * t + 1] = acc[3];
    // What the codes' offset added: eight threads a row, each its groups.
    const int r = thread / 8;
    const int64_t row = row_of(tile, r);
    float offset[8] = {};
    for (int gi = part; gi < layout.groups; gi += 8) {
      const float s = scale_at(r, gi) * (128.f + (zero ? float(zero[row / 8 * zero_row + gi] >> (row % 8 * 4) & 15) : 8.f));
#pragma unroll
      for (int m = 0; m < 8; m++)
        if (m < M) offset[m] = fmaf(s, sums[m * layout.groups + gi], offset[m]);
    }
    float correction = 0;
#pragma unroll
    for (int m = 0; m < 8; m++) {
      if (m >= M) break;
      float sum = offset[m];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      sum += __shfl_xor_sync(~0u, sum, 4);
      if (part == m) correction = sum;
    }
    __syncthreads();
    float sum = -correction;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += partial[w * (ROWS * 8) + r * 8 + part];
    if (int64_t(tile) * ROWS + r < N && part < M) {
      if (bias.data) sum += load(bias.data, bias.dtype, row * bias.stride[0]);
      store(y.data, y.dtype, (m0 + part) * y.stride[0] + row, sum);
    }
  }
}

template <class T>
__global__ void unpack_weights(T* w, const uint32_t* words, int64_t word_row, dc_tensor scale, const uint32_t* zero, int64_t zero_row, int64_t N, int64_t K, int64_t group) {
  const int64_t per = (K + 7) / 8;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < N * per; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t r = i / per, k0 = i % per * 8;
    const uint32_t word = words[r * word_row + i % per];
    for (int k = 0; k < 8 && k0 + k < K; k++) {
      const int64_t g = (k0 + k) / group;
      const float z = zero ? float(zero[r / 8 * zero_row + g] >> (r % 8 * 4) & 15) : 8.f;
      w[r * K + k0 + k] = from_float<T>((float(word >> (4 * k) & 15) - z) * load(scale.data, scale.dtype, r * scale.stride[0] + g));
    }
  }
}

__global__ void add_row_bias(dc_tensor y, dc_tensor bias, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t at = i / y.dim[1] * y.stride[0] + i % y.dim[1];
    store(y.data, y.dtype, at, load(y.data, y.dtype, at) + load(bias.data, bias.dtype, i % y.dim[1] * bias.stride[0]));
  }
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_int4_matmul(dc_context* c, const dc_call* call) {
  const dc_tensor &y = call->t[0], &x = call->t[1], &words = call->t[2], &scale = call->t[3], &zero = call->t[4], &bias = call->t[5];
  const int64_t M = x.dim[0], K = x.dim[1], N = y.dim[1], group = call->i[0];
  if (count(y) == 0) return 0;
  const int64_t word_row = words.stride[0];
  const auto shared = [&](int m) { return Int4Layout(int(K), int(group), m, int(dtype_size(scale.dtype))).bytes(); };
  const bool few = M <= 16 && x.dtype == DC_BF16 && x.stride[1] == 1 && y.stride[1] == 1 && word_row % 4 == 0 && reinterpret_cast<uintptr_t>(words.data) % 16 == 0 && group % 32 == 0 &&
                   (group % 128 == 0 || 128 % group == 0) && shared(1) <= c->shared_limit;
  if (few) {
    int most = int(M < 8 ? M : 8);
    while (shared(most) > c->shared_limit) most--;
    const bool wide = group % 128 == 0;
    auto kernel = int4_rows<true, float>;
    DC_FLOAT(scale.dtype, S, kernel = wide ? int4_rows<true, S> : int4_rows<false, S>);
    for (int64_t m0 = 0; m0 < M; m0 += most) {
      const int m = int(M - m0 < most ? M - m0 : most);
      DC_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(c->shared_limit)));
      const int64_t tiles = ceil_div(N, ROWS), per = std::max<int64_t>(1, std::min<int64_t>(5, int64_t(c->shared_limit) / int64_t(shared(m) + 1024)));
      // As many blocks as run at once, and no more than give each the same number of tiles.
      const int64_t rounds = ceil_div(tiles, c->multiprocessors * per), blocks = ceil_div(tiles, rounds);
      kernel<<<unsigned(blocks), THREADS, shared(m), c->stream>>>(y, x, data<uint32_t>(words), word_row, scale, int(dtype_size(scale.dtype)), data<uint32_t>(zero), zero.stride[0], bias, N, int(K), int(group), int(m0), m);
    }
    return launched(c, "int4_matmul");
  }
  // fp32 inputs keep fp32 weights; 16-bit ones their own type.
  void* memory = scratch(c, 2, size_t(N) * K * dtype_size(x.dtype));
  if (!memory) return 1;
  DC_FLOAT(x.dtype, T, unpack_weights<T><<<grid_for(c, N * ceil_div(K, 8), 256), 256, 0, c->stream>>>(static_cast<T*>(memory), data<uint32_t>(words), word_row, scale, data<uint32_t>(zero), zero.stride[0], N, K, group));
  if (launched(c, "int4_matmul")) return 1;
  if (y.dtype != DC_F32 && y.dtype != x.dtype) return fail(c, "int4_matmul: y must be fp32 or of x's type");
  if (gemm(c, y, x, matrix(memory, x.dtype, K, N, 1, K), 1, 0, 0)) return 1;
  if (present(bias)) add_row_bias<<<grid_for(c, M * N, 256), 256, 0, c->stream>>>(y, bias, M * N);
  return launched(c, "int4_matmul bias");
}
