// Refinement of quantized weights under the full Hessian: scales by least squares, codes by coordinate descent.
#include <algorithm>
#include <vector>

#include "gemm.h"
#include "grid.h"
#include "kernels/gemm.h"
#include "kernels/sweep.h"

using namespace dc;

namespace {

// Rows at a time: their errors and gradients take some 32 MB each.
int64_t chunk_rows(int64_t k) { return std::max<int64_t>(64, (8 << 20) / std::max<int64_t>(k, 1)); }

// codes - zero and W - Q of one row.
void row_state(const Grid& grid, int64_t e, int64_t n, const int8_t* codes, const float* w, int64_t k, float* multiple,
               float* error) {
  const float *scale = grid.scales(e, n), *zero = grid.zeros(e, n);
  for (int64_t j = 0; j < k; j++) {
    const int64_t g = grid.group_of(e, j);
    const float m = float(codes[j]) - (zero ? zero[g] : 0);
    if (multiple) multiple[j] = m;
    error[j] = w[j] - m * scale[g];
  }
}

// Solves A x = b for symmetric positive definite A [n,n] (lower triangle, overwritten); false where it is not.
bool solve_positive(double* a, double* b, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    double* row = a + i * n;
    for (int64_t j = 0; j < i; j++) {
      double sum = row[j];
      for (int64_t p = 0; p < j; p++) sum -= row[p] * a[j * n + p];
      row[j] = sum / a[j * n + j];
    }
    double pivot = row[i];
    for (int64_t p = 0; p < i; p++) pivot -= row[p] * row[p];
    if (!(pivot > 0) || !std::isfinite(pivot)) return false;
    row[i] = std::sqrt(pivot);
    double sum = b[i];
    for (int64_t p = 0; p < i; p++) sum -= row[p] * b[p];
    b[i] = sum / row[i];
  }
  for (int64_t i = n - 1; i >= 0; i--) {
    for (int64_t p = i + 1; p < n; p++) b[i] -= a[p * n + i] * b[p];
    b[i] /= a[i * n + i];
  }
  return true;
}

double dot(const float* a, const float* b, int64_t n) {
  float parts[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int p = 0; p < 8; p++) parts[p] += a[i + p] * b[i + p];
  double sum = 0;
  for (const float part : parts) sum += double(part);
  for (; i < n; i++) sum += double(a[i]) * double(b[i]);
  return sum;
}

}  // namespace

extern "C" int dc_cpu_scale_refit(dc_context* c, const dc_call* call) {
  const dc_tensor* t = call->t;
  for (int i : {0, 1, 2, 3, 4, 5, 6})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const Matrices<int8_t> codes(t[1]);
  const Matrices<float> w(t[2]), h(t[3]), known(t[6]);
  const Grid grid(t[0], t[4], t[5], 0, 0, call->i[0]);
  const int64_t rows = w.rows, k = w.columns, groups = grid.scale.columns, chunk = std::min(chunk_rows(k), rows);
  if (grid.check(c, w.batch, k)) return 1;
  Scratch multiples, errors, products, permuted;
  std::vector<double> systems(size_t(chunk * groups * (groups + 1)));
  for (int64_t e = 0; e < w.batch; e++) {
    // Columns in the order of their groups: group g has begins[g]..begins[g + 1] of `order`.
    std::vector<int64_t> begins(size_t(groups + 1)), order(static_cast<size_t>(k));
    for (int64_t j = 0; j < k; j++) begins[size_t(grid.group_of(e, j) + 1)]++;
    for (int64_t g = 0; g < groups; g++) begins[size_t(g + 1)] += begins[size_t(g)];
    std::vector<int64_t> next(begins.begin(), begins.end() - 1);
    for (int64_t j = 0; j < k; j++) order[size_t(next[size_t(grid.group_of(e, j))]++)] = j;
    const bool sorted = std::is_sorted(order.begin(), order.end());
    Matrix<float> hp = h[e];
    if (!sorted) {
      hp = {permuted.take(size_t(k * k)), k, k, k};
      parallel_for(c, k, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
          for (int64_t j = 0; j < k; j++) hp.row(i)[j] = h.row(e, order[size_t(i)])[order[size_t(j)]];
      });
    }
    for (int64_t r0 = 0; r0 < rows; r0 += chunk) {
      const int64_t n = std::min(chunk, rows - r0);
      float *d = multiples.take(size_t(n * k)), *product = products.take(size_t(n * k));
      float* error = known.data ? nullptr : errors.take(size_t(n * k));
      parallel_for(c, n, 8, [&](int64_t begin, int64_t end) {
        std::vector<float> plain(size_t(2 * k));
        for (int64_t r = begin; r < end; r++) {
          row_state(grid, e, r0 + r, codes.row(e, r0 + r), w.row(e, r0 + r), k, plain.data(), plain.data() + k);
          for (int64_t j = 0; j < k; j++) {
            d[r * k + j] = plain[size_t(order[size_t(j)])];
            if (known.data) product[r * k + j] = known.row(e, r0 + r)[order[size_t(j)]];
            else error[r * k + j] = plain[size_t(k + order[size_t(j)])];
          }
        }
      });
      double *a = systems.data(), *right = a + n * groups * groups;
      if (error) sgemm_into(c, n, k, k, 1, error, k, false, hp.data, hp.stride, false, 0, product, k);
      parallel_for(c, n, 8, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
          for (int64_t g = 0; g < groups; g++) {
            const int64_t b = begins[size_t(g)];
            right[r * groups + g] = dot(d + r * k + b, product + r * k + b, begins[size_t(g + 1)] - b);
          }
      });
      for (int64_t g = 0; g < groups; g++) {
        const int64_t b = begins[size_t(g)], m = begins[size_t(g + 1)] - b, width = begins[size_t(g + 1)];
        sgemm_into(c, n, width, m, 1, d + b, k, false, hp.row(b), hp.stride, false, 0, product, k);
        parallel_for(c, n, 8, [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; r++)
            for (int64_t q = 0; q <= g; q++) {
              const int64_t from = begins[size_t(q)];
              a[(r * groups + g) * groups + q] = dot(d + r * k + from, product + r * k + from, begins[size_t(q + 1)] - from);
            }
        });
      }
      parallel_for(c, n, 8, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
          double *system = a + r * groups * groups, *x = right + r * groups, trace = 0;
          for (int64_t g = 0; g < groups; g++) trace += system[g * groups + g];
          for (int64_t g = 0; g < groups; g++) system[g * groups + g] += call->f[0] * trace / double(groups);
          if (!solve_positive(system, x, groups)) continue;
          float* scale = grid.scale.row(e, r0 + r);
          for (int64_t g = 0; g < groups; g++) {
            const float s = float(double(scale[g]) + x[g]);
            if (std::isfinite(s) && s != 0) scale[g] = s;
          }
        }
      });
    }
  }
  return 0;
}

extern "C" int dc_cpu_code_descent(dc_context* c, const dc_call* call) {
  const dc_tensor* t = call->t;
  for (int i : {0, 1, 2, 3, 4, 5, 7})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const Matrices<int8_t> codes(t[0]);
  const Matrices<float> w(t[1]), h(t[2]), known(t[7]);
  const bool gains = present(t[8]);
  const Grid grid(t[3], t[4], t[5], call->i[0], call->i[1], call->i[2]);
  const int64_t rows = w.rows, k = w.columns, passes = call->i[3], groups = grid.scale.columns;
  if (grid.check(c, w.batch, k)) return 1;
  const SweepKernels& sweep = sweep_kernels();
  const int64_t lanes = sweep.lanes, block = 128, chunk = std::min(chunk_rows(k), rows);
  // Strips of `lanes` rows that go through a block of H's rows together, while that is in cache.
  const int64_t most = std::max<int64_t>(1, (1 << 20) / (lanes * std::max<int64_t>(k, 1)));
  Scratch errors, gradients;
  for (int64_t e = 0; e < w.batch; e++) {
    const Matrix<float> m = h[e];
    for (int64_t r0 = 0; r0 < rows; r0 += chunk) {
      const int64_t n = std::min(chunk, rows - r0);
      const float* gradient = known.data ? known.row(e, r0) : nullptr;
      const int64_t ld = known.data ? known.stride : k;
      if (!known.data) {
        float *error = errors.take(size_t(n * k)), *product = gradients.take(size_t(n * k));
        parallel_for(c, n, 8, [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; r++)
            row_state(grid, e, r0 + r, codes.row(e, r0 + r), w.row(e, r0 + r), k, nullptr, error + r * k);
        });
        sgemm_into(c, n, k, k, 1, error, k, false, m.data, m.stride, false, 0, product, k);
        gradient = product;
      }
      const int64_t strips = (n + lanes - 1) / lanes;
      const int64_t tiles = std::min(strips, std::max((strips + most - 1) / most, int64_t(c->threads) * 4));
      parallel_for(c, tiles, 1, [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        for (int64_t tile = begin; tile < end; tile++) {
          const int64_t s0 = strips * tile / tiles, s1 = strips * (tile + 1) / tiles, width = s1 - s0;
          if (width == 0) continue;
          const int64_t strip_floats = k * lanes, grid_floats = groups * lanes;
          float* g = scratch.take(size_t(width * (2 * strip_floats + grid_floats) + block * lanes));
          float *code = g + width * strip_floats, *scale = code + width * strip_floats;
          float* delta = scale + width * grid_floats;
          std::vector<float> error(size_t(gains ? k : 0));
          for (int64_t s = 0; s < width; s++) {
            const int64_t first = (s0 + s) * lanes, count = std::min(lanes, n - first);
            gemm_kernels().pack(g + s * strip_floats, gradient + first * ld, DC_F32, ld, 1, count, k, int(lanes));
            gemm_kernels().pack(scale + s * grid_floats, grid.scales(e, r0 + first), DC_F32, grid.scale.stride, 1, count,
                                groups, int(lanes));
            float* strip = code + s * strip_floats;
            for (int64_t j = 0; j < k; j++)
              for (int64_t r = 0; r < lanes; r++)
                strip[j * lanes + r] = r < count ? float(codes.row(e, r0 + first + r)[j]) : 0;
          }
          for (int64_t pass = 0; pass < passes; pass++) {
            int64_t changed = 0;
            for (int64_t j0 = 0; j0 < k; j0 += block) {
              const int64_t j1 = std::min(j0 + block, k);
              for (int64_t s = 0; s < width; s++) {
                const float* scales[block];
                for (int64_t j = j0; j < j1; j++)
                  scales[j - j0] = scale + s * grid_floats + grid.group_of(e, j) * lanes;
                DescentColumns x{};
                x.k = k, x.j0 = j0, x.j1 = j1;
                x.low = grid.low, x.high = grid.high;
                x.h = m.data, x.ldh = m.stride;
                x.scale = scales;
                x.gradient = g + s * strip_floats, x.codes = code + s * strip_floats;
                x.from = gains || pass + 1 < passes ? 0 : j0;  // else nobody reads the earlier columns any more
                x.delta = delta;
                changed += sweep.descend(x);
              }
            }
            if (changed == 0) break;
          }
          for (int64_t s = 0; s < width; s++) {
            const int64_t first = (s0 + s) * lanes, count = std::min(lanes, n - first);
            for (int64_t r = 0; r < count; r++) {
              int8_t* row = codes.row(e, r0 + first + r);
              const float* strip = g + s * strip_floats + r;
              auto state = [&] { row_state(grid, e, r0 + first + r, row, w.row(e, r0 + first + r), k, nullptr, error.data()); };
              double gain = 0;
              if (gains) {
                state();
                gain = dot(error.data(), gradient + (first + r) * ld, k);
              }
              int32_t differ = 0;
              for (int64_t j = 0; j < k; j++) {
                const auto now = int8_t(code[s * strip_floats + j * lanes + r]);
                differ += now != row[j];
                row[j] = now;
              }
              if (present(t[6])) *per_row<int32_t>(t[6], e, r0 + first + r) = differ;
              if (!gains) continue;
              state();
              for (int64_t j = 0; j < k; j++) gain -= double(error[size_t(j)]) * double(strip[j * lanes]);
              *per_row<float>(t[8], e, r0 + first + r) = float(gain);
            }
          }
        }
      });
    }
  }
  return 0;
}
