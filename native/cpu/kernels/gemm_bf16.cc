// Matrix multiplication of bf16 operands on AVX-512's pair products (VDPBF16PS: AMD from Zen 4 on, Intel's Cooper Lake): twice
// the rate of fp32. Operands are packed as for AMX. Compiled with its flags, where a processor without AMX may come by; and
// as "tiles", the instruction in plain loops, for tests.
#include "gemm.h"

#include "tiles.h"

namespace dc {
namespace {

// 8 lines of A x 32 columns of B: 16 accumulators of AVX-512 hide the latency of 2 products a cycle, and every value that is
// loaded goes into two of them or more.
constexpr int kRows = 8;
constexpr int V = 16 / W;  // vectors of 16 columns

// Intel's manual, VDPBF16PS: the odd position's product is added first.
inline __attribute__((always_inline)) void add_pairs(vf& sum, vu a, vu b) {
#if defined(__AVX512BF16__)
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // in this very register: see kernels/gemm.cc
#else
  sum = madd((vf)(a & 0xFFFF0000), (vf)(b & 0xFFFF0000), sum);
  sum = madd((vf)(a << 16), (vf)(b << 16), sum);
#endif
}
inline __attribute__((always_inline)) vu splat_pair(const uint16_t* pair) {
  int32_t x;
  memcpy(&x, pair, 4);
#if defined(__AVX512F__)
  return (vu)_mm512_set1_epi32(x);
#else
  return vu{} + uint32_t(x);
#endif
}

// Positions that are summed from 0 on before they are added to what was summed already: in one row, thousands would lose bits.
constexpr int64_t kPiece = 512;

// Lines of a panel of A: packed as A, packed as B, or where they lie in memory, `stride` values apart.
enum Form { kPackedA, kPackedB, kInPlace };
template <Form form>
struct Left {
  const uint16_t* at;
  int64_t stride = 0;
  // From here on: values from line to line (of 8), from pair to pair (of 16), from 32 positions to the next.
  int64_t line() const { return form == kPackedA ? KB : form == kPackedB ? 2 : stride; }
  static constexpr int64_t pair = form == kPackedB ? KB : 2, next = form == kInPlace ? KB : 2 * kTile;
  Left part(int64_t i, int64_t position) const {
    return {at + (form == kPackedB ? i / 16 * kTile + i % 16 * 2 : i * line()) + position * (form == kInPlace ? 1 : kLines), stride};
  }
};

// `before` (NULL: 0) + 8 lines of A times a panel of B, passed to done(row, sums).
template <Form form, class Done>
inline __attribute__((always_inline)) void micro(const float* before, int64_t ld, Left<form> left, const uint16_t* b, int64_t k,
                                                 Done done) {
  const int64_t line = left.line();
  const uint16_t* a = left.at;
  if (before)
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {  // wanted when the products are done
      __builtin_prefetch(before + i * ld);
      __builtin_prefetch(before + i * ld + 16);
    }
  vf sum[kRows][2 * V];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < 2 * V; j++) sum[i][j] = vf{};
  for (int64_t p = 0; p < k; p += KB, a += left.next, b += 2 * kTile) {
    if (form == kInPlace)
#pragma GCC unroll 8
      for (int i = 0; i < kRows; i++) __builtin_prefetch(a + i * line + 8 * KB);
#if defined(__AVX512BF16__)  // else small rather than fast
#pragma GCC unroll 16
#endif
    for (int pair = 0; pair < 16; pair++) {
      vu row[2 * V];
#pragma GCC unroll 4
      for (int j = 0; j < 2 * V; j++) row[j] = vload<vu>(b + (j / V) * kTile + pair * KB + (j % V) * 2 * W);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; i++) {
        const vu x = splat_pair(a + i * line + pair * left.pair);
#pragma GCC unroll 4
        for (int j = 0; j < 2 * V; j++) add_pairs(sum[i][j], x, row[j]);
      }
    }
  }
  if (before)
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
      for (int j = 0; j < 2 * V; j++) sum[i][j] = loadf(before + i * ld + j * W) + sum[i][j];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++) done(i, sum[i]);
}

// The same to fp32: once for each form, for it is large. `c` may be `before`.
template <Form form>
__attribute__((noinline, noclone)) void micro(float* c, int64_t ldc, const float* before, int64_t ld, Left<form> a, const uint16_t* b, int64_t k) {
  micro(before, ld, a, b, k, [&](int i, const vf* sum) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < 2 * V; j++) storef(c + i * ldc + j * W, sum[j]);
  });
}

// C [m, n] of a panel of A and one of B. A piece of the latter stays in L1.
template <Form form>
void square(float* c, int64_t ldc, Left<form> a, const uint16_t* b, int64_t m, int64_t n, int64_t k, bool accumulate) {
  alignas(64) float edge[kRows * kLines];
  for (int64_t p = 0; p < k; p += kPiece, b += kPiece * kLines, accumulate = true) {
    const int64_t depth = k - p < kPiece ? k - p : kPiece;
    for (int64_t i = 0; i < m; i += kRows) {
      float* to = c + i * ldc;
      const int64_t rows = m - i < kRows ? m - i : kRows;
      if (rows == kRows && n == kLines) {
        micro(to, ldc, accumulate ? to : nullptr, ldc, a.part(i, p), b, depth);
        continue;
      }
      if (accumulate)
        for (int64_t r = 0; r < rows; r++) memcpy(edge + r * kLines, to + r * ldc, size_t(n) * 4);
      micro(edge, kLines, accumulate ? edge : nullptr, kLines, a.part(i, p), b, depth);
      for (int64_t r = 0; r < rows; r++) memcpy(to + r * ldc, edge + r * kLines, size_t(n) * 4);
    }
  }
}

template <Form form>
void panel_sums(float* c, int64_t ldc, Left<form> a, const uint16_t* b, int64_t m, int64_t n, int64_t k, bool accumulate) {
  for (int64_t j = 0; j < n; j += kLines) square(c + j, ldc, a, b + j * k, m, n - j < kLines ? n - j : kLines, k, accumulate);
}

template <Form form>
void panel_bf16(uint16_t* out, int64_t ldo, bool transposed, const float* before, int64_t ld, Left<form> a, const uint16_t* b,
                int64_t m, int64_t n, int64_t k) {
  alignas(64) float sums[kLines * kLines], turned[kLines * kLines], row[kLines];
  const bool at_once = form == kInPlace && !transposed;  // rounded from the registers: a second large function
  const int64_t last = (k - 1) / kPiece * kPiece, whole = (m + kRows - 1) / kRows * kRows;
  for (int64_t j = 0; j < n; j += kLines, b += kLines * k) {
    const int64_t width = n - j < kLines ? n - j : kLines;
    const float* so_far = before ? before + j : nullptr;
    int64_t stride = ld;
    for (int64_t p = 0; p < last; p += kPiece, so_far = sums, stride = kLines)
      for (int64_t i = 0; i < whole; i += kRows)
        micro(sums + i * kLines, kLines, so_far ? so_far + i * stride : nullptr, stride, a.part(i, p), b + p * kLines, kPiece);
    for (int64_t i = 0; i < whole; i += kRows) {
      const float* sum = so_far ? so_far + i * stride : nullptr;
      if (at_once)
        for (int r = 0; r < kRows; r++) __builtin_prefetch(out + (i + r) * ldo + j, 1);
      if (!at_once)
        micro(sums + i * kLines, kLines, sum, stride, a.part(i, last), b + last * kLines, k - last);
      else if constexpr (form == kInPlace)
        micro(sum, stride, a.part(i, last), b + last * kLines, k - last, [&](int r, const vf* of) __attribute__((always_inline)) {
          if (i + r >= m) return;
#pragma GCC unroll 4
          for (int v = 0; v < 2 * V; v++) storef(row + v * W, of[v]);
          round_row(out + (i + r) * ldo + j, row, width);
        });
    }
    if (transposed) transpose_block(turned, sums);
    if (transposed)
      for (int64_t r = 0; r < width; r++) round_row(out + (j + r) * ldo, turned + r * kLines, m);
    else if (!at_once)
      for (int64_t r = 0; r < m; r++) round_row(out + r * ldo + j, sums + r * kLines, width);
  }
}

template <Form form>
void block(float* c, int64_t ldc, const void* a, const void* b, int64_t m, int64_t n, int64_t k, bool accumulate) {
  const auto *left = static_cast<const uint16_t*>(a), *right = static_cast<const uint16_t*>(b);
  for (int64_t j = 0; j < n; j += kLines)
    for (int64_t i = 0; i < m; i += kLines)
      square<form>(c + i * ldc + j, ldc, {left + i * k}, right + j * k, m - i < kLines ? m - i : kLines,
                   n - j < kLines ? n - j : kLines, k, accumulate);
}
void block_bf16(uint16_t* out, int64_t ldo, bool transposed, const float* before, int64_t ld, const void* a, const void* b,
                int64_t m, int64_t n, int64_t k) {
  panel_bf16<kPackedA>(out, ldo, transposed, before, ld, {static_cast<const uint16_t*>(a)}, static_cast<const uint16_t*>(b), m, n, k);
}
void lines(float* c, int64_t ldc, const uint16_t* a, int64_t lda, const void* b, int64_t m, int64_t n, int64_t k, bool accumulate) {
  panel_sums<kInPlace>(c, ldc, {a, lda}, static_cast<const uint16_t*>(b), m, n, k, accumulate);
}
void lines_bf16(uint16_t* out, int64_t ldo, bool transposed, const float* before, int64_t ld, const uint16_t* a, int64_t lda,
                const void* b, int64_t m, int64_t n, int64_t k) {
  panel_bf16<kInPlace>(out, ldo, transposed, before, ld, {a, lda}, static_cast<const uint16_t*>(b), m, n, k);
}

}  // namespace

#if defined(__AVX512BF16__)
constexpr const char* kName = "bf16";
#else
constexpr const char* kName = "pairs";
#endif
extern const Panels DC_FOR_ISA(pair_panels);
const Panels DC_FOR_ISA(pair_panels) = {kLines, kLines, KB, 2, 0x80008000, 512, 256, pack_a, pack<tile_b>, block<kPackedA>, block_bf16, 1 << 19, kPiece, kName, block<kPackedB>, kRows, lines, lines_bf16};

}  // namespace dc
