// y = x W' for packed 4-bit weights. Few rows of x: a kernel that reads every weight once and multiplies on tensor
// cores; many: the weights are unpacked once into 16 bits and cuBLAS does the rest.
#include <algorithm>
#include <map>
#include <mutex>

#include "int4.cuh"

namespace dc {
namespace {

__device__ __forceinline__ void fetch_async(uint32_t to, const void* global, int bytes, bool there) {
  const int size = there ? bytes : 0;  // the rest is filled with zeros
  if (bytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size));
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(size));
}

// A team of SPLIT warps takes tiles of 16 rows of W one after another, K split over its warps in pieces of 128 columns;
// the teams of a block share M <= 8 rows of x, brought in once. A lane fetches the weights that itself multiplies, AHEAD
// pieces (also of the next tile) before it needs them, so that nothing waits for another lane. A word gives the pairs
// (k, k + 4): x is kept in that order in shared memory. Per group: sum (128 + u) x on tensor cores, exact products, from
// -(128 + zero) sum x on; times the scale.
// Where launches overlap, the next one's block brings EARLY bytes of each row of its first tile into L2.
constexpr int AHEAD = 4, ROWS = 16, MAX_THREADS = 512, EARLY = 2048;

struct Int4Layout {
  int pieces, groups, words, scale_bytes;  // of a row of scales, in shared memory
  int summed, M, teams, split;             // words of x that share a sum: those of a group, at most a piece
  __host__ __device__ Int4Layout(int K, int group, int M, int scale_size, int teams, int split)
      : pieces((K + 127) / 128), groups((K + group - 1) / group), words(pieces * 16 + 4), scale_bytes((groups * scale_size + 3) / 4 * 4), summed(group < 128 ? group / 8 : 16), M(M), teams(teams), split(split) {}
  __host__ __device__ size_t x() const { return size_t(teams) * split * AHEAD * 64 * 16; }
  __host__ __device__ size_t sums() const { return x() + size_t(M) * words * 16; }  // [sum][8] -sum of x
  __host__ __device__ size_t scales() const { return sums() + size_t(pieces) * (16 / summed) * 8 * 4; }
  __host__ __device__ size_t partial() const { return scales() + size_t(teams) * 2 * ROWS * scale_bytes; }
  __host__ __device__ size_t bytes() const { return partial() + size_t(teams) * split * ROWS * M * 4; }
};

enum { NARROW, ONE, SEVERAL };  // groups of 32 or 64; of 128, a piece each; of several pieces

// KIND: of groups. S: of the scales.
template <int KIND, int SPLIT, class S>
__global__ void __launch_bounds__(MAX_THREADS) int4_rows(dc_tensor y, dc_tensor x, const uint32_t* __restrict__ words, int64_t word_row, dc_tensor scale, const uint32_t* zero, int64_t zero_row,
                                                                   dc_tensor bias, int64_t N, int K, int group, int m0, int M) {
  extern __shared__ __align__(16) unsigned char memory[];
  constexpr bool WIDE = KIND != NARROW;
  constexpr int TEAM = SPLIT * 32;
  const int teams = blockDim.x / TEAM, team = threadIdx.x / TEAM, member = threadIdx.x % TEAM;
  const Int4Layout layout(K, group, M, sizeof(S), teams, SPLIT);
  const int pieces = layout.pieces, groups = layout.groups;
  const int lane = threadIdx.x & 31, warp = member >> 5, g = lane >> 2, t = lane & 3;
  const uint4* ring = reinterpret_cast<const uint4*>(memory) + (threadIdx.x >> 5) * AHEAD * 64 + lane;
  const uint32_t ring_address = shared_address(ring);
  uint4* xp = reinterpret_cast<uint4*>(memory + layout.x());
  float* sums = reinterpret_cast<float*>(memory + layout.sums());
  unsigned char* scales = memory + layout.scales() + team * 2 * ROWS * layout.scale_bytes;
  float* partial = reinterpret_cast<float*>(memory + layout.partial()) + team * SPLIT * ROWS * M;
  auto team_sync = [&] { asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(TEAM) : "memory"); };
  const int whole = K / 128, word_count = (K + 7) / 8;  // pieces that lie wholly within a row
  const int tiles = int((N + ROWS - 1) / ROWS), first_tile = blockIdx.x * teams + team, tile_step = gridDim.x * teams;
  const int per_group = KIND == SEVERAL ? group >> 7 : 1, shift = KIND == NARROW && group == 64 ? 1 : 0;
  auto row_of = [&](int tile, int r) { return min(int64_t(tile) * ROWS + r, N - 1); };
  if (member < ROWS && first_tile < tiles && word_count >= 4) fetch_into_l2(words + row_of(first_tile, member) * word_row, min(EARLY, word_count / 4 * 16));
  wait_for_earlier();
  // The next piece to be fetched; a lane's four words of it: neighbours, or (where they have groups of their own) t,
  // t + 4, t + 8, t + 12.
  int fetch_tile = first_tile, fetch_piece = warp;
  const uint32_t* wa;
  int wb;  // the row 8 below, from wa
  auto fetch_from = [&] {
    wa = words + row_of(fetch_tile, g) * word_row + warp * 16 + t * (WIDE ? 4 : 1);
    wb = int((row_of(fetch_tile, g + 8) - row_of(fetch_tile, g)) * word_row);
  };
  fetch_from();
  auto fetch = [&](uint32_t slot) {
    if (fetch_tile < tiles) {
      const uint32_t a = ring_address + slot * 1024, b = a + 512;
      if (WIDE && fetch_piece < whole) {
        fetch_async(a, wa, 16, true);
        fetch_async(b, wa + wb, 16, true);
      } else if (fetch_piece < pieces) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int back = WIDE ? t * 3 : 0;  // from the wide place to the narrow one
          const bool there = fetch_piece * 16 + j * 4 + t < word_count;
          fetch_async(a + j * 4, there ? wa - back + j * 4 : words, 4, there);
          fetch_async(b + j * 4, there ? wa + wb - back + j * 4 : words, 4, there);
        }
      }
      fetch_piece += SPLIT, wa += 16 * SPLIT;
      if (fetch_piece >= pieces) {
        fetch_piece = warp, fetch_tile += tile_step;
        if (fetch_tile < tiles) fetch_from();
        else let_next_begin();
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  // A tile's scales, as they are, eight threads a row; rows of odd length are copied by hand.
  const bool aligned = (scale.stride[0] * sizeof(S)) % 4 == 0 && (groups * sizeof(S)) % 4 == 0 && reinterpret_cast<uintptr_t>(scale.data) % 4 == 0;
  const int r8 = member / 8, part = member % 8;
  auto fetch_scales = [&](int tile, int buffer) {
    if (tile >= tiles || r8 >= ROWS) return;
    S* to = reinterpret_cast<S*>(scales + (buffer * ROWS + r8) * layout.scale_bytes);
    const S* from = static_cast<const S*>(scale.data) + row_of(tile, r8) * scale.stride[0];
    if (aligned)
      for (int k = part; k < layout.scale_bytes / 4; k += 8) fetch_async(shared_address(to) + k * 4, reinterpret_cast<const uint32_t*>(from) + k, 4, true);
    else
      for (int k = part; k < groups; k += 8) to[k] = from[k];
  };
  fetch_scales(first_tile, 0);
#pragma unroll 1
  for (int i = 0; i < AHEAD; i++) fetch(i);
  auto wait = [] { asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1)); };  // for all but the last AHEAD - 1 fetches
  stage_x(xp, sums, x, m0, M, K, layout.words, WIDE ? 16 : layout.summed, WIDE ? whole * 16 : 0, threadIdx.x, blockDim.x);
  __syncthreads();
  // Rows of x from M on do not exist: what their columns of the product hold is nobody's concern.
  const uint4* const mine = xp + min(g, M - 1) * layout.words + t;
  uint32_t slot = 0;
  int buffer = 0;
#pragma unroll 1
  for (int tile = first_tile; tile < tiles; tile += tile_step, buffer ^= 1) {
    // The scales were asked for with the first piece or a tile ago: before the last AHEAD pieces, or all is waited for.
    // (wait_all: a warp that has no piece of a short row closes no group.)
    if (tile != first_tile && pieces < SPLIT * AHEAD) asm volatile("cp.async.wait_all;");
    else wait();
    team_sync();
    fetch_scales(tile + tile_step, buffer ^ 1);  // joins the next group
    const S *sa = reinterpret_cast<const S*>(scales + (buffer * ROWS + g) * layout.scale_bytes), *sb = reinterpret_cast<const S*>(scales + (buffer * ROWS + g + 8) * layout.scale_bytes);
    const int64_t ra = row_of(tile, g), rb = row_of(tile, g + 8);
    float acc[4] = {};
    // The part that leads brings the offset of all that is summed with it.
    auto start = [&](float (&c)[4], int gi, int si, bool leads) {
      const float2 sum = *reinterpret_cast<const float2*>(sums + si * 8 + 2 * t);
      float za = 136.f, zb = 136.f;
      if (zero) za = 128.f + float(zero[ra / 8 * zero_row + gi] >> (ra % 8 * 4) & 15), zb = 128.f + float(zero[rb / 8 * zero_row + gi] >> (rb % 8 * 4) & 15);
      if (!leads) za = zb = 0;
      c[0] = za * sum.x, c[1] = za * sum.y, c[2] = zb * sum.x, c[3] = zb * sum.y;
    };
    auto add = [&](const float (&c)[4], const float (&d)[4], int gi) {
      const float s0 = to_float(sa[gi]), s1 = to_float(sb[gi]);
      acc[0] = fmaf(s0, c[0] + d[0], acc[0]), acc[1] = fmaf(s0, c[1] + d[1], acc[1]);
      acc[2] = fmaf(s1, c[2] + d[2], acc[2]), acc[3] = fmaf(s1, c[3] + d[3], acc[3]);
    };
    const uint4* v = mine + warp * 16;
#pragma unroll 1
    for (int p = warp; p < pieces; p += SPLIT, v += 16 * SPLIT) {
      wait();
      const uint4 a = ring[slot * 64], b = ring[slot * 64 + 32];
      const uint4 x4[4] = {v[0], v[4], v[8], v[12]};
      if (WIDE && p < whole) {
        const int gi = KIND == ONE ? p : p / per_group;
        float c[4], d[4] = {};  // two chains: each product waits for the last of its own
        start(c, gi, p, true);
        multiply(d, a.y, b.y, x4[1]);
        multiply(c, a.x, b.x, x4[0]);
        multiply(d, a.w, b.w, x4[3]);
        multiply(c, a.z, b.z, x4[2]);
        add(c, d, gi);
      } else {
        const uint32_t a4[4] = {a.x, a.y, a.z, a.w}, b4[4] = {b.x, b.y, b.z, b.w};
        const float nothing[4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int at = p * 4 + j, gi = WIDE ? p / per_group : at >> shift;
          if (gi >= groups) break;
          float c[4];
          start(c, gi, WIDE ? p : gi, WIDE ? j == 0 : shift == 0 || (at & 1) == 0);
          multiply(c, a4[j], b4[j], x4[j]);
          add(c, nothing, gi);
        }
      }
      fetch(slot);
      slot = (slot + 1) % AHEAD;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (2 * t + (i & 1) < M) partial[(warp * ROWS + g + (i >> 1) * 8) * M + 2 * t + (i & 1)] = acc[i];
    team_sync();
    const int64_t row = int64_t(tile) * ROWS + r8;
    if (r8 < ROWS && row < N && part < M) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < SPLIT; w++) sum += partial[(w * ROWS + r8) * M + part];
      if (bias.data) sum += load(bias.data, bias.dtype, row * bias.stride[0]);
      store(y.data, y.dtype, (m0 + part) * y.stride[0] + row, sum);
    }
  }
}

// One block on each multiprocessor. Fewest tiles for the busiest of them, then most warps.
struct Int4Plan {
  int teams = 1, split = 4, blocks = 1;
  template <class Fits>
  Int4Plan(int64_t tiles, int multiprocessors, Fits fits) {
    int64_t best = INT64_MAX;
    for (int s : {8, 4})
      for (int n = MAX_THREADS / (s * 32); n >= 1; n--) {
        const int64_t cost = ceil_div(tiles, int64_t(multiprocessors) * n) * n * MAX_THREADS - n * s * 32;
        if (cost < best && fits(n, s)) best = cost, teams = n, split = s;
      }
    blocks = int(std::min<int64_t>(multiprocessors, ceil_div(tiles, teams)));
  }
};
template <int SPLIT, class S>
auto int4_kernel(int64_t group) {
  return group == 128 ? int4_rows<ONE, SPLIT, S> : group % 128 == 0 ? int4_rows<SEVERAL, SPLIT, S> : int4_rows<NARROW, SPLIT, S>;
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

int prepare(dc_context* c, const void* kernel, int* begins_early) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> known;
  std::lock_guard lock(mutex);
  auto found = known.find({c->device, kernel});
  if (found == known.end()) {
    cudaFuncAttributes built;
    DC_CUDA(cudaFuncGetAttributes(&built, kernel));
    DC_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(c->shared_limit)));
    found = known.emplace(std::pair(c->device, kernel), c->capability >= 90 && built.ptxVersion >= 90).first;
  }
  *begins_early = found->second;
  return 0;
}

}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_int4_matmul(dc_context* c, const dc_call* call) {
  const dc_tensor &y = call->t[0], &x = call->t[1], &words = call->t[2], &scale = call->t[3], &zero = call->t[4], &bias = call->t[5];
  const int64_t M = x.dim[0], K = x.dim[1], N = y.dim[1], group = call->i[0];
  if (count(y) == 0) return 0;
  const int64_t word_row = words.stride[0];
  const auto needs = [&](int m, int teams, int split) { return Int4Layout(int(K), int(group), m, int(dtype_size(scale.dtype)), teams, split).bytes(); };
  const Int4Plan plan(ceil_div(N, ROWS), c->multiprocessors, [&](int teams, int split) { return needs(1, teams, split) <= c->shared_limit; });
  const auto shared = [&](int m) { return needs(m, plan.teams, plan.split); };
  const bool few = M <= 16 && x.dtype == DC_BF16 && x.stride[1] == 1 && y.stride[1] == 1 && word_row % 4 == 0 && reinterpret_cast<uintptr_t>(words.data) % 16 == 0 && group % 32 == 0 &&
                   (group % 128 == 0 || 128 % group == 0) && shared(1) <= c->shared_limit;
  if (few) {
    bool done;
    if (int4_bulk(c, call, &done)) return 1;
    if (done) return launched(c, "int4_matmul");
    int most = int(M < 8 ? M : 8);
    while (shared(most) > c->shared_limit) most--;
    auto kernel = int4_kernel<4, float>(group);
    DC_FLOAT(scale.dtype, S, kernel = plan.split == 4 ? int4_kernel<4, S>(group) : int4_kernel<8, S>(group));
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    if (prepare(c, reinterpret_cast<const void*>(kernel), &early.val.programmaticStreamSerializationAllowed)) return 1;
    for (int64_t m0 = 0; m0 < M; m0 += most) {
      const int m = int(M - m0 < most ? M - m0 : most);
      const cudaLaunchConfig_t launch = {dim3(plan.blocks), dim3(plan.teams * plan.split * 32), shared(m), c->stream, &early, 1};
      DC_CUDA(cudaLaunchKernelEx(&launch, kernel, y, x, data<uint32_t>(words), word_row, scale, data<uint32_t>(zero), zero.stride[0], bias, N, int(K), int(group), int(m0), m));
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
