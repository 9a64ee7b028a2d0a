// Hessians of calibration: H += X'X, both triangles from one.
#include <algorithm>
#include <vector>

#include "blas.h"
#include "gemm.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "matrices.h"

namespace dc {

namespace {

constexpr int64_t kDepth = 256;  // positions of a packed panel: one of each operand stays in L1
constexpr int kRowMajor = 101, kTranspose = 112, kLower = 122;

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace

void add_lower(dc_context* c, const Panels& kernel, float* h, int64_t ldh, int64_t n, const void* a, const void* b, int64_t k) {
  const int64_t tall = up(96, kernel.mr), wide = up(768, kernel.nr), line = k * kernel.bytes;
  struct Tile {
    int64_t i0, i1, j0, j1;
  };
  std::vector<Tile> tiles;
  for (int64_t i0 = 0; i0 < n; i0 += tall)
    for (int64_t j0 = 0; j0 < std::min(i0 + tall, n); j0 += wide)
      tiles.push_back({i0, std::min(i0 + tall, n), j0, std::min({j0 + wide, i0 + tall, n})});
  parallel_for(c, int64_t(tiles.size()), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t t = begin; t < end; t++) {
      const Tile& x = tiles[size_t(t)];
      // Columns up to `full` lie below the diagonal in every row; the rest goes through a buffer.
      const int64_t full = std::max(x.j0, std::min(x.i0 / kernel.nr * kernel.nr, x.j1)), rows = x.i1 - x.i0;
      const char *left = static_cast<const char*>(a) + x.i0 * line, *right = static_cast<const char*>(b);
      if (full > x.j0) kernel.block(h + x.i0 * ldh + x.j0, ldh, left, right + x.j0 * line, rows, full - x.j0, k, true);
      const int64_t rest = x.j1 - full;
      if (rest <= 0) continue;
      float* sum = scratch.take(size_t(rows * rest));
      kernel.block(sum, rest, left, right + full * line, rows, rest, k, false);
      for (int64_t i = 0; i < rows; i++) {
        float* y = h + (x.i0 + i) * ldh + full;
        const int64_t most = std::min(rest, x.i0 + i + 1 - full);
        for (int64_t j = 0; j < most; j++) y[j] += sum[i * rest + j];
      }
    }
  });
}

}  // namespace dc

using namespace dc;

namespace {

// Lower triangle of H [n,n] += alpha X'X of bf16 rows X [tokens, n] on the processor's unit for bf16. Products are exact; what is summed goes to
// H after 1024 to 4096 tokens, as many as packed take some 16 MB.
void add_lower_bf16(dc_context* c, const Panels& kernel, float* h, int64_t ldh, int64_t n, const uint16_t* x, int64_t ldx,
                    int64_t tokens, float alpha) {
  constexpr int64_t kTogether = 4;  // squares that a thread sums at a time, in L2: most share their left operand
  // Squares of the triangle: large ones read fewer operands, many keep all threads busy.
  const int64_t width = kernel.mr, lines = up(n, width), depth = kernel.depth;
  int64_t side = up(kernel.resident < 1 << 20 ? 128 : 256, width);  // kTogether of them, and what they read, stay in L2
  auto squares = [&] { return (n + side - 1) / side * ((n + side - 1) / side + 1) / 2; };
  while (side > 2 * width && squares() < 4 * c->threads) side = up(side / 2, width);
  const int64_t flush = std::min<int64_t>(4096, std::max<int64_t>(1, (1 << 23) / lines / 1024) * 1024), most = std::min(flush, up(tokens, kernel.step));
  static thread_local Scratch pack_a, pack_b;
  auto* b = reinterpret_cast<uint16_t*>(pack_b.take(size_t(lines * most / 2)));
  auto* a = kernel.block_alike ? b : reinterpret_cast<uint16_t*>(pack_a.take(size_t(lines * most / 2)));
  const auto block = kernel.block_alike ? kernel.block_alike : kernel.block;
  for (int64_t t0 = 0; t0 < tokens; t0 += flush) {
    const int64_t positions = std::min(flush, tokens - t0);
    // Panels by blocks of `depth` tokens.
    parallel_for(c, lines / width, 1, [&](int64_t begin, int64_t end) {
      const int64_t i0 = begin * width, i1 = std::min(end * width, n);
      for (int64_t p = 0; p < positions; p += depth) {
        const int64_t k = std::min(depth, positions - p), line = up(k, kernel.step);
        const uint16_t* from = x + (t0 + p) * ldx + i0;
        if (!kernel.block_alike) kernel.pack_a(a + lines * p + i0 * line, from, DC_BF16, 1, ldx, i1 - i0, k);
        kernel.pack_b(b + lines * p + i0 * line, from, DC_BF16, 1, ldx, i1 - i0, k);
      }
    });
    struct Square {
      int64_t i0, i1, j0, j1;
    };
    auto square = [&](int64_t t) -> Square {
      int64_t row = 0;
      while ((row + 1) * (row + 2) / 2 <= t) row++;
      const int64_t i0 = row * side, j0 = (t - row * (row + 1) / 2) * side;
      return {i0, std::min(i0 + side, n), j0, std::min(j0 + side, n)};
    };
    parallel_for(c, squares(), 1, [&](int64_t begin, int64_t end) {
      static thread_local Scratch scratch;
      float* sums = scratch.take(size_t(kTogether * side * side));
      for (int64_t first = begin; first < end; first += kTogether) {
        const int64_t last = std::min(first + kTogether, end);
        for (int64_t p = 0; p < positions; p += depth) {
          const int64_t line = up(std::min(depth, positions - p), kernel.step);
          const uint16_t *left = a + lines * p, *right = b + lines * p;
          for (int64_t t = first; t < last; t++) {
            const auto [i0, i1, j0, j1] = square(t);
            float* sum = sums + (t - first) * side * side;
            if (i0 != j0) {
              block(sum, side, left + i0 * line, right + j0 * line, i1 - i0, j1 - j0, line, p > 0);
              continue;
            }
            for (int64_t i = i0; i < i1; i += width)  // what lies above the diagonal is not wanted
              block(sum + (i - i0) * side, side, left + i * line, right + j0 * line, std::min(width, i1 - i),
                    std::min(i + width, j1) - j0, line, p > 0);
          }
        }
        for (int64_t t = first; t < last; t++) {
          const auto [i0, i1, j0, j1] = square(t);
          for (int64_t i = i0; i < i1; i++)
            element_kernels().axpy(h + i * ldh + j0, alpha, sums + (t - first) * side * side + (i - i0) * side, std::min(i + 1, j1) - j0);
        }
      }
    });
  }
}

}  // namespace

extern "C" int dc_cpu_hessian_add(dc_context* c, const dc_call* call) {
  const dc_tensor &ht = call->t[0], &x = call->t[1], &offsets = call->t[2], &weight = call->t[3];
  if (!dense_rows(ht) || !dense_rows(x)) return fail(c, "H and X must have dense rows");
  if (present(weight) && weight.stride[0] != 1 && weight.dim[0] > 1) return fail(c, "row_weight must be dense");
  const Matrices<float> h(ht);
  const GemmKernels& kernel = gemm_kernels();
  const int64_t k = h.columns, tokens = x.dim[0], ldx = x.stride[0], mr = kernel.mr, nr = kernel.nr;
  const float alpha = float(call->f[0]);
  static thread_local Scratch pack_a, pack_b;
  for (int64_t e = 0; e < h.batch; e++) {
    const int64_t from = present(offsets) ? data<int32_t>(offsets)[e] : 0;
    const int64_t to = present(offsets) ? data<int32_t>(offsets)[e + 1] : tokens;
    if (from < 0 || to > tokens || from > to) return fail(c, "offsets of expert %lld leave X", (long long)e);
    const bool blas = c->blas && x.dtype == DC_F32 && !present(weight) && k >= 64 && to - from >= 16;
    if (blas && to > from) {
      c->blas->ssyrk(kRowMajor, kLower, kTranspose, int(k), int(to - from), alpha, data<float>(x) + from * ldx, int(ldx),
                     1, h.row(e, 0), int(h.stride));
      continue;
    }
    if (x.dtype == DC_BF16 && !present(weight) && bf16_panels()) {
      add_lower_bf16(c, *bf16_panels(), h.row(e, 0), h.stride, k, data<uint16_t>(x) + from * ldx, ldx, to - from, alpha);
      continue;
    }
    for (int64_t t = from; t < to; t += kDepth) {
      const int64_t n = std::min(kDepth, to - t), a_panels = (k + mr - 1) / mr, b_panels = (k + nr - 1) / nr;
      float* a = pack_a.take(size_t(a_panels * mr * n));
      float* b = pack_b.take(size_t(b_panels * nr * n));
      parallel_for(c, a_panels + b_panels, 8, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p++) {
          const bool left = p < a_panels;
          const int width = left ? int(mr) : int(nr);
          const int64_t i0 = (left ? p : p - a_panels) * width;
          float* panel = (left ? a : b) + i0 * n;
          const char* src = static_cast<const char*>(row_of(x, 0, t)) + i0 * int64_t(dtype_size(x.dtype));
          kernel.pack(panel, src, x.dtype, 1, ldx, std::min<int64_t>(width, k - i0), n, width);
          if (!left || (alpha == 1 && !present(weight))) continue;
          for (int64_t q = 0; q < n; q++) {
            const float s = alpha * (present(weight) ? data<float>(weight)[t + q] : 1.0f);
            for (int i = 0; i < width; i++) panel[q * width + i] *= s;
          }
        }
      });
      add_lower(c, float_panels(), h.row(e, 0), h.stride, k, a, b, n);
    }
  }
  return 0;
}

extern "C" int dc_cpu_symmetrize(dc_context* c, const dc_call* call) {
  if (!dense_rows(call->t[0])) return fail(c, "H must have dense rows");
  const Matrices<float> h(call->t[0]);
  const int64_t tile = 32, tiles = (h.columns + tile - 1) / tile;
  parallel_for(c, h.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      const Matrix<float> m = h[p / tiles];
      const int64_t r0 = p % tiles * tile, r1 = std::min(r0 + tile, m.rows);
      for (int64_t c0 = 0; c0 < r1; c0 += tile)
        for (int64_t r = r0; r < r1; r++)
          for (int64_t j = c0; j < std::min(c0 + tile, r); j++) m.row(j)[r] = m.row(r)[j];
    }
  });
  return 0;
}
