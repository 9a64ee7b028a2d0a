// Training: fake quantization with learned step sizes, AdamW.
#include <algorithm>
#include <vector>

#include "grid.h"

using namespace dc;

extern "C" int dc_cpu_fake_quant(dc_context* c, const dc_call* call) {
  const dc_tensor *t = call->t, none{};
  for (int i : {0, 1, 2, 3})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const Grid grid(t[2], t[3], none, call->i[0], call->i[1], call->i[2]);
  const int64_t rows = t[1].dim[0], k = t[1].dim[1];
  if (grid.check(c, 1, k)) return 1;
  parallel_for(c, rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t n = begin; n < end; n++) {
      load_row(row.data(), row_of(t[1], 0, n), t[1].dtype, k);
      const float *scale = grid.scales(0, n), *zero = grid.zeros(0, n);
      for (int64_t j = 0; j < k; j++) {
        const int64_t g = j / grid.group;
        const float s = scale[g], z = zero ? zero[g] : 0;
        row[size_t(j)] = (code_of(row[size_t(j)], s, z, grid.low, grid.high) - z) * s;
      }
      store_row(row_of(t[0], 0, n), t[0].dtype, row.data(), k);
    }
  });
  return 0;
}

extern "C" int dc_cpu_fake_quant_backward(dc_context* c, const dc_call* call) {
  const dc_tensor *t = call->t, none{};
  for (int i : {0, 1, 2, 3, 4, 5, 6})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const dc_tensor &dw = t[0], &dy = t[3], &w = t[4];
  const Matrices<float> dscale(t[1]), dzero(t[2]);
  const Grid grid(t[5], t[6], none, call->i[0], call->i[1], call->i[2]);
  const int64_t rows = w.dim[0], k = w.dim[1], groups = grid.scale.columns;
  if (grid.check(c, 1, k)) return 1;
  parallel_for(c, rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(size_t(2 * k));
    float *weight = buffer.data(), *gradient = weight + k;
    for (int64_t n = begin; n < end; n++) {
      load_row(weight, row_of(w, 0, n), w.dtype, k);
      load_row(gradient, row_of(dy, 0, n), dy.dtype, k);
      const float *scale = grid.scales(0, n), *zero = grid.zeros(0, n);
      for (int64_t g = 0; g < groups; g++) {
        const float s = scale[g], z = zero ? zero[g] : 0;
        float ds = 0, dz = 0;
        for (int64_t j = g * grid.group; j < std::min((g + 1) * grid.group, k); j++) {
          const float v = weight[j] / s + z, r = std::nearbyint(v), d = gradient[j];
          if (r >= grid.low && r <= grid.high) {
            ds += d * (r - v);
          } else {
            ds += d * (code_of(weight[j], s, z, grid.low, grid.high) - z);
            dz -= d * s;
            gradient[j] = 0;
          }
        }
        dscale.row(0, n)[g] = ds;
        if (present(t[2])) dzero.row(0, n)[g] = dz;
      }
      store_row(row_of(dw, 0, n), dw.dtype, gradient, k);
    }
  });
  return 0;
}

namespace {

bool contiguous(const dc_tensor& t) {
  int64_t step = 1;
  for (int d = t.rank - 1; d >= 0; d--) {
    if (t.dim[d] != 1 && t.stride[d] != step) return false;
    step *= t.dim[d];
  }
  return true;
}

}  // namespace

extern "C" int dc_cpu_adamw(dc_context* c, const dc_call* call) {
  const dc_tensor *t = call->t, &g = t[3];
  for (int i : {0, 1, 2, 3})
    if (!contiguous(t[i])) return fail(c, "tensors must be contiguous");
  float *p = data<float>(t[0]), *m = data<float>(t[1]), *v = data<float>(t[2]);
  const double step = double(call->i[0]), lr = call->f[0], beta1 = call->f[1], beta2 = call->f[2];
  const float clip = present(t[4]) ? *data<float>(t[4]) : 1.0f, b1 = float(beta1), b2 = float(beta2);
  const float a1 = float(1 - beta1), a2 = float(1 - beta2), keep = float(1 - lr * call->f[4]), eps = float(call->f[3]);
  const float rate = float(lr / (1 - std::pow(beta1, step))), root = float(1 / std::sqrt(1 - std::pow(beta2, step)));
  const int64_t block = 1024, n = count(t[0]);
  parallel_for(c, (n + block - 1) / block, 16, [&](int64_t begin, int64_t end) {
    float gradient[block];
    for (int64_t at = begin * block; at < std::min(end * block, n); at += block) {
      const int64_t size = std::min(block, n - at);
      load_row(gradient, static_cast<const char*>(g.data) + at * int64_t(dtype_size(g.dtype)), g.dtype, size);
      for (int64_t i = 0; i < size; i++) {
        const float d = clip * gradient[i], m1 = b1 * m[at + i] + a1 * d, v1 = b2 * v[at + i] + a2 * d * d;
        m[at + i] = m1;
        v[at + i] = v1;
        p[at + i] = keep * p[at + i] - rate * m1 / (std::sqrt(v1) * root + eps);
      }
    }
  });
  return 0;
}
