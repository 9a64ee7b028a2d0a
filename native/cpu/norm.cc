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

// Any rank and strides: rows are the last dimension.
extern "C" int dc_cpu_swiglu(dc_context* c, const dc_call* call) {
  const dc_tensor y = aligned(call->t[0]), gate = aligned(call->t[1]), up = aligned(call->t[2]);
  const int activation = int(call->i[0]);
  const float limit = float(call->f[0]);
  const int64_t width = y.dim[3];
  if (count(y) == 0) return 0;
  auto part = [&](int64_t r, int64_t begin, int64_t end) {
    float g[1024], u[1024];
    const auto& kernels = element_kernels();
    for (int64_t i = begin; i < end; i += 1024) {
      const int64_t n = std::min<int64_t>(1024, end - i);
      load_strided(g, gate, row_at(gate, r) + i * gate.stride[3], gate.stride[3], n);
      load_strided(u, up, row_at(up, r) + i * up.stride[3], up.stride[3], n);
      if (limit > 0) {
        kernels.unary(g, n, DC_CLAMP, -INFINITY, limit);
        kernels.unary(u, n, DC_CLAMP, -limit, limit);
      }
      kernels.unary(g, n, activation, 0, 0);
      kernels.multiply(g, u, n);
      store_strided(y, row_at(y, r) + i * y.stride[3], y.stride[3], g, n);
    }
  };
  if (row_count(y) == 1)
    parallel_for(c, width, 16384, [&](int64_t begin, int64_t end) { part(0, begin, end); });
  else
    rows(c, row_count(y), width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) part(r, 0, width);
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
