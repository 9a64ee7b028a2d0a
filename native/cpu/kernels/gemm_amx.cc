// Matrix multiplication on AMX tiles (Intel Xeon from Sapphire Rapids on): of bf16 operands, products exact, sums in fp32;
// of fp32 operands split into two bf16 parts each. Only the "amx" compilation of this file holds anything, and "tiles", the
// same with the tile instructions emulated.
#include "gemm.h"

#include "tiles.h"
#if !defined(__AMX_TILE__)
#include "soft_tiles.h"
#endif

namespace dc {
namespace {

// Four tile registers are the accumulators of a block of 32 x 32.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kConfig;

// The parts high + low of n <= 32 values, in bf16.
inline void split(uint16_t* high, uint16_t* low, const float* from, int64_t stride, int64_t n) {
  alignas(64) float rest[KB] = {};
  if (stride != 1 || n % W != 0) {
    for (int64_t i = 0; i < n; i++) rest[i] = from[i * stride];
    from = rest;
  }
  for (int64_t i = 0; i < n; i += W) {
    const vf x = loadf(from + i);
    const vu h = to_bf16(x), l = to_bf16(x - (vf)h);
    const vh upper = __builtin_convertvector(h >> 16, vh), lower = __builtin_convertvector(l >> 16, vh);
    memcpy(high + i, &upper, sizeof upper);
    memcpy(low + i, &lower, sizeof lower);
  }
}

// As pack, of fp32 values: 32 positions of a panel are its two tiles of high parts, then the two of low parts.
template <Tile tile>
void pack_parts(void* dst, const void* src, int, int64_t line_stride, int64_t position_stride, int64_t lines, int64_t k) {
  const auto* from = static_cast<const float*>(src);
  auto* to = static_cast<uint16_t*>(dst);
  alignas(64) uint16_t high[kTile], low[kTile];
  const bool across = line_stride == 1 && position_stride != 1;  // then a row of these is a position, else a line
  for (int64_t i0 = 0; i0 < lines; i0 += kLines)
    for (int64_t p0 = 0; p0 < k; p0 += KB, to += 4 * kTile)
      for (int64_t half = 0; half < 2; half++) {
        const int64_t i = i0 + 16 * half, m = lines - i < 0 ? 0 : lines - i < 16 ? lines - i : 16, n = k - p0 < KB ? k - p0 : KB;
        if (m < 16 || n < KB) {
          memset(high, 0, sizeof high);
          memset(low, 0, sizeof low);
        }
        const float* corner = from + i * line_stride + p0 * position_stride;
        if (across) {
          for (int64_t p = 0; p < n; p++) split(high + p * 16, low + p * 16, corner + p * position_stride, 1, m);
        } else {
          for (int64_t r = 0; r < m; r++) split(high + r * KB, low + r * KB, corner + r * line_stride, position_stride, n);
        }
        tile(to + half * kTile, high, across ? 1 : KB, across ? 16 : 1, 16, KB);
        tile(to + (2 + half) * kTile, low, across ? 1 : KB, across ? 16 : 1, 16, KB);
      }
}

// Four accumulators += two tiles of A times two of B, which registers 4 to 7 hold.
inline __attribute__((always_inline)) void products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}
inline __attribute__((always_inline)) void load_a(const uint16_t* tiles) {
  _tile_loadd(4, tiles, 64);
  _tile_loadd(5, tiles + kTile, 64);
}
inline __attribute__((always_inline)) void load_b(const uint16_t* tiles) {
  _tile_loadd(6, tiles, 64);
  _tile_loadd(7, tiles + kTile, 64);
}
// The same of tiles in memory, loads between products.
inline __attribute__((always_inline)) void products(const uint16_t* a, const uint16_t* b) {
  _tile_loadd(6, b, 64);
  _tile_loadd(4, a, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b + kTile, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, a + kTile, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}
inline __attribute__((always_inline)) void load_sums(const float* c, int64_t ldc) {  // NULL: zeros
  if (!c) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, c, ldc * 4);
  _tile_loadd(1, c + 16, ldc * 4);
  _tile_loadd(2, c + 16 * ldc, ldc * 4);
  _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
}
inline __attribute__((always_inline)) void store_sums(float* c, int64_t ldc) {
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  _tile_stored(2, c + 16 * ldc, ldc * 4);
  _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

// Parts of an operand: 1, or high and low, whose product with each other is left out (2^-16 of a term and less). Every sum
// runs through all positions in order, whether its tile is whole or at an edge, and whatever was summed in a call before.
template <int kParts>
void block(float* c, int64_t ldc, const void* a, const void* b, int64_t m, int64_t n, int64_t k, bool accumulate) {
  _tile_loadconfig(&kConfig);
  alignas(64) float edge[kLines * kLines];
  const int64_t panel = kLines * k * kParts;
  for (int64_t j = 0; j < n; j += kLines) {
    for (int64_t i = 0; i < m; i += kLines) {
      const uint16_t* pa = static_cast<const uint16_t*>(a) + i / kLines * panel;
      const uint16_t* pb = static_cast<const uint16_t*>(b) + j / kLines * panel;
      const int64_t rows = m - i < kLines ? m - i : kLines, columns = n - j < kLines ? n - j : kLines;
      const bool whole = rows == kLines && columns == kLines;
      float *to = c + i * ldc + j, *at = whole ? to : edge;
      const int64_t stride = whole ? ldc : kLines;
      if (!whole && accumulate) {
        for (int64_t r = 0; r < rows; r++) memcpy(edge + r * kLines, to + r * ldc, size_t(columns) * 4);
        asm volatile("" ::: "memory");  // GCC does not know that loads of tiles read what was stored here
      }
      load_sums(accumulate ? at : nullptr, stride);
      for (int64_t p = 0; p < k; p += KB, pa += 2 * kParts * kTile, pb += 2 * kParts * kTile) {
        if (kParts == 1) {
          products(pa, pb);
        } else {
          load_a(pa + 2 * kTile);
          load_b(pb);
          products();
          load_a(pa);
          products();
          load_b(pb + 2 * kTile);
          products();
        }
      }
      store_sums(at, stride);
      if (!whole)
        for (int64_t r = 0; r < rows; r++) memcpy(to + r * ldc, edge + r * kLines, size_t(columns) * 4);
    }
  }
  _tile_release();
}

// One panel of A. The sums of a block of 32 x 32 are rounded while the products of the next one run.
void block_bf16(uint16_t* out, int64_t ldo, bool transposed, const float* before, int64_t ld, const void* a, const void* b,
                int64_t m, int64_t n, int64_t k) {
  _tile_loadconfig(&kConfig);
  alignas(64) float sums[2][kLines * kLines], turned[kLines * kLines];
  const float* from = nullptr;
  uint16_t* to = nullptr;
  int64_t row = 0, rows = 0, columns = 0;
  auto round = [&](int64_t count) __attribute__((always_inline)) {
    for (; count > 0 && row < rows; count--, row++) round_row(to + row * ldo, from + row * kLines, columns);
  };
  const int64_t share = (kLines * KB + k - 1) / k;
  for (int64_t j = 0; j < n; j += kLines) {
    const auto *pa = static_cast<const uint16_t*>(a), *pb = static_cast<const uint16_t*>(b) + j * k;
    load_sums(before ? before + j : nullptr, ld);
    for (int64_t p = 0; p < k; p += KB, pa += 2 * kTile, pb += 2 * kTile) {
#pragma GCC unroll 32
      for (int i = 0; i < 32; i++) __builtin_prefetch(pb + 8 * kTile + i * KB);  // four steps ahead
      products(pa, pb);
      round(share);
    }
    round(kLines);
    float* sum = sums[j / kLines % 2];
    store_sums(transposed ? turned : sum, kLines);
    if (transposed) transpose_block(sum, turned);
    const int64_t width = n - j < kLines ? n - j : kLines;
    from = sum, row = 0;
    to = out + (transposed ? j * ldo : j), rows = transposed ? width : m, columns = transposed ? m : width;
  }
  round(kLines);
  _tile_release();
}

}  // namespace

#if defined(__AMX_TILE__)
constexpr const char* kName = "amx";
#else
constexpr const char* kName = "tiles";
#endif
extern const Panels DC_FOR_ISA(panels), DC_FOR_ISA(split_panels);
const Panels DC_FOR_ISA(panels) = {kLines, kLines, KB, 2, 0x80008000, 512, 256, pack_a, pack<tile_b>, block<1>, block_bf16, 1 << 20, KB, kName};
const Panels DC_FOR_ISA(split_panels) = {kLines, kLines, KB, 4, 0x80008000, 256, 256, pack_parts<tile_a>, pack_parts<tile_b>, block<2>, nullptr, 1 << 20, KB, kName};

}  // namespace dc
