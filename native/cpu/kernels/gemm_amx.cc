// Matrix multiplication of bf16 operands on AMX tiles (Intel Xeon from Sapphire Rapids on): products exact, sums in fp32.
// Only the "amx" compilation of this file holds anything.
#include "gemm.h"

#if defined(DC_ISA_AMX)
#include "../cpu.h"
#include "vec.h"

namespace dc {
namespace {

// A tile register holds 16 rows of 64 bytes. A: 16 lines x 32 positions. B: 16 pairs of positions x 16 columns x 2.
// Four accumulators make a block of 32 x 32.
constexpr int L = 32;     // lines of a panel, of A and of B
constexpr int KB = 32;    // positions of a tile
constexpr int64_t kTile = 16 * 32;  // bf16 values of a tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Lines -> panels of 32: per 32 positions two tiles of 16 lines, each line's 32 positions together.
void pack_a(void* dst, const void* src, int, int64_t line_stride, int64_t position_stride, int64_t lines, int64_t k) {
  const auto* from = static_cast<const uint16_t*>(src);
  auto* to = static_cast<uint16_t*>(dst);
  for (int64_t i0 = 0; i0 < lines; i0 += L)
    for (int64_t p0 = 0; p0 < k; p0 += KB)
      for (int64_t i = i0; i < i0 + L; i++, to += KB) {
        const int64_t n = i < lines ? (k - p0 < KB ? k - p0 : KB) : 0;
        const uint16_t* line = from + i * line_stride + p0 * position_stride;
        if (position_stride == 1 && n == KB) {
          memcpy(to, line, KB * 2);
          continue;
        }
        for (int64_t p = 0; p < n; p++) to[p] = line[p * position_stride];
        for (int64_t p = n; p < KB; p++) to[p] = 0;
      }
}

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

// Lines -> panels of 32: per 32 positions two tiles of 16 lines; position 2r + e of line j stands in row r at 2j + e.
void pack_b(void* dst, const void* src, int, int64_t line_stride, int64_t position_stride, int64_t lines, int64_t k) {
  const auto* from = static_cast<const uint16_t*>(src);
  auto* to = static_cast<uint16_t*>(dst);
  for (int64_t i0 = 0; i0 < lines; i0 += L)
    for (int64_t p0 = 0; p0 < k; p0 += KB)
      for (int64_t i = i0; i < i0 + L; i += 16, to += kTile) {
        const uint16_t* tile = from + i * line_stride + p0 * position_stride;
        const int64_t n = k - p0 < KB ? k - p0 : KB, m = lines - i < 0 ? 0 : lines - i < 16 ? lines - i : 16;
        if (position_stride == 1 && n == KB && m == 16) {
          for (int x = 0; x < 16; x += 8)
            for (int y = 0; y < 16; y += 8) transpose_8(to + y * 32 + x * 2, 32, tile + x * line_stride + y * 2, line_stride);
          continue;
        }
        if (m < 16 || n < KB) memset(to, 0, kTile * 2);
        for (int64_t p = 0; p < n; p++)
          for (int64_t j = 0; j < m; j++)
            to[p / 2 * 32 + j * 2 + p % 2] = tile[j * line_stride + p * position_stride];
      }
}

void block(float* c, int64_t ldc, const void* a, const void* b, int64_t m, int64_t n, int64_t k, bool accumulate) {
  const TileConfig config;
  _tile_loadconfig(&config);
  alignas(64) float edge[L * L];
  const int64_t panel = L * k;
  for (int64_t j = 0; j < n; j += L) {
    for (int64_t i = 0; i < m; i += L) {
      const uint16_t* pa = static_cast<const uint16_t*>(a) + i / L * panel;
      const uint16_t* pb = static_cast<const uint16_t*>(b) + j / L * panel;
      const bool whole = i + L <= m && j + L <= n;
      float* at = whole ? c + i * ldc + j : edge;
      const int64_t stride = whole ? ldc : L;
      if (whole && accumulate) {
        _tile_loadd(0, at, stride * 4);
        _tile_loadd(1, at + 16, stride * 4);
        _tile_loadd(2, at + 16 * stride, stride * 4);
        _tile_loadd(3, at + 16 * stride + 16, stride * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t p = 0; p < k; p += KB, pa += 2 * kTile, pb += 2 * kTile) {
        _tile_loadd(4, pa, 64);
        _tile_loadd(6, pb, 64);
        _tile_loadd(7, pb + kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, pa + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, at, stride * 4);
      _tile_stored(1, at + 16, stride * 4);
      _tile_stored(2, at + 16 * stride, stride * 4);
      _tile_stored(3, at + 16 * stride + 16, stride * 4);
      if (whole) continue;
      const int64_t rows = m - i < L ? m - i : L, columns = n - j < L ? n - j : L;
      float* to = c + i * ldc + j;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t s = 0; s < columns; s++) to[r * ldc + s] = accumulate ? to[r * ldc + s] + edge[r * L + s] : edge[r * L + s];
    }
  }
  _tile_release();
}

}  // namespace

extern const Panels panels_amx;
const Panels panels_amx = {L, L, KB, 2, 512, 256, pack_a, pack_b, block};

}  // namespace dc
#endif
