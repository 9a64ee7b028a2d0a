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
  const Matrices<float> q(t[1]), w(t[2]), r(t[3]), error(t[7]);
  const Grid grid(t[4], t[5], t[6], call->i[0], call->i[1], call->i[2]);
  const int64_t rows = w.rows, k = w.columns;
  if (grid.check(c, k)) return 1;
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
        const int64_t g = grid.group_of(j);
        const float z = zero ? zero[g] : 0, code = code_of(v, scale[g], z, grid.low, grid.high);
        const float value = (code - z) * scale[g], d = w.row(e, n)[j] - value;
        codes.row(e, n)[j] = int8_t(code);
        q.row(e, n)[j] = value;
        loss += double((v - value) * factor[j]) * double((v - value) * factor[j]);
        for (int64_t i = j + 1; i < k; i++) pending[size_t(i)] += d * factor[i];
      }
      if (error.data) error.data[(t[7].rank == 2 ? e * t[7].stride[0] + n * t[7].stride[1] : n * t[7].stride[0])] = float(loss);
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
  if (grid.check(c, k)) return 1;
  parallel_for(c, codes.batch * rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t p = begin; p < end; p++) {
      const int64_t e = p / rows, n = p % rows;
      load_row(row.data(), row_of(t[1], e, n), t[1].dtype, k);
      const float *scale = grid.scales(e, n), *zero = grid.zeros(e, n);
      for (int64_t j = 0; j < k; j++) {
        const int64_t g = grid.group_of(j);
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
  if (grid.check(c, k)) return 1;
  parallel_for(c, codes.batch * rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t p = begin; p < end; p++) {
      const int64_t e = p / rows, n = p % rows;
      const float *scale = grid.scales(e, n), *zero = grid.zeros(e, n);
      for (int64_t j = 0; j < k; j++) {
        const int64_t g = grid.group_of(j);
        row[size_t(j)] = (float(codes.row(e, n)[j]) - (zero ? zero[g] : 0)) * scale[g];
      }
      store_row(row_of(t[0], e, n), t[0].dtype, row.data(), k);
    }
  });
  return 0;
}
