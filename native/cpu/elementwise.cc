// Element-wise functions, reductions, norm_add.
#include <algorithm>
#include <atomic>

#include "view.h"

using namespace dc;

namespace {

// Calls body(row, column begin, column end) over [rows, columns], split over the threads.
template <class F>
void over_rows(dc_context* c, int64_t rows, int64_t columns, const F& body) {
  if (rows == 1)
    parallel_for(c, columns, 16384, [&](int64_t begin, int64_t end) { body(0, begin, end); });
  else
    parallel_for(c, rows, row_grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) body(r, 0, columns);
    });
}

// Views that walk together, as few and as long rows as their strides allow; the first one decides what runs fastest.
template <int N>
struct Joint {
  dc_tensor t[N];
  explicit Joint(const dc_tensor* const (&views)[N]) {
    int order[4] = {0, 1, 2, 3};
    for (int i = 0; i < N; i++) t[i] = aligned(*views[i]);
    const dc_tensor first = t[0];
    std::stable_sort(order, order + 4, [&](int x, int y) {
      if ((first.dim[x] == 1) != (first.dim[y] == 1)) return first.dim[x] == 1;
      return std::abs(first.stride[x]) > std::abs(first.stride[y]);
    });
    dc_tensor sorted[N];
    for (int i = 0; i < N; i++) {
      sorted[i] = t[i];
      for (int d = 0; d < 4; d++) sorted[i].dim[d] = t[i].dim[order[d]], sorted[i].stride[d] = t[i].stride[order[d]];
    }
    // Merge from the right.
    int at = 3;
    for (int i = 0; i < N; i++) t[i] = sorted[i];
    for (int d = 2; d >= 0; d--) {
      if (first.dim[order[d]] == 1) continue;
      bool merge = true;
      for (int i = 0; i < N; i++) merge = merge && sorted[i].stride[d] == t[i].stride[at] * t[i].dim[at];
      if (!merge) at--;
      for (int i = 0; i < N; i++) {
        if (merge) {
          t[i].dim[at] *= sorted[i].dim[d];
        } else {
          t[i].dim[at] = sorted[i].dim[d];
          t[i].stride[at] = sorted[i].stride[d];
        }
      }
    }
    for (int d = 0; d < at; d++)
      for (int i = 0; i < N; i++) t[i].dim[d] = 1, t[i].stride[d] = 0;
  }
};

constexpr int64_t kChunk = 1024;

bool wide(const dc_tensor& t) { return !is_float(t.dtype) && dtype_size(t.dtype) >= 4; }

double apply(int kind, double a, double b) {
  switch (kind) {
    case DC_ADD: return a + b;
    case DC_SUB: return a - b;
    case DC_MUL: return a * b;
    case DC_DIV: return a / b;
    case DC_MAX: return a != a ? a : a > b ? a : b;
    case DC_MIN: return a != a ? a : a < b ? a : b;
    default: return a == b ? 1 : 0;
  }
}

}  // namespace

extern "C" int dc_cpu_unary(dc_context* c, const dc_call* call) {
  if (count(call->t[0]) == 0) return 0;
  const Joint<2> v({&call->t[0], &call->t[1]});
  const dc_tensor &dst = v.t[0], &src = v.t[1];
  const int kind = int(call->i[0]);
  const float a = float(call->f[0]), b = float(call->f[1]);
  over_rows(c, row_count(dst), dst.dim[3], [&](int64_t r, int64_t begin, int64_t end) {
    const int64_t d = row_at(dst, r), s = row_at(src, r);
    float x[kChunk];
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t n = std::min(kChunk, end - i);
      load_strided(x, src, s + i * src.stride[3], src.stride[3], n);
      element_kernels().unary(x, n, kind, a, b);
      store_strided(dst, d + i * dst.stride[3], dst.stride[3], x, n);
    }
  });
  return 0;
}

extern "C" int dc_cpu_binary(dc_context* c, const dc_call* call) {
  if (count(call->t[0]) == 0) return 0;
  const Joint<3> v({&call->t[0], &call->t[1], &call->t[2]});
  const dc_tensor &dst = v.t[0], &a = v.t[1], &b = v.t[2];
  const int kind = int(call->i[0]);
  const double alpha = call->f[0];
  const bool exact = wide(dst) || wide(a) || wide(b);  // 32-bit integers and doubles need double arithmetic
  over_rows(c, row_count(dst), dst.dim[3], [&](int64_t r, int64_t begin, int64_t end) {
    const int64_t rd = row_at(dst, r), ra = row_at(a, r), rb = row_at(b, r);
    if (exact) {
      for (int64_t i = begin; i < end; i++)
        write_number(element(dst, rd + i * dst.stride[3]), dst.dtype,
                     apply(kind, read_number(element(a, ra + i * a.stride[3]), a.dtype),
                           alpha * read_number(element(b, rb + i * b.stride[3]), b.dtype)));
      return;
    }
    float x[kChunk], y[kChunk];
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t n = std::min(kChunk, end - i);
      load_strided(x, a, ra + i * a.stride[3], a.stride[3], n);
      load_strided(y, b, rb + i * b.stride[3], b.stride[3], n);
      element_kernels().binary(x, x, y, n, kind, float(alpha));
      store_strided(dst, rd + i * dst.stride[3], dst.stride[3], x, n);
    }
  });
  return 0;
}

namespace {

// Keeps the extreme value so far and where it stood; a NaN wins over everything and stays. First come first kept.
struct Extreme {
  float value = 0;
  int64_t at = -1;
  void see(float x, int64_t i, bool max) {
    if (at < 0 || (!std::isnan(value) && (std::isnan(x) || (max ? x > value : x < value)))) {
      value = x;
      at = i;
    }
  }
};

}  // namespace

extern "C" int dc_cpu_reduce(dc_context* c, const dc_call* call) {
  const dc_tensor &dst = call->t[0], &src = call->t[1];
  const int kind = int(call->i[0]);
  if (count(dst) == 0) return 0;
  const int64_t outer = src.dim[0], n = src.dim[1], inner = src.dim[2];
  const bool extreme = kind == DC_RMAX || kind == DC_RMIN || kind == DC_ABSMAX || kind == DC_ARGMAX || kind == DC_ARGMIN;
  if (extreme && n == 0) return fail(c, "the maximum or minimum of nothing");
  auto put = [&](int64_t o, int64_t i, double value) {
    write_number(element(dst, o * dst.stride[0] + i * dst.stride[1]), dst.dtype, value);
  };
  const bool max = kind != DC_RMIN && kind != DC_ARGMIN, arg = kind == DC_ARGMAX || kind == DC_ARGMIN;
  if (inner == 1) {
    parallel_for(c, outer, row_grain(n), [&](int64_t begin, int64_t end) {
      float x[kChunk];
      const auto& kernels = element_kernels();
      for (int64_t o = begin; o < end; o++) {
        double sum = 0;
        Extreme best;
        for (int64_t i = 0; i < n; i += kChunk) {
          const int64_t m = std::min(kChunk, n - i);
          load_strided(x, src, o * src.stride[0] + i * src.stride[1], src.stride[1], m);
          if (kind == DC_ABSMAX) kernels.unary(x, m, DC_ABS, 0, 0);
          if (kind == DC_SUM || kind == DC_MEAN)
            sum += kernels.sum(x, m);
          else if (kind == DC_SUMSQ)
            sum += kernels.sum_squares(x, m);
          else
            for (int64_t j = 0; j < m; j++) best.see(x[j], i + j, max);
        }
        put(o, 0, arg ? double(best.at) : extreme ? best.value : kind == DC_MEAN ? sum / double(n) : sum);
      }
    });
    return 0;
  }
  // Along columns: all of a band of columns at once, so that memory is read in order.
  const int64_t bands = (inner + 255) / 256;
  parallel_for(c, outer * bands, std::max<int64_t>(1, 16384 / (256 * std::max<int64_t>(n, 1))), [&](int64_t begin, int64_t end) {
    float x[256];
    double sum[256];
    Extreme best[256];
    for (int64_t w = begin; w < end; w++) {
      const int64_t o = w / bands, i0 = w % bands * 256, m = std::min<int64_t>(256, inner - i0);
      std::fill(sum, sum + 256, 0.0);
      std::fill(best, best + 256, Extreme());
      for (int64_t j = 0; j < n; j++) {
        load_strided(x, src, o * src.stride[0] + j * src.stride[1] + i0 * src.stride[2], src.stride[2], m);
        if (kind == DC_ABSMAX) element_kernels().unary(x, m, DC_ABS, 0, 0);
        if (kind == DC_SUM || kind == DC_MEAN)
          for (int64_t i = 0; i < m; i++) sum[i] += x[i];
        else if (kind == DC_SUMSQ)
          for (int64_t i = 0; i < m; i++) sum[i] += double(x[i]) * x[i];
        else
          for (int64_t i = 0; i < m; i++) best[i].see(x[i], j, max);
      }
      for (int64_t i = 0; i < m; i++)
        put(o, i0 + i, arg ? double(best[i].at) : extreme ? best[i].value : kind == DC_MEAN ? sum[i] / double(n) : sum[i]);
    }
  });
  return 0;
}

extern "C" int dc_cpu_norm_add(dc_context* c, const dc_call* call) {
  const dc_tensor& out = call->t[0];
  if (count(call->t[1]) == 0) return 0;
  const Joint<1> v({&call->t[1]});
  const dc_tensor& x = v.t[0];
  // Partial sums of fixed pieces, added up in order: the same result for any number of threads.
  constexpr int64_t kPiece = 16384;
  const int64_t rows = row_count(x), pieces = (x.dim[3] + kPiece - 1) / kPiece;
  std::vector<double> sums(static_cast<size_t>(rows * pieces));
  std::atomic<int64_t> bad{0};
  parallel_for(c, rows * pieces, std::max<int64_t>(1, kPiece * 2 / x.dim[3]), [&](int64_t begin, int64_t end) {
    float row[kChunk];
    int64_t nonfinite = 0;
    for (int64_t w = begin; w < end; w++) {
      const int64_t r = w / pieces, from = w % pieces * kPiece, to = std::min(from + kPiece, x.dim[3]);
      double sum = 0;
      for (int64_t i = from; i < to; i += kChunk) {
        const int64_t n = std::min(kChunk, to - i);
        load_strided(row, x, row_at(x, r) + i * x.stride[3], x.stride[3], n);
        for (int64_t j = 0; j < n; j++)
          if (!std::isfinite(row[j])) row[j] = 0, nonfinite++;
        sum += element_kernels().sum_squares(row, n);
      }
      sums[size_t(w)] = sum;
    }
    bad += nonfinite;
  });
  double total = 0;
  for (double s : sums) total += s;
  float* o = data<float>(out);
  o[0] = float(o[0] + total);
  o[out.stride[0]] = float(o[out.stride[0]] + double(bad));
  return 0;
}
