// Linear algebra of calibration: Hessians, their Cholesky factors, solves.
#include "gemm.h"
#include "matrices.h"

#include <algorithm>
#include <vector>

using namespace dc;

namespace dc {

// Simple product, taken where no faster one is linked in.
__attribute__((weak)) void sgemm_into(dc_context* c, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
                                      int64_t lda, bool transpose_a, const float* b, int64_t ldb, bool transpose_b,
                                      float beta, float* out, int64_t ldc) {
  parallel_for(c, m, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      float* y = out + i * ldc;
      if (beta == 0) {
        std::fill(y, y + n, 0.0f);
      } else if (beta != 1) {
        for (int64_t j = 0; j < n; j++) y[j] *= beta;
      }
      for (int64_t p = 0; p < k; p++) {
        const float x = alpha * (transpose_a ? a[p * lda + i] : a[i * lda + p]);
        if (transpose_b) {
          for (int64_t j = 0; j < n; j++) y[j] += x * b[j * ldb + p];
        } else {
          for (int64_t j = 0; j < n; j++) y[j] += x * b[p * ldb + j];
        }
      }
    }
  });
}

}  // namespace dc

extern "C" int dc_cpu_hessian_add(dc_context* c, const dc_call* call) {
  const dc_tensor &ht = call->t[0], &x = call->t[1], &offsets = call->t[2], &weight = call->t[3];
  if (!dense_rows(ht) || !dense_rows(x)) return fail(c, "H and X must have dense rows");
  const Matrices<float> h(ht);
  const int64_t k = h.columns, tokens = x.dim[0];
  const float alpha = float(call->f[0]);
  std::vector<float> piece;
  for (int64_t e = 0; e < h.batch; e++) {
    const int64_t from = present(offsets) ? data<int32_t>(offsets)[e] : 0;
    const int64_t to = present(offsets) ? data<int32_t>(offsets)[e + 1] : tokens;
    if (from < 0 || to > tokens || from > to) return fail(c, "offsets of expert %lld leave X", (long long)e);
    for (int64_t t = from; t < to; t += 256) {
      const int64_t n = std::min<int64_t>(256, to - t);
      piece.resize(size_t(2 * n * k));
      float *plain = piece.data(), *scaled = plain + n * k;
      for (int64_t i = 0; i < n; i++) {
        load_row(plain + i * k, row_of(x, 0, t + i), x.dtype, k);
        const float s = alpha * (present(weight) ? data<float>(weight)[t + i] : 1.0f);
        for (int64_t j = 0; j < k; j++) scaled[i * k + j] = s * plain[i * k + j];
      }
      const Matrix<float> m = h[e];
      parallel_for(c, k, 8, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < n; i++)
          for (int64_t r = begin; r < end; r++) {
            const float s = scaled[i * k + r];
            float* y = m.row(r);
            for (int64_t j = 0; j <= r; j++) y[j] += s * plain[i * k + j];
          }
      });
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

namespace {

constexpr int64_t kBlock = 64;

// Factors the lower triangle of m in place; 0, or 1 + the index of the first pivot that is not positive and finite.
int32_t factor_lower(dc_context* c, const Matrix<float>& m) {
  const int64_t n = m.rows;
  for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
    const int64_t j1 = std::min(j0 + kBlock, n);
    if (j0 > 0)
      sgemm_into(c, n - j0, j1 - j0, j0, -1, m.row(j0), m.stride, false, m.row(j0), m.stride, true, 1,
                 m.row(j0) + j0, m.stride);
    for (int64_t j = j0; j < j1; j++) {
      float* row = m.row(j);
      for (int64_t i = j0; i < j; i++) {
        float sum = row[i];
        for (int64_t p = j0; p < i; p++) sum -= row[p] * m.row(i)[p];
        row[i] = sum / m.row(i)[i];
      }
      float pivot = row[j];
      for (int64_t p = j0; p < j; p++) pivot -= row[p] * row[p];
      if (!(pivot > 0) || !std::isfinite(pivot)) return int32_t(j + 1);
      row[j] = std::sqrt(pivot);
    }
    parallel_for(c, n - j1, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = j1 + begin; r < j1 + end; r++) {
        float* row = m.row(r);
        for (int64_t j = j0; j < j1; j++) {
          float sum = row[j];
          for (int64_t p = j0; p < j; p++) sum -= row[p] * m.row(j)[p];
          row[j] = sum / m.row(j)[j];
        }
      }
    });
  }
  return 0;
}

}  // namespace

extern "C" int dc_cpu_cholesky(dc_context* c, const dc_call* call) {
  if (!dense_rows(call->t[0]) || !dense_rows(call->t[2])) return fail(c, "F and H must have dense rows");
  const Matrices<float> f(call->t[0]), h(call->t[2]);
  const bool reversed = call->i[0] != 0;
  const int64_t n = h.columns;
  for (int64_t e = 0; e < h.batch; e++) {
    double trace = 0;
    for (int64_t i = 0; i < n; i++) trace += h.row(e, i)[i];
    const float damp = call->f[0] == 0 ? 0.0f : float(call->f[0] * trace / double(std::max<int64_t>(n, 1)));
    const Matrix<float> m = f[e];
    // The reversed factor is the lower factor of the matrix with rows and columns in reverse order.
    parallel_for(c, n, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        float* row = m.row(i);
        for (int64_t j = 0; j <= i; j++) row[j] = reversed ? h.row(e, n - 1 - j)[n - 1 - i] : h.row(e, i)[j];
        row[i] += damp;
      }
    });
    int32_t bad = factor_lower(c, m);
    parallel_for(c, n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) std::fill(m.row(i) + i + 1, m.row(i) + n, 0.0f);
    });
    if (bad && reversed) bad = int32_t(n + 1 - bad);
    data<int32_t>(call->t[1])[e] = bad;
    if (reversed) {
      for (int64_t i = 0, j = n - 1; i <= j; i++, j--) {
        if (i < j) std::swap_ranges(m.row(i), m.row(i) + n, m.row(j));
        std::reverse(m.row(i), m.row(i) + n);
        if (i < j) std::reverse(m.row(j), m.row(j) + n);
      }
    }
  }
  return 0;
}

extern "C" int dc_cpu_cholesky_solve(dc_context* c, const dc_call* call) {
  if (!dense_rows(call->t[0]) || !dense_rows(call->t[1]) || !dense_rows(call->t[2]))
    return fail(c, "X, F and B must have dense rows");
  const Matrices<float> x(call->t[0]), f(call->t[1]), b(call->t[2]);
  const bool upper = call->i[0] != 0;
  const int64_t n = f.columns, width = x.columns;
  for (int64_t e = 0; e < x.batch; e++) {
    const Matrix<float> m = f[e];
    parallel_for(c, width, 16, [&](int64_t begin, int64_t end) {
      const int64_t w = end - begin;
      for (int64_t i = 0; i < n; i++) std::memcpy(x.row(e, i) + begin, b.row(e, i) + begin, size_t(w) * 4);
      // First F Y = B, then F' X = Y, each in the order in which the unknowns become known.
      for (int pass = 0; pass < 2; pass++) {
        const bool forward = (pass == 0) != upper;
        for (int64_t step = 0; step < n; step++) {
          const int64_t i = forward ? step : n - 1 - step;
          float* y = x.row(e, i) + begin;
          for (int64_t p = forward ? 0 : i + 1; p < (forward ? i : n); p++) {
            const float s = pass == 0 ? m.row(i)[p] : m.row(p)[i];
            const float* z = x.row(e, p) + begin;
            for (int64_t j = 0; j < w; j++) y[j] -= s * z[j];
          }
          const float d = m.row(i)[i];
          for (int64_t j = 0; j < w; j++) y[j] /= d;
        }
      }
    });
  }
  return 0;
}
