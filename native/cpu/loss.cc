// Losses over rows of logits [T,V]: cross-entropy and Kullback-Leibler divergence.
#include <algorithm>

#include "view.h"

using namespace dc;

namespace {

// One row of logits: its maximum, where that first stands, and log(sum(exp)).
struct LogitRow {
  std::vector<float> x, e;  // the logits, and e^(x - max)
  double max = 0, lse = 0, sum = 0;
  int64_t top = 0;

  void read(const dc_tensor& t, int64_t r) {
    const int64_t n = t.dim[1];
    const auto& kernels = element_kernels();
    x.resize(size_t(n));
    load_strided(x.data(), t, r * t.stride[0], t.stride[1], n);
    e = x;
    const float m = kernels.max(x.data(), n);
    top = 0;
    while (top + 1 < n && x[size_t(top)] != m) top++;
    max = m;
    sum = kernels.exp_sum(e.data(), 1, m, n);
    lse = max + std::log(sum);
  }
};

}  // namespace

extern "C" int dc_cpu_cross_entropy(dc_context* c, const dc_call* call) {
  const dc_tensor &loss = call->t[0], &logits = call->t[1], &targets = call->t[2], &lse = call->t[3], &top = call->t[4];
  const int64_t n = logits.dim[0], width = logits.dim[1];
  auto target = [&](int64_t r) { return data<int32_t>(targets)[r * targets.stride[0]]; };
  for (int64_t r = 0; r < n; r++)
    if (target(r) < -1 || target(r) >= width) return fail(c, "targets[%ld] = %d of %ld", long(r), target(r), long(width));
  parallel_for(c, n, row_grain(width * 4), [&](int64_t begin, int64_t end) {
    LogitRow row;
    for (int64_t r = begin; r < end; r++) {
      row.read(logits, r);
      const int32_t t = target(r);
      data<float>(loss)[r * loss.stride[0]] =
          t < 0 ? 0 : float(row.max - double(row.x[size_t(t)]) + std::log(row.sum));
      if (present(lse)) data<float>(lse)[r * lse.stride[0]] = float(row.lse);
      if (present(top)) data<int32_t>(top)[r * top.stride[0]] = int32_t(row.top);
    }
  });
  return 0;
}

extern "C" int dc_cpu_kl(dc_context* c, const dc_call* call) {
  const dc_tensor &kl = call->t[0], &p = call->t[1], &q = call->t[2], &same = call->t[3];
  const int64_t n = p.dim[0], width = p.dim[1];
  parallel_for(c, n, row_grain(width * 8), [&](int64_t begin, int64_t end) {
    LogitRow a, b;
    for (int64_t r = begin; r < end; r++) {
      a.read(p, r);
      b.read(q, r);
      // sum_i p_i ((x_i - max_p) - (y_i - max_q)) + log(sum_q) - log(sum_p)
      double total = 0;
      for (size_t i = 0; i < size_t(width); i++)
        if (a.e[i] > 0) total += double(a.e[i]) * ((double(a.x[i]) - a.max) - (double(b.x[i]) - b.max));
      data<float>(kl)[r * kl.stride[0]] = float(total / a.sum + std::log(b.sum) - std::log(a.sum));
      if (present(same)) data<float>(same)[r * same.stride[0]] = a.top == b.top ? 1 : 0;
    }
  });
  return 0;
}

// dlogits = scale (softmax(logits) - onehot(target)); rows of target -1 get zeros.
extern "C" int dc_cpu_cross_entropy_backward(dc_context* c, const dc_call* call) {
  const dc_tensor &dlogits = call->t[0], &logits = call->t[1], &targets = call->t[2], &lse = call->t[3];
  const float scale = float(call->f[0]);
  const int64_t n = logits.dim[0], width = logits.dim[1];
  auto target = [&](int64_t r) { return data<int32_t>(targets)[r * targets.stride[0]]; };
  for (int64_t r = 0; r < n; r++)
    if (target(r) < -1 || target(r) >= width) return fail(c, "targets[%ld] = %d of %ld", long(r), target(r), long(width));
  parallel_for(c, n, row_grain(width * 4), [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(width));
    const auto& kernels = element_kernels();
    for (int64_t r = begin; r < end; r++) {
      if (target(r) < 0) {
        std::fill(row.begin(), row.end(), 0.0f);
      } else {
        load_strided(row.data(), logits, r * logits.stride[0], logits.stride[1], width);
        kernels.exp_sum(row.data(), 1, data<float>(lse)[r * lse.stride[0]], width);
        row[size_t(target(r))] -= 1;
        kernels.scale(row.data(), scale, width);
      }
      store_strided(dlogits, r * dlogits.stride[0], dlogits.stride[1], row.data(), width);
    }
  });
  return 0;
}

// dq = scale (softmax(q) - softmax(p))
extern "C" int dc_cpu_kl_backward(dc_context* c, const dc_call* call) {
  const dc_tensor &dq = call->t[0], &p = call->t[1], &q = call->t[2];
  const float scale = float(call->f[0]);
  const int64_t n = q.dim[0], width = q.dim[1];
  parallel_for(c, n, row_grain(width * 8), [&](int64_t begin, int64_t end) {
    LogitRow a, b;
    const auto& kernels = element_kernels();
    for (int64_t r = begin; r < end; r++) {
      a.read(p, r);
      b.read(q, r);
      kernels.scale(b.e.data(), float(scale / b.sum), width);
      kernels.axpy(b.e.data(), float(-scale / a.sum), a.e.data(), width);
      store_strided(dq, r * dq.stride[0], dq.stride[1], b.e.data(), width);
    }
  });
  return 0;
}
