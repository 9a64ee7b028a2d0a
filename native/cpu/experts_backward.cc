// Mixture of experts, backward.
#include <algorithm>
#include <vector>

#include "gemm.h"
#include "view.h"

using namespace dc;

extern "C" int dc_cpu_grouped_outer(dc_context* c, const dc_call* call) {
  const dc_tensor &dB = call->t[0], &dC = call->t[1], &A = call->t[2], &offsets = call->t[3];
  for (int64_t e = 0; e < dB.dim[0]; e++) {
    const int32_t* offset = data<int32_t>(offsets);
    const int64_t begin = offset[e * offsets.stride[0]], end = offset[(e + 1) * offsets.stride[0]];
    if (begin < 0 || end < begin || end > A.dim[0])
      return fail(c, "offsets[%ld..%ld] = %ld..%ld of %ld rows", long(e), long(e + 1), long(begin), long(end), long(A.dim[0]));
    if (begin == end) continue;
    Product p;
    p.c = dB, p.a = dC, p.b = A;
    p.c.rank = 2;
    p.c.data = element(dB, e * dB.stride[0]);
    for (int d : {0, 1}) p.c.dim[d] = dB.dim[d + 1], p.c.stride[d] = dB.stride[d + 1];
    p.c.dim[2] = 1;
    p.a.data = element(dC, begin * dC.stride[0]);
    p.a.dim[0] = dC.dim[1], p.a.dim[1] = end - begin;
    std::swap(p.a.stride[0], p.a.stride[1]);
    p.b.data = element(A, begin * A.stride[0]);
    p.b.dim[0] = end - begin;
    p.m = dC.dim[1], p.n = A.dim[1], p.k = end - begin;
    p.beta = 1;
    multiply(c, p);
  }
  return 0;
}

extern "C" int dc_cpu_expert_combine_backward(dc_context* c, const dc_call* call) {
  const dc_tensor &dy = call->t[0], &dw = call->t[1], &out = call->t[2], &y = call->t[3], &place = call->t[4], &w = call->t[5];
  const int64_t T = out.dim[0], width = out.dim[1], K = place.dim[1];
  const Places row_of{place};
  if (row_of.check(c, y.dim[0])) return 1;
  parallel_for(c, T, row_grain(width * K), [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(width));
    RowReader gradients, values;
    for (int64_t t = begin; t < end; t++) {
      const float* d = gradients.row(out, t * out.stride[0], out.stride[1], width);
      for (int64_t j = 0; j < K; j++) {
        const float *v = values.row(y, row_of(t, j) * y.stride[0], y.stride[1], width);
        double dot = 0;
        for (int64_t i = 0; i < width; i++) dot += double(d[i]) * v[i];
        data<float>(dw)[t * dw.stride[0] + j * dw.stride[1]] = float(dot);
        const float weight = data<float>(w)[t * w.stride[0] + j * w.stride[1]];
        for (int64_t i = 0; i < width; i++) row[size_t(i)] = weight * d[i];
        store_strided(dy, row_of(t, j) * dy.stride[0], dy.stride[1], row.data(), width);
      }
    }
  });
  return 0;
}

extern "C" int dc_cpu_route_backward(dc_context* c, const dc_call* call) {
  const dc_tensor &dlogits = call->t[0], &dw = call->t[1], &logits = call->t[2], &idx = call->t[3];
  const int scoring = int(call->i[0]);
  const bool normalize = call->i[1] != 0;
  const double scale = call->f[0];
  const int64_t T = logits.dim[0], E = logits.dim[1], K = idx.dim[1];
  for (int64_t t = 0; t < T; t++)
    for (int64_t j = 0; j < K; j++) {
      const int32_t e = data<int32_t>(idx)[t * idx.stride[0] + j * idx.stride[1]];
      if (e < 0 || e >= E) return fail(c, "idx[%ld, %ld] = %d of %ld experts", long(t), long(j), e, long(E));
    }
  parallel_for(c, T, row_grain(E * 8), [&](int64_t begin, int64_t end) {
    std::vector<float> x(static_cast<size_t>(E)), d(static_cast<size_t>(E));
    std::vector<double> score(static_cast<size_t>(E)), slope(static_cast<size_t>(K));
    for (int64_t t = begin; t < end; t++) {
      load_strided(x.data(), logits, t * logits.stride[0], logits.stride[1], E);
      auto chosen = [&](int64_t j) { return size_t(data<int32_t>(idx)[t * idx.stride[0] + j * idx.stride[1]]); };
      if (scoring == 0) {
        double top = -INFINITY, sum = 0;
        for (float v : x) top = std::max<double>(top, v);
        for (size_t e = 0; e < size_t(E); e++) sum += score[e] = std::exp(x[e] - top);
        for (double& s : score) s /= sum;
      } else {
        for (size_t e = 0; e < size_t(E); e++)
          score[e] = scoring == 1 ? 1 / (1 + std::exp(-double(x[e])))
                                  : std::sqrt(x[e] > 20 ? double(x[e]) : std::log1p(std::exp(double(x[e]))));
      }
      // Gradients of the chosen scores, through the division by their sum where there is one.
      double sum = 0, dot = 0;
      for (int64_t j = 0; j < K; j++) {
        slope[size_t(j)] = scale * data<float>(dw)[t * dw.stride[0] + j * dw.stride[1]];
        sum += score[chosen(j)];
        dot += slope[size_t(j)] * score[chosen(j)];
      }
      if (normalize) {
        for (double& s : slope) s = (s - dot / (sum + 1e-20)) / (sum + 1e-20);
        dot = 0;
        for (int64_t j = 0; j < K; j++) dot += slope[size_t(j)] * score[chosen(j)];
      }
      std::fill(d.begin(), d.end(), 0.0f);
      if (scoring == 0)
        for (size_t e = 0; e < size_t(E); e++) d[e] = float(-score[e] * dot);
      for (int64_t j = 0; j < K; j++) {
        const size_t e = chosen(j);
        const double s = score[e], sigmoid = 1 / (1 + std::exp(-double(x[e])));
        d[e] += float(slope[size_t(j)] * (scoring == 0 ? s : scoring == 1 ? s * (1 - s) : sigmoid / (2 * s)));
      }
      store_strided(dlogits, t * dlogits.stride[0], dlogits.stride[1], d.data(), E);
    }
  });
  return 0;
}

extern "C" int dc_cpu_choice_gradient(dc_context* c, const dc_call* call) {
  const dc_tensor &ds = call->t[0], &scores = call->t[1], &gains = call->t[2];
  const int64_t T = scores.dim[0], E = scores.dim[1];
  const double active = double(call->i[0]), temperature = call->f[0], scale = call->f[1];
  if (!(active > 0 && active < double(E))) return fail(c, "%g chosen of %ld", active, long(E));
  // With tau this far below one score its p is active / E: so tau lies that far below something between all scores.
  const double shift = temperature * std::log(active / (double(E) - active));
  parallel_for(c, T, row_grain(E * 64), [&](int64_t begin, int64_t end) {
    std::vector<float> s(static_cast<size_t>(E)), g(static_cast<size_t>(E));
    std::vector<double> q(static_cast<size_t>(E));
    for (int64_t t = begin; t < end; t++) {
      load_strided(s.data(), scores, t * scores.stride[0], scores.stride[1], E);
      load_strided(g.data(), gains, t * gains.stride[0], gains.stride[1], E);
      double low = INFINITY, high = -INFINITY, tau = 0;
      for (const float v : s) low = std::min<double>(low, v), high = std::max<double>(high, v), tau += v;
      low -= shift, high -= shift, tau = tau / double(E) - shift;
      auto choose = [&] {  // sum p
        double sum = 0;
        for (size_t e = 0; e < size_t(E); e++) {
          const double p = 1 / (1 + std::exp((tau - s[e]) / temperature));
          sum += p;
          q[e] = p * (1 - p);
        }
        return sum;
      };
      for (int i = 0; i < 60; i++) {
        const double excess = choose() - active;
        if (!(std::abs(excess) > 1e-12 * double(E))) break;
        (excess > 0 ? low : high) = tau;
        double slope = 0;
        for (const double v : q) slope += v;
        const double next = tau + excess * temperature / slope;
        tau = next > low && next < high ? next : (low + high) / 2;
      }
      choose();
      double weight = 0, mean = 0;
      for (size_t e = 0; e < size_t(E); e++) weight += q[e], mean += q[e] * g[e];
      mean /= std::max(weight, 1e-30);
      for (size_t e = 0; e < size_t(E); e++) g[e] = float(scale / temperature * q[e] * (g[e] - mean));
      store_strided(ds, t * ds.stride[0], ds.stride[1], g.data(), E);
    }
  });
  return 0;
}
