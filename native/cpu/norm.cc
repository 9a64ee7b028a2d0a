// Layers that work row by row: rmsnorm, layernorm, swiglu, softmax, rope, and their backward rules.
#include <algorithm>

#include "view.h"

using namespace dc;

namespace {

using Row = std::vector<float>;

template <class F>
void rows(dc_context* c, int64_t n, int64_t width, const F& body) {
  parallel_for(c, n, row_grain(width), [&](int64_t begin, int64_t end) { body(begin, end); });
}
void load_row(Row& row, const dc_tensor& t, int64_t r) {
  row.resize(size_t(t.dim[1]));
  load_strided(row.data(), t, r * t.stride[0], t.stride[1], t.dim[1]);
}
void store_row(const dc_tensor& t, int64_t r, const Row& row) {
  store_strided(t, r * t.stride[0], t.stride[1], row.data(), t.dim[1]);
}
void load_vector(Row& row, const dc_tensor& t) {
  row.resize(size_t(t.dim[0]));
  load_strided(row.data(), t, 0, t.stride[0], t.dim[0]);
}

}  // namespace

extern "C" int dc_cpu_rmsnorm(dc_context* c, const dc_call* call) {
  const dc_tensor &y = call->t[0], &x = call->t[1], &w = call->t[2], &rstd = call->t[3];
  const double eps = call->f[0];
  const int64_t width = x.dim[1];
  Row weight;
  if (present(w)) {
    load_vector(weight, w);
    for (float& v : weight) v += float(call->f[1]);
  }
  rows(c, x.dim[0], width, [&](int64_t begin, int64_t end) {
    Row row;
    const auto& kernels = element_kernels();
    for (int64_t r = begin; r < end; r++) {
      load_row(row, x, r);
      const float scale = float(1 / std::sqrt(kernels.sum_squares(row.data(), width) / double(width) + eps));
      kernels.scale(row.data(), scale, width);
      if (present(w)) kernels.multiply(row.data(), weight.data(), width);
      store_row(y, r, row);
      if (present(rstd)) data<float>(rstd)[r * rstd.stride[0]] = scale;
    }
  });
  return 0;
}

// With h = x rstd and g = dy (w + offset): dx = rstd (g - h mean(g h)), dw += sum over rows of dy h.
extern "C" int dc_cpu_rmsnorm_backward(dc_context* c, const dc_call* call) {
  const dc_tensor &dx = call->t[0], &dw = call->t[1], &dy = call->t[2], &x = call->t[3], &w = call->t[4],
                  &rstd = call->t[5];
  const int64_t n = x.dim[0], width = x.dim[1];
  Row weight;
  if (present(w)) {
    load_vector(weight, w);
    for (float& v : weight) v += float(call->f[0]);
  }
  auto scale_of = [&](int64_t r) { return data<float>(rstd)[r * rstd.stride[0]]; };
  // dw first: dx may stand where dy does.
  if (present(dw))
    parallel_for(c, width, std::max<int64_t>(64, 65536 / std::max<int64_t>(1, n)), [&](int64_t begin, int64_t end) {
      std::vector<double> sum(static_cast<size_t>(end - begin));
      Row g(sum.size()), h(sum.size());
      for (int64_t r = 0; r < n; r++) {
        load_strided(g.data(), dy, r * dy.stride[0] + begin * dy.stride[1], dy.stride[1], end - begin);
        load_strided(h.data(), x, r * x.stride[0] + begin * x.stride[1], x.stride[1], end - begin);
        const float scale = scale_of(r);
        for (size_t i = 0; i < sum.size(); i++) sum[i] += double(g[i]) * (h[i] * scale);
      }
      load_strided(h.data(), dw, begin * dw.stride[0], dw.stride[0], end - begin);
      for (size_t i = 0; i < sum.size(); i++) h[i] = float(h[i] + sum[i]);
      store_strided(dw, begin * dw.stride[0], dw.stride[0], h.data(), end - begin);
    });
  rows(c, n, width * 2, [&](int64_t begin, int64_t end) {
    Row g, h;
    const auto& kernels = element_kernels();
    for (int64_t r = begin; r < end; r++) {
      const float scale = scale_of(r);
      load_row(g, dy, r);
      if (present(w)) kernels.multiply(g.data(), weight.data(), width);
      load_row(h, x, r);
      kernels.scale(h.data(), scale, width);
      const float mean = kernels.dot(g.data(), h.data(), width) / float(width);
      kernels.axpy(g.data(), -mean, h.data(), width);
      kernels.scale(g.data(), scale, width);
      store_row(dx, r, g);
    }
  });
  return 0;
}

extern "C" int dc_cpu_layernorm(dc_context* c, const dc_call* call) {
  const dc_tensor &y = call->t[0], &x = call->t[1], &w = call->t[2], &b = call->t[3];
  const int64_t width = x.dim[1];
  Row weight, bias;
  if (present(w)) load_vector(weight, w);
  if (present(b)) load_vector(bias, b);
  rows(c, x.dim[0], width, [&](int64_t begin, int64_t end) {
    Row row;
    const auto& kernels = element_kernels();
    for (int64_t r = begin; r < end; r++) {
      load_row(row, x, r);
      const float mean = float(kernels.sum(row.data(), width) / double(width));
      for (float& v : row) v -= mean;
      const float scale = float(1 / std::sqrt(kernels.sum_squares(row.data(), width) / double(width) + call->f[0]));
      kernels.scale(row.data(), scale, width);
      if (present(w)) kernels.multiply(row.data(), weight.data(), width);
      if (present(b)) kernels.axpy(row.data(), 1, bias.data(), width);
      store_row(y, r, row);
    }
  });
  return 0;
}

namespace {

// swiglu and its backward rule: pieces of the same place of every view, any rank and strides.
template <int N, class F>
void pieces(dc_context* c, const dc_call* call, const F& body) {
  dc_tensor t[N];
  for (int i = 0; i < N; i++) t[i] = aligned(call->t[i]);
  const int64_t width = t[0].dim[3];
  if (count(t[0]) == 0) return;
  auto part = [&](int64_t r, int64_t begin, int64_t end) {
    float x[N][1024];
    for (int64_t i = begin; i < end; i += 1024) {
      const int64_t n = std::min<int64_t>(1024, end - i);
      auto load = [&](int k) { load_strided(x[k], t[k], row_at(t[k], r) + i * t[k].stride[3], t[k].stride[3], n); };
      auto store = [&](int k) { store_strided(t[k], row_at(t[k], r) + i * t[k].stride[3], t[k].stride[3], x[k], n); };
      body(x, n, load, store);
    }
  };
  if (row_count(t[0]) == 1)
    parallel_for(c, width, 16384, [&](int64_t begin, int64_t end) { part(0, begin, end); });
  else
    rows(c, row_count(t[0]), width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) part(r, 0, width);
    });
}

}  // namespace

extern "C" int dc_cpu_swiglu(dc_context* c, const dc_call* call) {
  const int activation = int(call->i[0]);
  const float limit = float(call->f[0]);
  const auto& kernels = element_kernels();
  const dc_tensor* t = call->t;
  auto plain = [](const dc_tensor& v) { return v.dtype == DC_BF16 && v.rank == 2 && v.stride[1] == 1; };
  if (activation == DC_SILU && !(limit > 0) && plain(t[0]) && plain(t[1]) && plain(t[2])) {
    const int64_t width = t[0].dim[1], part = 4096, parts = (width + part - 1) / part;
    parallel_for(c, t[0].dim[0] * parts, row_grain(std::min(part, width)), [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; w++) {
        const int64_t r = w / parts, i = w % parts * part;
        kernels.silu_bf16(data<uint16_t>(t[0]) + r * t[0].stride[0] + i, data<uint16_t>(t[1]) + r * t[1].stride[0] + i,
                          data<uint16_t>(t[2]) + r * t[2].stride[0] + i, std::min(part, width - i));
      }
    });
    return 0;
  }
  pieces<3>(c, call, [&](float (*x)[1024], int64_t n, auto load, auto store) {
    float *y = x[0], *gate = x[1], *up = x[2];
    load(1), load(2);
    if (limit > 0) {
      kernels.unary(gate, n, DC_CLAMP, -INFINITY, limit);
      kernels.unary(up, n, DC_CLAMP, -limit, limit);
    }
    kernels.unary(gate, n, activation, 0, 0);
    kernels.binary(y, gate, up, n, DC_MUL, 1);
    store(0);
  });
  return 0;
}

// dgate = dy up act'(gate), dup = dy act(gate); nothing flows through a clamped value.
extern "C" int dc_cpu_swiglu_backward(dc_context* c, const dc_call* call) {
  const int activation = int(call->i[0]);
  const float limit = float(call->f[0]);
  const auto& kernels = element_kernels();
  float probe = 1;
  if (!kernels.slope(&probe, 1, activation)) return fail(c, "no derivative of activation %d", activation);
  pieces<5>(c, call, [&](float (*x)[1024], int64_t n, auto load, auto store) {
    float *dgate = x[0], *dup = x[1], *dy = x[2], *gate = x[3], *up = x[4];
    load(2), load(3), load(4);
    std::copy(dy, dy + n, dgate);
    std::copy(dy, dy + n, dup);
    if (limit > 0)
      for (int64_t i = 0; i < n; i++) {
        if (gate[i] > limit) gate[i] = limit, dgate[i] = 0;
        if (std::fabs(up[i]) > limit) up[i] = std::copysign(limit, up[i]), dup[i] = 0;
      }
    kernels.multiply(dgate, up, n);
    std::copy(gate, gate + n, up);
    kernels.slope(gate, n, activation);
    kernels.multiply(dgate, gate, n);
    kernels.unary(up, n, activation, 0, 0);
    kernels.multiply(dup, up, n);
    store(0), store(1);
  });
  return 0;
}

extern "C" int dc_cpu_softmax(dc_context* c, const dc_call* call) {
  const dc_tensor &y = call->t[0], &x = call->t[1];
  const int64_t width = x.dim[1];
  const float scale = float(call->f[0]);
  if (count(x) == 0) return 0;
  rows(c, x.dim[0], width, [&](int64_t begin, int64_t end) {
    Row row;
    const auto& kernels = element_kernels();
    for (int64_t r = begin; r < end; r++) {
      load_row(row, x, r);
      if (scale != 1) kernels.scale(row.data(), scale, width);
      const double sum = kernels.exp_sum(row.data(), 1, kernels.max(row.data(), width), width);
      kernels.scale(row.data(), float(1 / sum), width);
      store_row(y, r, row);
    }
  });
  return 0;
}

// dx = scale y (dy - sum(dy y))
extern "C" int dc_cpu_softmax_backward(dc_context* c, const dc_call* call) {
  const dc_tensor &dx = call->t[0], &dy = call->t[1], &y = call->t[2];
  const int64_t width = y.dim[1];
  const float scale = float(call->f[0]);
  rows(c, y.dim[0], width, [&](int64_t begin, int64_t end) {
    Row g, p;
    const auto& kernels = element_kernels();
    for (int64_t r = begin; r < end; r++) {
      load_row(g, dy, r);
      load_row(p, y, r);
      const float mean = kernels.dot(g.data(), p.data(), width);
      for (float& v : g) v -= mean;
      kernels.multiply(g.data(), p.data(), width);
      if (scale != 1) kernels.scale(g.data(), scale, width);
      store_row(dx, r, g);
    }
  });
  return 0;
}

extern "C" int dc_cpu_rope(dc_context* c, const dc_call* call) {
  const dc_tensor &y = call->t[0], &x = call->t[1], &cosines = call->t[2], &sines = call->t[3], &positions = call->t[4];
  const bool interleaved = call->i[0], from_end = call->i[1], inverse = call->i[2];
  const int64_t batch = x.dim[0], length = x.dim[1], heads = x.dim[2], width = x.dim[3];
  const int64_t half = cosines.dim[1], first = from_end ? width - 2 * half : 0;
  if (count(x) == 0) return 0;
  auto position = [&](int64_t b, int64_t s) {
    return int64_t(data<int32_t>(positions)[b * positions.stride[0] + s * positions.stride[1]]);
  };
  for (int64_t b = 0; b < batch; b++)
    for (int64_t s = 0; s < length; s++)
      if (position(b, s) < 0 || position(b, s) >= cosines.dim[0])
        return fail(c, "position %ld of sequence %ld is %ld, the table has %ld", long(s), long(b), long(position(b, s)),
                    long(cosines.dim[0]));
  rows(c, batch * length, heads * width, [&](int64_t begin, int64_t end) {
    Row row(static_cast<size_t>(width)), cosine, sine;
    cosine.resize(size_t(half)), sine.resize(size_t(half));
    for (int64_t r = begin; r < end; r++) {
      const int64_t b = r / length, s = r % length, p = position(b, s);
      load_strided(cosine.data(), cosines, p * cosines.stride[0], cosines.stride[1], half);
      load_strided(sine.data(), sines, p * sines.stride[0], sines.stride[1], half);
      if (inverse)
        for (float& v : sine) v = -v;
      for (int64_t h = 0; h < heads; h++) {
        load_strided(row.data(), x, b * x.stride[0] + s * x.stride[1] + h * x.stride[2], x.stride[3], width);
        float* v = row.data() + first;
        if (interleaved) {
          for (int64_t i = 0; i < half; i++) {
            const float u = v[2 * i], w = v[2 * i + 1];
            v[2 * i] = u * cosine[size_t(i)] - w * sine[size_t(i)];
            v[2 * i + 1] = w * cosine[size_t(i)] + u * sine[size_t(i)];
          }
        } else {
          for (int64_t i = 0; i < half; i++) {
            const float u = v[i], w = v[i + half];
            v[i] = u * cosine[size_t(i)] - w * sine[size_t(i)];
            v[i + half] = w * cosine[size_t(i)] + u * sine[size_t(i)];
          }
        }
        store_strided(y, b * y.stride[0] + s * y.stride[1] + h * y.stride[2], y.stride[3], row.data(), width);
      }
    }
  });
  return 0;
}
