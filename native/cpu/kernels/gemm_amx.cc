// Matrix multiplication on AMX tiles (Intel Xeon from Sapphire Rapids on): of bf16 operands, products exact, sums in fp32;
// of fp32 operands split into two bf16 parts each. Only the "amx" compilation of this file holds anything, and "tiles", the
// same with the tile instructions emulated.
#include "gemm.h"

#if defined(DC_ISA_AMX)
#include "../cpu.h"
#include "vec.h"
#if !defined(__AMX_TILE__)
#include "soft_tiles.h"
#endif

namespace dc {
namespace {

// A tile register holds 16 rows of 64 bytes. A: 16 lines x 32 positions. B: 16 pairs of positions x 16 columns x 2.
// Four accumulators make a block of 32 x 32.
constexpr int kLines = 32;     // lines of a panel, of A and of B
constexpr int KB = 32;    // positions of a tile
constexpr int64_t kTile = 16 * 32;  // bf16 values of a tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kConfig;

// 8 x 8 transpose of 32-bit values: rows `src_stride` apart -> rows `dst_stride` apart.
inline void transpose_8(uint16_t* dst, int64_t dst_stride, const uint16_t* src, int64_t src_stride) {
  __m256i r[8], t[8], s[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i * src_stride));
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    s[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    s[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    s[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    s[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i * dst_stride), _mm256_permute2x128_si256(s[i], s[i + 4], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + (i + 4) * dst_stride), _mm256_permute2x128_si256(s[i], s[i + 4], 0x31));
  }
}

// 16 x 16 of them: a tile of one operand becomes one of the other.
inline void transpose_16(uint16_t* dst, const uint16_t* src, int64_t src_stride) {
  for (int x = 0; x < 16; x += 8)
    for (int y = 0; y < 16; y += 8) transpose_8(dst + y * KB + x * 2, KB, src + x * src_stride + y * 2, src_stride);
}

// 32 positions of 16 lines that lie side by side -> row r of the tile holds positions 2r and 2r + 1 of each line.
inline void pair_positions(uint16_t* dst, const uint16_t* src, int64_t position_stride) {
  for (int r = 0; r < 16; r++, src += 2 * position_stride, dst += KB) {
    const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + position_stride));
    const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + 16), _mm256_permute2x128_si256(low, high, 0x31));
  }
}

// Row i of a tile of A: the 32 positions of line i. m lines of n positions exist; the rest is 0 already.
void tile_a(uint16_t* to, const uint16_t* from, int64_t line_stride, int64_t position_stride, int64_t m, int64_t n) {
  if (line_stride == 1 && m == 16 && n == KB) {
    alignas(64) uint16_t pairs[kTile];
    pair_positions(pairs, from, position_stride);
    transpose_16(to, pairs, KB);
    return;
  }
  for (int64_t i = 0; i < m; i++) {
    if (position_stride == 1)
      memcpy(to + i * KB, from + i * line_stride, size_t(n) * 2);
    else
      for (int64_t p = 0; p < n; p++) to[i * KB + p] = from[i * line_stride + p * position_stride];
  }
}

// Row r of a tile of B: positions 2r and 2r + 1 of line 0, then of line 1, ...
void tile_b(uint16_t* to, const uint16_t* from, int64_t line_stride, int64_t position_stride, int64_t m, int64_t n) {
  if (m == 16 && n == KB && position_stride == 1) return transpose_16(to, from, line_stride);
  if (m == 16 && n == KB && line_stride == 1) return pair_positions(to, from, position_stride);
  for (int64_t p = 0; p < n; p++)
    for (int64_t j = 0; j < m; j++) to[p / 2 * KB + j * 2 + p % 2] = from[j * line_stride + p * position_stride];
}

using Tile = decltype(tile_a);

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Tiles of 16 lines x 32 positions in the order of panels of 32 lines; both counts may fall short at the edges.
template <Tile tile>
void pack(void* dst, const void* src, int, int64_t line_stride, int64_t position_stride, int64_t lines, int64_t k) {
  auto two_tiles = [&](int64_t i0, int64_t p0) {
    const auto* from = static_cast<const uint16_t*>(src) + p0 * position_stride;
    auto* to = static_cast<uint16_t*>(dst) + i0 * up(k, KB) + p0 * kLines;
    for (int64_t i = i0; i < i0 + kLines; i += 16, to += kTile) {
      const int64_t m = lines - i < 0 ? 0 : lines - i < 16 ? lines - i : 16, n = k - p0 < KB ? k - p0 : KB;
      if (m < 16 || n < KB) memset(to, 0, kTile * 2);
      tile(to, from + i * line_stride, line_stride, position_stride, m, n);
    }
  };
  // Memory in order.
  if (line_stride == 1)
    for (int64_t p0 = 0; p0 < k; p0 += KB)
      for (int64_t i0 = 0; i0 < lines; i0 += kLines) two_tiles(i0, p0);
  else
    for (int64_t i0 = 0; i0 < lines; i0 += kLines)
      for (int64_t p0 = 0; p0 < k; p0 += KB) two_tiles(i0, p0);
}

// The same for A. Where its lines run along k, a tile's rows are copies of pieces of them, taken 1 KB of a line at a time.
void pack_a(void* dst, const void* src, int dtype, int64_t line_stride, int64_t position_stride, int64_t lines, int64_t k) {
  if (position_stride != 1) return pack<tile_a>(dst, src, dtype, line_stride, position_stride, lines, k);
  constexpr int64_t kRun = 512;
  auto* to = static_cast<uint16_t*>(dst);
  for (int64_t i0 = 0; i0 < lines; i0 += kLines, to += kLines * up(k, KB))
    for (int64_t q = 0; q < k; q += kRun)
      for (int64_t r = 0; r < kLines; r++) {
        const auto* from = static_cast<const uint16_t*>(src) + (i0 + r) * line_stride;
        const int64_t end = i0 + r >= lines ? 0 : k;  // of what the line holds
        for (int64_t p = q; p < q + kRun && p < k; p += KB) {
          uint16_t* row = to + p * kLines + r * KB;
          if (p + KB <= end) {
            memcpy(row, from + p, KB * 2);
          } else {
            memset(row, 0, KB * 2);
            if (p < end) memcpy(row, from + p, size_t(end - p) * 2);
          }
        }
      }
}

inline vu to_bf16(vf x) {  // in the upper half; nearest even, NaN stays NaN
  const vu u = (vu)x;
  return ((x == x ? u + 0x7FFF + (u >> 16 & 1) : vu{} + 0x7FC00000)) & 0xFFFF0000;
}

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

// n <= 32 sums -> bf16.
inline __attribute__((always_inline)) void round_row(uint16_t* to, const float* from, int64_t n) {
  alignas(64) uint16_t row[kLines];
  uint16_t* at = n == kLines ? to : row;
#if defined(__AVX512BF16__)
  const __m512bh h = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
  memcpy(at, &h, sizeof h);
#else
  for (int i = 0; i < kLines; i += W) {
    const vh h = __builtin_convertvector(to_bf16(loadf(from + i)) >> 16, vh);
    memcpy(at + i, &h, sizeof h);
  }
#endif
  if (n < kLines) memcpy(to, row, size_t(n) * 2);
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
    if (transposed)
      for (int x = 0; x < kLines; x += 8)
        for (int y = 0; y < kLines; y += 8)
          transpose_8(reinterpret_cast<uint16_t*>(sum + y * kLines + x), 2 * kLines,
                      reinterpret_cast<const uint16_t*>(turned + x * kLines + y), 2 * kLines);
    const int64_t width = n - j < kLines ? n - j : kLines;
    from = sum, row = 0;
    to = out + (transposed ? j * ldo : j), rows = transposed ? width : m, columns = transposed ? m : width;
  }
  round(kLines);
  _tile_release();
}

}  // namespace

extern const Panels DC_FOR_ISA(panels), DC_FOR_ISA(split_panels);
const Panels DC_FOR_ISA(panels) = {kLines, kLines, KB, 2, 0x80008000, 512, 256, pack_a, pack<tile_b>, block<1>, block_bf16};
const Panels DC_FOR_ISA(split_panels) = {kLines, kLines, KB, 4, 0x80008000, 256, 256, pack_parts<tile_a>, pack_parts<tile_b>, block<2>, nullptr};

}  // namespace dc
#endif
