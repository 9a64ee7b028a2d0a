// Operands of bf16 in the form in which AMX's tiles and AVX-512's pair products read them. For kernels/gemm_amx.cc and
// gemm_bf16.cc alone.
#pragma once
#include "../cpu.h"
#include "vec.h"

namespace dc {
namespace {

// A tile holds 16 rows of 64 bytes. A: 16 lines x 32 positions. B: 16 pairs of positions x 16 columns x 2. Panels hold two
// tiles for every 32 positions.
constexpr int kLines = 32;     // lines of a panel, of A and of B
constexpr int KB = 32;    // positions of a tile
constexpr int64_t kTile = 16 * 32;  // bf16 values of a tile

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

// Two positions of 16 lines that lie side by side -> a row of a tile, both positions of each line.
inline void pair_position(uint16_t* dst, const uint16_t* src, int64_t position_stride) {
  const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
  const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + position_stride));
  const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + 16), _mm256_permute2x128_si256(low, high, 0x31));
}
inline void pair_positions(uint16_t* dst, const uint16_t* src, int64_t position_stride) {
  for (int r = 0; r < 16; r++) pair_position(dst + r * KB, src + 2 * r * position_stride, position_stride);
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
      for (int64_t i0 = 0; i0 < lines; i0 += kLines) {
        if (tile != tile_b || lines - i0 < kLines || k - p0 < KB) {
          two_tiles(i0, p0);
          continue;
        }
        // Both tiles at once: their positions share cache lines, which may be gone the second time.
        const auto* from = static_cast<const uint16_t*>(src) + p0 * position_stride + i0;
        auto* to = static_cast<uint16_t*>(dst) + i0 * up(k, KB) + p0 * kLines;
        for (int r = 0; r < 16; r++, from += 2 * position_stride, to += KB) {
          pair_position(to, from, position_stride);
          pair_position(to + kTile, from + 16, position_stride);
        }
      }
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

// A block of 32 x 32 fp32 values -> its transpose.
inline void transpose_block(float* dst, const float* src) {
  for (int x = 0; x < kLines; x += 8)
    for (int y = 0; y < kLines; y += 8)
      transpose_8(reinterpret_cast<uint16_t*>(dst + y * kLines + x), 2 * kLines,
                  reinterpret_cast<const uint16_t*>(src + x * kLines + y), 2 * kLines);
}

}  // namespace
}  // namespace dc
