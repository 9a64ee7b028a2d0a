// y = x W' for packed 4-bit weights and few rows of x on sm_90 and later: bulk copies bring whole rows of weights.
#include <algorithm>

#include "int4.cuh"

namespace dc {
namespace {

// WARPS multiply; one more asks for the weights.
constexpr int WARPS = 16, ROWS = 16, STAGE_PIECES = 32, MOST_STAGES = 5, FEWEST_STAGES = 2;
constexpr int THREADS = (WARPS + 1) * 32;

// A tile: 16 rows of W. A stage: a tile's words of up to STAGE_PIECES pieces of 128 columns, padded so that eight lanes
// that read two rows meet all banks. With a tile's first stage come its scales and zeros.
struct BulkLayout {
  int pieces, chunks, chunk_pieces, M, stages, tile_slots;
  int row_bytes, stage_bytes, scale_bytes, tile_bytes;
  __host__ __device__ BulkLayout(int K, int M, int scale_size, bool zeros, int stages)
      : pieces(K / 128), chunks((pieces + STAGE_PIECES - 1) / STAGE_PIECES), chunk_pieces((pieces + chunks - 1) / chunks), M(M), stages(stages), tile_slots(1 + (stages + chunks - 2) / chunks), row_bytes((chunk_pieces | 1) * 64), stage_bytes(ROWS * row_bytes), scale_bytes(ROWS * pieces * scale_size), tile_bytes(scale_bytes + (zeros ? 2 * pieces * 4 : 0)) {}
  __host__ __device__ int barriers() const { return stages * stage_bytes; }
  __host__ __device__ int tiles() const { return barriers() + stages * 16; }
  __host__ __device__ int x_words() const { return pieces * 16 + 4; }
  __host__ __device__ int x() const { return tiles() + tile_slots * tile_bytes; }
  __host__ __device__ int sums() const { return x() + M * x_words() * 16; }
  __host__ __device__ int partial() const { return sums() + pieces * 32; }
  __host__ __device__ int bytes() const { return partial() + 2 * WARPS * ROWS * M * 4; }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"); }
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory"); }
__device__ __forceinline__ bool passed(uint32_t barrier, int parity) {
  uint32_t is;
  asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(is) : "r"(barrier), "r"(parity) : "memory");
  return is;
}
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* global, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void sync_multipliers() { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); }
__device__ __forceinline__ void wait_for(uint32_t barrier, int parity) {
  for (int tries = 0; !passed(barrier, parity); tries++)
    if (tries == 1 << 22) __trap();  // seconds: a lost copy is an error, not a hang
}

// One lane asks for stage after stage, as soon as all warps are done with what lay there.
__device__ __forceinline__ void request(const BulkLayout& layout, const uint32_t* words, int64_t word_row, const unsigned char* scale, const uint32_t* zero, int tiles, uint32_t memory) {
  const uint32_t full = memory + layout.barriers(), empty = full + layout.stages * 8;
  int slot = 0, round = 0, tile_slot = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int chunk = 0; chunk < layout.chunks; chunk++) {
      const int bytes = min(layout.chunk_pieces, layout.pieces - chunk * layout.chunk_pieces) * 64;
      const uint32_t barrier = full + slot * 8;
      wait_for(empty + slot * 8, (round & 1) ^ 1);
      arrive_and_expect(barrier, ROWS * bytes + (chunk ? 0 : layout.tile_bytes));
      const uint32_t* from = words + int64_t(tile) * ROWS * word_row + chunk * layout.chunk_pieces * 16;
      uint32_t to = memory + slot * layout.stage_bytes;
      for (int r = 0; r < ROWS; r++, from += word_row, to += layout.row_bytes) bulk_copy(to, from, bytes, barrier);
      if (chunk == 0) {
        const uint32_t scales = memory + layout.tiles() + tile_slot * layout.tile_bytes;
        bulk_copy(scales, scale + int64_t(tile) * layout.scale_bytes, layout.scale_bytes, barrier);
        if (zero) bulk_copy(scales + layout.scale_bytes, zero + int64_t(tile) * 2 * layout.pieces, layout.pieces * 8, barrier);
      }
      if (++slot == layout.stages) slot = 0, round++;
    }
    if (++tile_slot == layout.tile_slots) tile_slot = 0;
  }
  let_next_begin();
}
#endif

// S: of the scales.
template <class S>
__global__ void __launch_bounds__(THREADS, 1) int4_bulk_rows(dc_tensor y, dc_tensor x, const uint32_t* __restrict__ words, int64_t word_row, const S* scale, const uint32_t* zero, dc_tensor bias, int tiles, int K, int m0, int M, int stages) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char memory[];
  const BulkLayout layout(K, M, sizeof(S), zero != nullptr, stages);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const uint32_t full = shared_address(memory) + layout.barriers(), empty = full + stages * 8;
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; s++) barrier_init(full + s * 8, 1), barrier_init(empty + s * 8, WARPS);
    barriers_ready();
  }
  __syncthreads();
  if (warp == WARPS) {
    // Who wrote the words may still run. (The first stages into L2 before this made it slower by an eighth.)
    wait_for_earlier();
    if (lane == 0) request(layout, words, word_row, reinterpret_cast<const unsigned char*>(scale), zero, tiles, shared_address(memory));
    return;
  }
  uint4* xp = reinterpret_cast<uint4*>(memory + layout.x());
  float* sums = reinterpret_cast<float*>(memory + layout.sums());
  wait_for_earlier();
  stage_x(xp, sums, x, m0, M, K, layout.x_words(), 16, layout.pieces * 16, threadIdx.x, WARPS * 32);
  sync_multipliers();
  // Rows of x from M on do not exist: what their columns of the product hold is nobody's concern.
  const uint4* const mine = xp + min(g, M - 1) * layout.x_words() + t;
  const int r8 = threadIdx.x / 8, part = threadIdx.x % 8;
  int slot = 0, round = 0, tile_slot = 0, buffer = 0;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
    const unsigned char* with_tile = memory + layout.tiles() + tile_slot * layout.tile_bytes;
    const S *sa = reinterpret_cast<const S*>(with_tile) + g * layout.pieces, *sb = sa + 8 * layout.pieces;
    const uint32_t *za = reinterpret_cast<const uint32_t*>(with_tile + layout.scale_bytes), *zb = za + layout.pieces;
    float acc[4] = {};
    int p = warp;
#pragma unroll 1
    for (int begin = 0; begin < layout.pieces; begin += layout.chunk_pieces) {
      const int end = min(begin + layout.chunk_pieces, layout.pieces);
      wait_for(full + slot * 8, round & 1);
      const unsigned char* at = memory + slot * layout.stage_bytes + g * layout.row_bytes + t * 16 - begin * 64;
#pragma unroll 1
      for (; p < end; p += WARPS) {
        const uint4 a = *reinterpret_cast<const uint4*>(at + p * 64), b = *reinterpret_cast<const uint4*>(at + 8 * layout.row_bytes + p * 64);
        const uint4* v = mine + p * 16;
        const float2 sum = *reinterpret_cast<const float2*>(sums + p * 8 + 2 * t);
        float z0 = 136.f, z1 = 136.f;
        if (zero) z0 = 128.f + float(za[p] >> (g * 4) & 15), z1 = 128.f + float(zb[p] >> (g * 4) & 15);
        float c[4] = {z0 * sum.x, z0 * sum.y, z1 * sum.x, z1 * sum.y}, d[4] = {};  // two chains: each product waits for the last of its own
        multiply(d, a.y, b.y, v[4]);
        multiply(c, a.x, b.x, v[0]);
        multiply(d, a.w, b.w, v[12]);
        multiply(c, a.z, b.z, v[8]);
        const float s0 = to_float(sa[p]), s1 = to_float(sb[p]);
        acc[0] = fmaf(s0, c[0] + d[0], acc[0]), acc[1] = fmaf(s0, c[1] + d[1], acc[1]);
        acc[2] = fmaf(s1, c[2] + d[2], acc[2]), acc[3] = fmaf(s1, c[3] + d[3], acc[3]);
      }
      __syncwarp();
      if (lane == 0) arrive(empty + slot * 8);
      if (++slot == stages) slot = 0, round++;
    }
    if (++tile_slot == layout.tile_slots) tile_slot = 0;
    // Two buffers: who writes a tile's sums has met, a tile ago, those who read what lay there.
    float* partial = reinterpret_cast<float*>(memory + layout.partial()) + buffer * WARPS * ROWS * M;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (2 * t + (i & 1) < M) partial[(warp * ROWS + g + (i >> 1) * 8) * M + 2 * t + (i & 1)] = acc[i];
    sync_multipliers();
    if (r8 < ROWS && part < M) {
      const int64_t row = int64_t(tile) * ROWS + r8;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += partial[(w * ROWS + r8) * M + part];
      if (bias.data) sum += load(bias.data, bias.dtype, row * bias.stride[0]);
      store(y.data, y.dtype, (m0 + part) * y.stride[0] + row, sum);
    }
  }
#endif
}

}  // namespace

// Groups of 128; whole tiles and pieces; words, scales and zeros as bulk copies want them: in rows of multiples of 16
// bytes, scales and zeros of a tile in one.
int int4_bulk(dc_context* c, const dc_call* call, bool* done) {
  *done = false;
  if (c->capability < 90) return 0;
  const dc_tensor &y = call->t[0], &x = call->t[1], &words = call->t[2], &scale = call->t[3], &zero = call->t[4], &bias = call->t[5];
  const int64_t M = x.dim[0], K = x.dim[1], N = y.dim[1], groups = K / 128;
  const auto aligned = [](const dc_tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; };
  if (call->i[0] != 128 || K % 128 || N % ROWS || !aligned(words) || words.stride[0] % 4 || !aligned(scale) || scale.stride[0] != groups || (present(zero) && (!aligned(zero) || zero.stride[0] != groups || groups % 2))) return 0;
  const auto needs = [&](int m, int stages) { return size_t(BulkLayout(int(K), m, int(dtype_size(scale.dtype)), present(zero), stages).bytes()); };
  int most = int(std::min<int64_t>(M, 8)), stages = MOST_STAGES;
  while (most && needs(most, FEWEST_STAGES) > c->shared_limit) most--;
  if (!most) return 0;
  while (stages > FEWEST_STAGES && needs(most, stages) > c->shared_limit) stages--;
  const int64_t tiles = N / ROWS, blocks = ceil_div(tiles, ceil_div(tiles, c->multiprocessors));
  return [&]() -> int {
    DC_FLOAT(scale.dtype, S, {
      cudaLaunchAttribute early;
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      if (prepare(c, reinterpret_cast<const void*>(int4_bulk_rows<S>), &early.val.programmaticStreamSerializationAllowed)) return 1;
      if (!early.val.programmaticStreamSerializationAllowed) return 0;  // built for something older
      for (int64_t m0 = 0; m0 < M; m0 += most) {
        const int m = int(std::min<int64_t>(M - m0, most));
        const cudaLaunchConfig_t launch = {dim3(unsigned(blocks)), dim3(THREADS), needs(m, stages), c->stream, &early, 1};
        DC_CUDA(cudaLaunchKernelEx(&launch, int4_bulk_rows<S>, y, x, static_cast<const uint32_t*>(words.data), words.stride[0], static_cast<const S*>(scale.data), static_cast<const uint32_t*>(zero.data), bias, int(tiles), int(K), int(m0), m, stages));
      }
      *done = true;
    });
    return 0;
  }();
}

}  // namespace dc
