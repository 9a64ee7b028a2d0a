// Linear algebra of calibration: Cholesky factors of Hessians, solves.
#include <algorithm>
#include <vector>

#include "blas.h"
#include "gemm.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "kernels/sweep.h"
#include "matrices.h"

using namespace dc;

namespace dc {

extern const SweepKernels sweep_kernels_base;
#if defined(__x86_64__)
extern const SweepKernels sweep_kernels_avx2, sweep_kernels_avx512;
#endif

const SweepKernels& sweep_kernels() {
#if defined(__x86_64__)
  static const SweepKernels& chosen = !strcmp(dc_isa(), "base")   ? sweep_kernels_base
                                      : !strcmp(dc_isa(), "avx2") ? sweep_kernels_avx2
                                                                  : sweep_kernels_avx512;
  return chosen;
#else
  return sweep_kernels_base;
#endif
}

}  // namespace dc

namespace {

constexpr int kColumnMajor = 102;

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

bool good_pivot(float pivot) { return pivot > 0 && std::isfinite(pivot); }

// The rows X [rows, k] of m become X L^-T: l = -L packed in panels of the micro-kernel's rows, inverse = 1 / L_jj.
void solve_rows(float* m, int64_t ld, int64_t rows, const float* l, const float* inverse, int64_t k) {
  const GemmKernels& kernel = gemm_kernels();
  const SweepKernels& sweep = sweep_kernels();
  const int64_t mr = kernel.mr, nr = kernel.nr;
  static thread_local Scratch scratch;
  float* x = scratch.take(size_t(nr * k));
  for (int64_t r = 0; r < rows; r += nr) {
    const int64_t n = std::min(nr, rows - r);
    kernel.pack(x, m + r * ld, DC_F32, ld, 1, n, k, int(nr));
    for (int64_t p = 0; p < k; p += mr) {
      const int64_t w = std::min(mr, k - p);
      const float* factor = l + p * k;
      if (p > 0) kernel.block(x + p * nr, nr, factor, x, w, nr, p, true);
      sweep.solve(x + p * nr, factor + p * mr, inverse + p, int(w), int(mr), int(nr));
    }
    sweep.unstrip(m + r * ld, ld, x, int(nr), n, k);
  }
}

// Factors the lower triangle of m [n,n] in place: panels of `width` columns, each in steps of kCorner columns (the corner
// on the diagonal, the rows below it, the rest of the panel), then the triangle to the right of the panel. What lies above
// the diagonal is left alone.
int32_t factor_lower(dc_context* c, float* m, int64_t ld, int64_t n, Scratch* scratch) {
  constexpr int64_t kCorner = 64;
  const Panels& panels = n > 2 * kCorner && split_panels() ? *split_panels() : float_panels();
  const GemmKernels& kernel = gemm_kernels();
  const int64_t width = n > 768 ? 4 * kCorner : 2 * kCorner, ar = panels.mr, br = panels.nr;
  auto pack_a = [&](float* to, const float* from, int64_t rows, int64_t k) {  // negated
    panels.pack_a(to, from, DC_F32, ld, 1, rows, k);
    auto* bits = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < up(rows, ar) * k; i++) bits[i] ^= panels.sign;
  };
  for (int64_t p0 = 0; p0 < n; p0 += width) {
    const int64_t p1 = std::min(p0 + width, n), below = n - p1, depth = p1 - p0;
    const int64_t below_a = (below + ar - 1) / ar, below_b = (below + br - 1) / br;
    float* a = scratch[0].take(size_t(below_a * ar * depth));
    float* b = scratch[1].take(size_t(below_b * br * depth));
    for (int64_t j0 = p0; j0 < p1; j0 += kCorner) {
      const int64_t j1 = std::min(j0 + kCorner, p1), k = j1 - j0, inner = p1 - j1;
      float* corner = m + j0 * ld + j0;
      if (const int bad = sweep_kernels().factor(corner, ld, int(k))) return int32_t(j0) + bad;
      if (j1 == n) return 0;
      const int64_t corner_floats = up(k, kernel.mr) * k;
      float* l = scratch[2].take(size_t(corner_floats + k));
      float* inverse = l + corner_floats;
      kernel.pack(l, corner, DC_F32, ld, 1, k, k, kernel.mr);
      for (int64_t i = 0; i < corner_floats; i++) l[i] = -l[i];
      for (int64_t j = 0; j < k; j++) inverse[j] = 1 / corner[j * ld + j];

      const int64_t inner_b = (inner + br - 1) / br;
      float* inner_left = scratch[3].take(size_t(up(inner, ar) * k));
      float* inner_right = scratch[4].take(size_t(inner_b * br * k));
      parallel_for(c, inner_b + below_b, 1, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; s++) {
          const bool in = s < inner_b;
          const int64_t from = in ? s * br : (s - inner_b) * br, rows = std::min(br, (in ? inner : below) - from);
          float* x = m + ((in ? j1 : p1) + from) * ld + j0;
          solve_rows(x, ld, rows, l, inverse, k);
          panels.pack_b(in ? inner_right + from * k : b + from * depth + (j0 - p0) * br, x, DC_F32, ld, 1, rows, k);
        }
      });
      // One piece is the triangle left of p1, the others are the rows below.
      parallel_for(c, 1 + below_a, 1, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; s++) {
          if (s == 0) {
            pack_a(inner_left, m + j1 * ld + j0, inner, k);
            add_lower(nullptr, panels, m + j1 * ld + j1, ld, inner, inner_left, inner_right, k);
            continue;
          }
          const int64_t from = (s - 1) * ar, rows = std::min(ar, below - from);
          float *x = m + (p1 + from) * ld, *left = a + from * depth + (j0 - p0) * ar;
          pack_a(left, x + j0, rows, k);
          if (inner > 0) panels.block(x + j1, ld, left, inner_right, rows, inner, k, true);
        }
      });
    }
    add_lower(c, panels, m + p1 * ld + p1, ld, below, a, b, depth);
  }
  return 0;
}

// LAPACK sees a row-major lower triangle as a column-major upper one. It may let values pass that are not finite.
int32_t factor_lapack(const dc_blas* blas, float* m, int64_t ld, int64_t n) {
  const int info = blas->spotrf(kColumnMajor, 'U', int(n), m, int(ld));
  for (int64_t i = 0; i < n; i++) {
    if (!good_pivot(m[i * ld + i])) return int32_t(i + 1);
    if (info < 0)  // refused: the first row with a value that is not a number
      for (int64_t j = 0; j < i; j++)
        if (std::isnan(m[i * ld + j])) return int32_t(i + 1);
  }
  return info == 0 ? 0 : std::max(info, 1);
}

// dst [n,n] lower = h in reverse order of rows and columns: dst(i,j) = h(n-1-j, n-1-i), from h's lower triangle.
void flip_lower(dc_context* c, const Matrix<float>& dst, const Matrix<float>& h) {
  constexpr int64_t tile = 32;
  const int64_t n = h.columns;
  const auto flip = sweep_kernels().flip;
  parallel_for(c, (n + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const int64_t i0 = t * tile, i1 = std::min(i0 + tile, n);
      for (int64_t j0 = 0; j0 < i0; j0 += tile)
        flip(dst.row(i0) + j0, dst.stride, h.row(n - j0 - tile) + n - i1, h.stride, i1 - i0, tile);
      float square[tile * tile];  // what lies above the diagonal may be anything
      flip(square, tile, h.row(n - i1) + n - i1, h.stride, i1 - i0, i1 - i0);
      for (int64_t i = i0; i < i1; i++) std::memcpy(dst.row(i) + i0, square + (i - i0) * tile, size_t(i + 1 - i0) * 4);
    }
  });
}

}  // namespace

extern "C" int dc_cpu_cholesky(dc_context* c, const dc_call* call) {
  if (!dense_rows(call->t[0]) || !dense_rows(call->t[2])) return fail(c, "F and H must have dense rows");
  const Matrices<float> f(call->t[0]), h(call->t[2]);
  const bool reversed = call->i[0] != 0;
  const int64_t n = h.columns;
  static thread_local Scratch scratch[5];
  for (int64_t e = 0; e < h.batch; e++) {
    const Matrix<float> m = f[e], source = h[e];
    double trace = 0;
    for (int64_t i = 0; i < n; i++) trace += source.row(i)[i];
    const float damp = call->f[0] == 0 ? 0.0f : float(call->f[0] * trace / double(std::max<int64_t>(n, 1)));
    // The reversed factor is the lower factor of the matrix in reverse order of rows and columns, reversed back.
    if (reversed) {
      flip_lower(c, m, source);
    } else {
      parallel_for(c, n, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) std::memcpy(m.row(i), source.row(i), size_t(i + 1) * 4);
      });
    }
    for (int64_t i = 0; i < n; i++) m.row(i)[i] += damp;
    const bool lapack = c->blas && c->blas->spotrf && n >= 128 && !split_panels();
    const int32_t bad =
        lapack ? factor_lapack(c->blas, m.data, m.stride, n) : factor_lower(c, m.data, m.stride, n, scratch);
    data<int32_t>(call->t[1])[e] = bad && reversed ? int32_t(n + 1 - bad) : bad;
    parallel_for(c, (n + 1) / 2, 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        float *top = m.row(i), *bottom = m.row(n - 1 - i);
        std::fill(top + i + 1, top + n, 0.0f);
        std::fill(bottom + n - i, bottom + n, 0.0f);
        if (!reversed) continue;
        if (top == bottom) {
          std::reverse(top, top + n);
        } else {
          for (int64_t j = 0; j < n; j++) std::swap(top[j], bottom[n - 1 - j]);
        }
      }
    });
  }
  return 0;
}

namespace {

// Solves T Y = X in place for the rows of X [n, width], T the triangle of m (or, transposed, of its transpose), in
// blocks whose contributions to the unknowns still open are matrix products.
void solve_triangle(dc_context* c, const Matrix<float>& m, bool upper, bool transposed, const Matrix<float>& x) {
  const int64_t n = m.rows, width = x.columns, block = 128, blocks = (n + block - 1) / block;
  const bool forward = upper == transposed;
  for (int64_t step = 0; step < blocks; step++) {
    const int64_t b0 = (forward ? step : blocks - 1 - step) * block, b1 = std::min(b0 + block, n);
    parallel_for(c, width, 64, [&](int64_t begin, int64_t end) {
      const int64_t w = end - begin;
      for (int64_t s = 0; s < b1 - b0; s++) {
        const int64_t i = forward ? b0 + s : b1 - 1 - s;
        float* y = x.row(i) + begin;
        for (int64_t p = forward ? b0 : i + 1; p < (forward ? i : b1); p++) {
          const float t = transposed ? m.row(p)[i] : m.row(i)[p];
          const float* z = x.row(p) + begin;
          for (int64_t j = 0; j < w; j++) y[j] -= t * z[j];
        }
        const float d = m.row(i)[i];
        for (int64_t j = 0; j < w; j++) y[j] /= d;
      }
    });
    const int64_t r0 = forward ? b1 : 0, rows = forward ? n - b1 : b0;
    if (rows == 0) continue;
    const float* t = transposed ? m.row(b0) + r0 : m.row(r0) + b0;
    sgemm_into(c, rows, width, b1 - b0, -1, t, m.stride, transposed, x.row(b0), x.stride, false, 1, x.row(r0), x.stride,
               true);
  }
}

}  // namespace

extern "C" int dc_cpu_cholesky_solve(dc_context* c, const dc_call* call) {
  if (!dense_rows(call->t[0]) || !dense_rows(call->t[1]) || !dense_rows(call->t[2]))
    return fail(c, "X, F and B must have dense rows");
  const Matrices<float> x(call->t[0]), f(call->t[1]), b(call->t[2]);
  const bool upper = call->i[0] != 0;
  for (int64_t e = 0; e < x.batch; e++) {
    for (int64_t i = 0; i < x.rows; i++) std::memcpy(x.row(e, i), b.row(e, i), size_t(x.columns) * 4);
    solve_triangle(c, f[e], upper, false, x[e]);
    solve_triangle(c, f[e], upper, true, x[e]);
  }
  return 0;
}
