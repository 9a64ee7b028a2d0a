// Attention, backward (Dao et al. 2022, appendix B): weights are computed again from the log-sum-exp, tile by tile.
// Two passes, one over queries for dq and one over keys for dk and dv: nothing is summed across threads.
#include "attention.h"
#include "gemm.h"

using namespace dc;

namespace {

constexpr int64_t kTile = 128;

dc_tensor rows_of(float* x, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  dc_tensor t{};
  t.data = x;
  t.dtype = DC_F32;
  t.rank = 2;
  t.dim[0] = rows, t.dim[1] = columns, t.dim[2] = t.dim[3] = 1;
  t.stride[0] = row_stride, t.stride[1] = column_stride;
  return t;
}
dc_tensor transposed(dc_tensor t) {
  std::swap(t.dim[0], t.dim[1]);
  std::swap(t.stride[0], t.stride[1]);
  return t;
}
// c = a b + beta c on the calling thread.
void product(const dc_tensor& c, const dc_tensor& a, const dc_tensor& b, double beta) {
  Product p;
  p.c = c, p.a = a, p.b = b;
  p.m = c.dim[0], p.n = c.dim[1], p.k = a.dim[1];
  p.beta = beta;
  multiply(nullptr, p);
}

struct Backward {
  const dc_tensor &dq, &dk, &dv, &d_o, &q, &k, &v, &lse, &lengths;
  Mask mask;
  float scale;
  int64_t B, S, H, D, T, G, Dv;
  std::vector<float> delta;  // [B,H,S]: sum of do o

  // Of queries [s0, s0 + m) and keys [t0, t0 + n): p = weights, ds = gradients of the scores (without `scale`). False:
  // no query of the tile sees a key of it.
  bool tile(int64_t b, int64_t h, int64_t s0, int64_t m, int64_t t0, int64_t n, float* p, float* ds) const {
    const int64_t g = h / G, length = key_count(lengths, b, T);
    int64_t first, last;
    bool any = false;
    for (int64_t i = 0; i < m && !any; i++) {
      mask.keys(s0 + i, length, &first, &last);
      any = std::max(first, t0) < std::min(last, t0 + n);
    }
    if (!any) return false;
    const auto& kernels = element_kernels();
    product(rows_of(p, m, n, n, 1), head_rows(q, b, h, s0, m), transposed(head_rows(k, b, g, t0, n)), 0);
    product(rows_of(ds, m, n, n, 1), head_rows(d_o, b, h, s0, m), transposed(head_rows(v, b, g, t0, n)), 0);
    for (int64_t i = 0; i < m; i++) {
      mask.keys(s0 + i, length, &first, &last);
      first = std::min(std::max<int64_t>(first - t0, 0), n), last = std::min(std::max(last - t0, first), n);
      float *pi = p + i * n, *di = ds + i * n;
      const float shift = data<float>(lse)[b * lse.stride[0] + h * lse.stride[1] + (s0 + i) * lse.stride[2]];
      const float mean = delta[size_t((b * H + h) * S + s0 + i)];
      if (shift == -INFINITY) last = first;
      std::fill(pi, pi + first, 0.0f);
      std::fill(pi + last, pi + n, 0.0f);
      if (first < last) kernels.exp_sum(pi + first, scale, shift, last - first);
      for (int64_t j = 0; j < n; j++) di[j] = j >= first && j < last ? pi[j] * (di[j] - mean) : 0;
    }
    return true;
  }
};

}  // namespace

extern "C" int dc_cpu_attention_backward(dc_context* c, const dc_call* call) {
  const dc_tensor* t = call->t;
  const dc_tensor &o = t[4], &q = t[5], &k = t[6], &v = t[7];
  Backward a{t[0], t[1], t[2], t[3], q, k, v, t[8], t[9], {call->i[0] != 0, call->i[1], call->i[2]}, float(call->f[0]),
             q.dim[0], q.dim[1], q.dim[2], q.dim[3], k.dim[1], q.dim[2] / std::max<int64_t>(1, k.dim[2]), v.dim[3], {}};
  const int64_t Hk = k.dim[2], q_tiles = (a.S + kTile - 1) / kTile, k_tiles = (a.T + kTile - 1) / kTile;
  a.delta.resize(size_t(a.B * a.H * a.S));
  parallel_for(c, a.B * a.H * a.S, row_grain(a.Dv), [&](int64_t begin, int64_t end) {
    std::vector<float> x(static_cast<size_t>(a.Dv)), y(static_cast<size_t>(a.Dv));
    for (int64_t i = begin; i < end; i++) {
      const int64_t s = i % a.S, h = i / a.S % a.H, b = i / a.S / a.H;
      load_strided(x.data(), o, b * o.stride[0] + s * o.stride[1] + h * o.stride[2], o.stride[3], a.Dv);
      load_strided(y.data(), a.d_o, b * a.d_o.stride[0] + s * a.d_o.stride[1] + h * a.d_o.stride[2], a.d_o.stride[3], a.Dv);
      a.delta[size_t(i)] = element_kernels().dot(x.data(), y.data(), a.Dv);
    }
  });
  auto store = [](const dc_tensor& to, const dc_tensor& view, std::vector<float>& sum, int64_t n, float scale) {
    element_kernels().scale(sum.data(), scale, n * view.dim[1]);
    for (int64_t i = 0; i < n; i++) {
      const int64_t offset = (static_cast<char*>(view.data) - static_cast<char*>(to.data)) / int64_t(dtype_size(to.dtype));
      store_strided(to, offset + i * view.stride[0], view.stride[1], &sum[size_t(i * view.dim[1])], view.dim[1]);
    }
  };
  parallel_for(c, a.B * a.H * q_tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> p(kTile * kTile), ds(kTile * kTile), sum;
    for (int64_t w = begin; w < end; w++) {
      const int64_t s0 = (q_tiles - 1 - w % q_tiles) * kTile, h = w / q_tiles % a.H, b = w / q_tiles / a.H;
      const int64_t m = std::min(kTile, a.S - s0);
      sum.assign(size_t(m * a.D), 0.0f);
      for (int64_t t0 = 0; t0 < a.T; t0 += kTile) {
        const int64_t n = std::min(kTile, a.T - t0);
        if (!a.tile(b, h, s0, m, t0, n, p.data(), ds.data())) continue;
        product(rows_of(sum.data(), m, a.D, a.D, 1), rows_of(ds.data(), m, n, n, 1), head_rows(k, b, h / a.G, t0, n), 1);
      }
      store(a.dq, head_rows(a.dq, b, h, s0, m), sum, m, a.scale);
    }
  });
  parallel_for(c, a.B * Hk * k_tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> p(kTile * kTile), ds(kTile * kTile), dk, dv;
    for (int64_t w = begin; w < end; w++) {
      const int64_t t0 = w % k_tiles * kTile, g = w / k_tiles % Hk, b = w / k_tiles / Hk, n = std::min(kTile, a.T - t0);
      dk.assign(size_t(n * a.D), 0.0f);
      dv.assign(size_t(n * a.Dv), 0.0f);
      for (int64_t h = g * a.G; h < (g + 1) * a.G; h++)
        for (int64_t s0 = 0; s0 < a.S; s0 += kTile) {
          const int64_t m = std::min(kTile, a.S - s0);
          if (!a.tile(b, h, s0, m, t0, n, p.data(), ds.data())) continue;
          product(rows_of(dv.data(), n, a.Dv, a.Dv, 1), rows_of(p.data(), n, m, 1, n), head_rows(a.d_o, b, h, s0, m), 1);
          product(rows_of(dk.data(), n, a.D, a.D, 1), rows_of(ds.data(), n, m, 1, n), head_rows(q, b, h, s0, m), 1);
        }
      store(a.dk, head_rows(a.dk, b, g, t0, n), dk, n, a.scale);
      store(a.dv, head_rows(a.dv, b, g, t0, n), dv, n, 1);
    }
  });
  return 0;
}
