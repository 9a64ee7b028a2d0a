// Quantization to integer grids: search of the grids, rounding, error feedback.
#include "gemm.h"
#include "grid.h"

#include <algorithm>
#include <vector>

using namespace dc;

extern "C" int dc_cpu_ldlq(dc_context* c, const dc_call* call) {
  const dc_tensor* t = call->t;
  for (int i : {0, 1, 2, 3, 4})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const Matrices<int8_t> codes(t[0]);
  const Matrices<float> q(t[1]), w(t[2]), r(t[3]);
  const Grid grid(t[4], t[5], t[6], call->i[0], call->i[1], call->i[2]);
  const int64_t rows = w.rows, k = w.columns;
  if (grid.check(c, grid.scale.batch, k)) return 1;
  parallel_for(c, w.batch * rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> pending(static_cast<size_t>(k)), difference(static_cast<size_t>(k));
    for (int64_t p = begin; p < end; p++) {
      const int64_t e = p / rows, n = p % rows;
      const float *scale = grid.scales(e, n), *zero = grid.zeros(e, n);
      std::fill(pending.begin(), pending.end(), 0.0f);  // sum over i < j of (W_i - Q_i) R_ij
      double loss = 0;
      for (int64_t j = 0; j < k; j++) {
        const float* factor = r.row(e, j);
        const float v = w.row(e, n)[j] + pending[size_t(j)] / factor[j];
        const int64_t g = grid.group_of(e, j);
        const float z = zero ? zero[g] : 0, code = code_of(v, scale[g], z, grid.low, grid.high);
        const float value = (code - z) * scale[g], d = w.row(e, n)[j] - value;
        codes.row(e, n)[j] = int8_t(code);
        q.row(e, n)[j] = value;
        loss += double((v - value) * factor[j]) * double((v - value) * factor[j]);
        for (int64_t i = j + 1; i < k; i++) pending[size_t(i)] += d * factor[i];
      }
      if (present(t[7])) *per_row<float>(t[7], e, n) = float(loss);
    }
  });
  return 0;
}

extern "C" int dc_cpu_scale_search(dc_context* c, const dc_call* call) {
  const dc_tensor *t = call->t, &weight = t[3];
  if (!dense_rows(t[0]) || !dense_rows(t[1]) || !dense_rows(t[2]) || !dense_rows(weight))
    return fail(c, "tensors must have dense rows");
  const Matrices<float> scale(t[0]), zero(t[1]);
  const int64_t batch = t[2].rank == 3 ? t[2].dim[0] : 1, rows = t[2].dim[t[2].rank - 2], k = t[2].dim[t[2].rank - 1];
  const float low = float(call->i[0]), high = float(call->i[1]);
  const int64_t group = call->i[2], points = std::max<int64_t>(1, call->i[3]);
  const bool free_sign = call->i[4] != 0, asymmetric = present(t[1]);
  const double from = call->f[0], to = call->f[1];
  if (group <= 0 || scale.columns != (k + group - 1) / group) return fail(c, "scale does not fit W and group");
  const int64_t weight_batch = weight.rank == 2 ? weight.stride[0] : 0;
  parallel_for(c, batch * rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(k)), importance(static_cast<size_t>(group));
    for (int64_t p = begin; p < end; p++) {
      const int64_t e = p / rows, n = p % rows;
      load_row(row.data(), row_of(t[2], e, n), t[2].dtype, k);
      for (int64_t g = 0; g * group < k; g++) {
        const float* w = row.data() + g * group;
        const int64_t m = std::min(group, k - g * group);
        float least = 0, most = 0, energy = 0;
        for (int64_t j = 0; j < m; j++) {
          if (!std::isfinite(w[j])) continue;
          least = std::min(least, w[j]);
          most = std::max(most, w[j]);
        }
        for (int64_t j = 0; j < m; j++) {
          const float h = present(weight) ? data<float>(weight)[e * weight_batch + g * group + j] : 1;
          importance[size_t(j)] = std::isfinite(w[j]) ? h : 0;
          energy += importance[size_t(j)] * std::fabs(w[j]);
        }
        if (!(energy > 0) || !std::isfinite(energy))  // dead or broken channels: judge by the weights alone
          for (int64_t j = 0; j < m; j++) importance[size_t(j)] = std::isfinite(w[j]) ? 1 : 0;
        const float span = asymmetric ? most - least : std::max(most, -least) * 2;
        const float base = span / (high - low);
        float best = INFINITY, best_scale = 1, best_zero = asymmetric ? std::min(std::max(0.0f, low), high) : 0;
        if (span > 0 && std::isfinite(base) && base > 0) {
          const float center = asymmetric ? code_of(low - least / base, 1, 0, low, high) : 0;
          for (int64_t i = 0; i < points; i++) {
            const float s = base * float(points > 1 ? from + (to - from) * double(i) / double(points - 1) : from);
            for (int side = 0; side < (asymmetric ? 3 : free_sign ? 2 : 1); side++) {
              const float sign = !asymmetric && side == 1 ? -1.0f : 1.0f;
              const float z = asymmetric ? center + float(side == 0 ? 0 : side == 1 ? -1 : 1) : 0;
              if (z < low && asymmetric) continue;
              if (z > high && asymmetric) continue;
              float loss = 0;
              for (int64_t j = 0; j < m; j++) {
                if (importance[size_t(j)] == 0) continue;
                const float d = w[j] - (code_of(w[j], sign * s, z, low, high) - z) * (sign * s);
                loss += importance[size_t(j)] * d * d;
              }
              if (loss < best) best = loss, best_scale = sign * s, best_zero = z;
            }
          }
        }
        scale.row(e, n)[g] = best_scale;
        if (asymmetric) zero.row(e, n)[g] = best_zero;
      }
    }
  });
  return 0;
}

extern "C" int dc_cpu_quantize(dc_context* c, const dc_call* call) {
  const dc_tensor* t = call->t;
  for (int i : {0, 1, 2, 3})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const Matrices<int8_t> codes(t[0]);
  const Grid grid(t[2], t[3], t[4], call->i[0], call->i[1], call->i[2]);
  const int64_t rows = codes.rows, k = codes.columns;
  if (grid.check(c, grid.scale.batch, k)) return 1;
  parallel_for(c, codes.batch * rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t p = begin; p < end; p++) {
      const int64_t e = p / rows, n = p % rows;
      load_row(row.data(), row_of(t[1], e, n), t[1].dtype, k);
      const float *scale = grid.scales(e, n), *zero = grid.zeros(e, n);
      for (int64_t j = 0; j < k; j++) {
        const int64_t g = grid.group_of(e, j);
        codes.row(e, n)[j] = int8_t(code_of(row[size_t(j)], scale[g], zero ? zero[g] : 0, grid.low, grid.high));
      }
    }
  });
  return 0;
}

extern "C" int dc_cpu_dequantize(dc_context* c, const dc_call* call) {
  const dc_tensor* t = call->t;
  for (int i : {0, 1, 2, 3})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const Matrices<int8_t> codes(t[1]);
  const Grid grid(t[2], t[3], t[4], 0, 0, call->i[0]);
  const int64_t rows = codes.rows, k = codes.columns;
  if (grid.check(c, grid.scale.batch, k)) return 1;
  parallel_for(c, codes.batch * rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t p = begin; p < end; p++) {
      const int64_t e = p / rows, n = p % rows;
      const float *scale = grid.scales(e, n), *zero = grid.zeros(e, n);
      for (int64_t j = 0; j < k; j++) {
        const int64_t g = grid.group_of(e, j);
        row[size_t(j)] = (float(codes.row(e, n)[j]) - (zero ? zero[g] : 0)) * scale[g];
      }
      store_row(row_of(t[0], e, n), t[0].dtype, row.data(), k);
    }
  });
  return 0;
}

namespace {

// Codes of one row as multiples of their scales (code - zero), and the row's error W - Q.
void row_state(const Grid& grid, int64_t e, int64_t n, const int8_t* codes, const float* w, int64_t k, double* multiple,
               double* error) {
  const float *scale = grid.scales(e, n), *zero = grid.zeros(e, n);
  for (int64_t j = 0; j < k; j++) {
    const int64_t g = grid.group_of(e, j);
    multiple[j] = double(codes[j]) - double(zero ? zero[g] : 0);
    error[j] = double(w[j]) - multiple[j] * double(scale[g]);
  }
}

}  // namespace

extern "C" int dc_cpu_scale_refit(dc_context* c, const dc_call* call) {
  const dc_tensor* t = call->t;
  for (int i : {0, 1, 2, 3, 4})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const Matrices<int8_t> codes(t[1]);
  const Matrices<float> w(t[2]), h(t[3]);
  const Grid grid(t[0], t[4], t[5], 0, 0, call->i[0]);
  const int64_t rows = w.rows, k = w.columns, groups = grid.scale.columns;
  if (grid.check(c, grid.scale.batch, k)) return 1;
  parallel_for(c, w.batch * rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> multiple(static_cast<size_t>(k)), error(static_cast<size_t>(k)), right(static_cast<size_t>(groups)),
        a(static_cast<size_t>(groups * groups)), part(static_cast<size_t>(groups));
    for (int64_t p = begin; p < end; p++) {
      const int64_t e = p / rows, n = p % rows;
      row_state(grid, e, n, codes.row(e, n), w.row(e, n), k, multiple.data(), error.data());
      std::fill(a.begin(), a.end(), 0.0);
      std::fill(right.begin(), right.end(), 0.0);
      for (int64_t i = 0; i < k; i++) {
        const float* row = h.row(e, i);
        std::fill(part.begin(), part.end(), 0.0);
        double gradient = 0;
        for (int64_t j = 0; j < k; j++) {
          part[size_t(grid.group_of(e, j))] += double(row[j]) * multiple[size_t(j)];
          gradient += double(row[j]) * error[size_t(j)];
        }
        const size_t g = size_t(grid.group_of(e, i));
        right[g] += multiple[size_t(i)] * gradient;
        for (size_t q = 0; q < size_t(groups); q++) a[g * size_t(groups) + q] += multiple[size_t(i)] * part[q];
      }
      double trace = 0;
      for (int64_t g = 0; g < groups; g++) trace += a[size_t(g * groups + g)];
      for (int64_t g = 0; g < groups; g++) a[size_t(g * groups + g)] += call->f[0] * trace / double(groups);
      // Cholesky and two substitutions; a row whose system is singular keeps its scales.
      bool good = true;
      for (int64_t i = 0; i < groups && good; i++) {
        for (int64_t j = 0; j <= i; j++) {
          double sum = a[size_t(i * groups + j)];
          for (int64_t q = 0; q < j; q++) sum -= a[size_t(i * groups + q)] * a[size_t(j * groups + q)];
          if (j < i)
            a[size_t(i * groups + j)] = sum / a[size_t(j * groups + j)];
          else if (sum > 0 && std::isfinite(sum))
            a[size_t(i * groups + i)] = std::sqrt(sum);
          else
            good = false;
        }
      }
      if (!good) continue;
      for (int64_t i = 0; i < groups; i++) {
        for (int64_t q = 0; q < i; q++) right[size_t(i)] -= a[size_t(i * groups + q)] * right[size_t(q)];
        right[size_t(i)] /= a[size_t(i * groups + i)];
      }
      for (int64_t i = groups - 1; i >= 0; i--) {
        for (int64_t q = i + 1; q < groups; q++) right[size_t(i)] -= a[size_t(q * groups + i)] * right[size_t(q)];
        right[size_t(i)] /= a[size_t(i * groups + i)];
      }
      float* scale = grid.scale.row(e, n);
      for (int64_t g = 0; g < groups; g++) {
        const float s = float(double(scale[g]) + right[size_t(g)]);
        if (std::isfinite(s) && s != 0) scale[g] = s;
      }
    }
  });
  return 0;
}

extern "C" int dc_cpu_code_descent(dc_context* c, const dc_call* call) {
  const dc_tensor* t = call->t;
  for (int i : {0, 1, 2, 3, 4})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const Matrices<int8_t> codes(t[0]);
  const Matrices<float> w(t[1]), h(t[2]);
  const Grid grid(t[3], t[4], t[5], call->i[0], call->i[1], call->i[2]);
  const int64_t rows = w.rows, k = w.columns;
  if (grid.check(c, grid.scale.batch, k)) return 1;
  parallel_for(c, w.batch * rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> multiple(static_cast<size_t>(k)), error(static_cast<size_t>(k)), gradient(static_cast<size_t>(k));
    for (int64_t p = begin; p < end; p++) {
      const int64_t e = p / rows, n = p % rows;
      const float* scale = grid.scales(e, n);
      int8_t* code = codes.row(e, n);
      row_state(grid, e, n, code, w.row(e, n), k, multiple.data(), error.data());
      for (int64_t i = 0; i < k; i++) {
        double sum = 0;
        for (int64_t j = 0; j < k; j++) sum += double(h.row(e, i)[j]) * error[size_t(j)];
        gradient[size_t(i)] = sum;
      }
      int32_t changed = 0;
      for (int64_t j = 0; j < k; j++) {
        const double s = scale[grid.group_of(e, j)], curve = s * h.row(e, j)[j];
        const double step = std::nearbyint(gradient[size_t(j)] / curve);
        const double moved = std::min(std::max(code[j] + step, double(grid.low)), double(grid.high));
        const double delta = moved - code[j];
        if (!(delta != 0) || !std::isfinite(delta)) continue;
        code[j] = int8_t(moved);
        changed++;
        const float* row = h.row(e, j);
        for (int64_t i = 0; i < k; i++) gradient[size_t(i)] -= delta * s * double(row[i]);
      }
      if (present(t[6])) *per_row<int32_t>(t[6], e, n) = changed;
    }
  });
  return 0;
}
