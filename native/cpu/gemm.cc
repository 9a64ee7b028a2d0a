// Matrix multiplication: blocking and threads around the packed kernel of kernels/gemm.cc, OpenBLAS where it is found.
#include "kernels/gemm.h"

#include <stdlib.h>

#include <algorithm>
#include <new>

#include "blas.h"
#include "gemm.h"
#include "view.h"

namespace dc {

extern const GemmKernels gemm_kernels_base;
#if defined(__x86_64__)
extern const GemmKernels gemm_kernels_avx2, gemm_kernels_avx512;
#endif

const GemmKernels& gemm_kernels() {
#if defined(__x86_64__)
  static const GemmKernels& chosen = !strcmp(dc_isa(), "base")   ? gemm_kernels_base
                                     : !strcmp(dc_isa(), "avx2") ? gemm_kernels_avx2
                                                                 : gemm_kernels_avx512;
  return chosen;
#else
  return gemm_kernels_base;
#endif
}

Scratch::~Scratch() { free(data_); }
float* Scratch::take(size_t floats) {
  if (floats > size_) {
    free(data_);
    size_ = floats + floats / 4;
    data_ = static_cast<float*>(aligned_alloc(64, (size_ * 4 + 63) / 64 * 64));
    if (!data_) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  return data_;
}

namespace {

constexpr int64_t kDepth = 320;    // k positions of a block: a micro-panel of each operand stays in L1
constexpr int64_t kRows = 1024;    // rows of A packed at a time
constexpr int64_t kColumns = 4096;  // columns of B packed at a time

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// alpha, beta, bias and the rounding of a finished tile [rows, columns] of C at (i0, j0), whose sums are `sum`.
void finish(const Product& x, float* sum, int64_t ld, int64_t i0, int64_t j0, int64_t rows, int64_t columns,
            bool direct) {
  if (direct && !x.bias) return;
  const auto& kernels = element_kernels();
  RowReader reader;
  for (int64_t i = 0; i < rows; i++) {
    float* row = sum + i * ld;
    const int64_t at = (i0 + i) * x.c.stride[0] + j0 * x.c.stride[1];
    if (!direct) {
      if (x.alpha != 1) kernels.scale(row, float(x.alpha), columns);
      if (x.beta != 0) kernels.axpy(row, float(x.beta), reader.row(x.c, at, x.c.stride[1], columns), columns);
    }
    if (x.bias) kernels.axpy(row, 1, x.bias + j0, columns);
    if (!direct) store_strided(x.c, at, x.c.stride[1], row, columns);
  }
}

}  // namespace

void multiply(dc_context* c, const Product& x) {
  if (x.m == 0 || x.n == 0) return;
  const GemmKernels& kernel = gemm_kernels();
  static thread_local Scratch pack_a, pack_b, sums;
  auto each = [&](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
    if (c)
      parallel_for(c, n, 1, body);
    else if (n > 0)
      body(0, n);
  };
  const int64_t mr = kernel.mr, nr = kernel.nr, depth = std::min(kDepth, std::max<int64_t>(x.k, 1));
  // C itself takes the sums where it can.
  const bool direct = x.c.dtype == DC_F32 && x.c.stride[1] == 1 && x.alpha == 1 && (x.beta == 0 || x.beta == 1);
  const int64_t m_block = std::min(kRows, x.m), n_block = std::min(kColumns, x.n);
  float* a = pack_a.take(size_t(up(m_block, mr) * depth));
  float* b = pack_b.take(size_t(up(n_block, nr) * depth));
  float* sum = direct ? nullptr : sums.take(size_t(m_block * n_block));
  const int threads = c ? c->threads : 1;

  for (int64_t n0 = 0; n0 < x.n; n0 += n_block) {
    const int64_t n = std::min(n_block, x.n - n0);
    for (int64_t m0 = 0; m0 < x.m; m0 += m_block) {
      const int64_t m = std::min(m_block, x.m - m0);
      float* out = direct ? data<float>(x.c) + m0 * x.c.stride[0] + n0 : sum;
      const int64_t ldc = direct ? x.c.stride[0] : n;
      if (x.k == 0 && !(direct && x.beta == 1))
        for (int64_t i = 0; i < m; i++) std::fill(out + i * ldc, out + i * ldc + n, 0.0f);
      for (int64_t k0 = 0; k0 < x.k; k0 += depth) {
        const int64_t k = std::min(depth, x.k - k0);
        const int64_t a_panels = (m + mr - 1) / mr, b_panels = (n + nr - 1) / nr;
        each(a_panels + b_panels, [&](int64_t begin, int64_t end) {
          if (begin < a_panels) {
            const int64_t from = begin * mr, to = std::min(std::min(end, a_panels) * mr, m);
            kernel.pack(a + from * k, element(x.a, (m0 + from) * x.a.stride[0] + k0 * x.a.stride[1]), x.a.dtype,
                        x.a.stride[0], x.a.stride[1], to - from, k, int(mr));
          }
          if (end > a_panels) {
            const int64_t from = (std::max(begin, a_panels) - a_panels) * nr, to = std::min((end - a_panels) * nr, n);
            kernel.pack(b + from * k, element(x.b, k0 * x.b.stride[0] + (n0 + from) * x.b.stride[1]), x.b.dtype,
                        x.b.stride[1], x.b.stride[0], to - from, k, int(nr));
          }
        });
        // Tiles: rows that fit L2 once packed, by enough columns; more of them when there are many threads.
        const int64_t m_tile = up(std::min<int64_t>(144, m), mr), m_tiles = (m + m_tile - 1) / m_tile;
        const int64_t split = std::max<int64_t>(1, std::min((n + nr - 1) / nr, (threads * 4 + m_tiles - 1) / m_tiles));
        const int64_t n_tile = up((n + split - 1) / split, nr), n_tiles = (n + n_tile - 1) / n_tile;
        const bool last = k0 + k == x.k, accumulate = k0 > 0 || (direct && x.beta == 1);
        each(m_tiles * n_tiles, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; t++) {
            const int64_t i0 = t / n_tiles * m_tile, j0 = t % n_tiles * n_tile;
            const int64_t rows = std::min(m_tile, m - i0), columns = std::min(n_tile, n - j0);
            kernel.block(out + i0 * ldc + j0, ldc, a + i0 * k, b + j0 * k, rows, columns, k, accumulate);
            if (last) finish(x, out + i0 * ldc + j0, ldc, m0 + i0, n0 + j0, rows, columns, direct);
          }
        });
      }
      if (x.k == 0) finish(x, out, ldc, m0, n0, m, n, direct);
    }
  }
}

void sgemm_into(dc_context* c, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                bool transpose_a, const float* b, int64_t ldb, bool transpose_b, float beta, float* out, int64_t ldc) {
  auto view = [](const float* p, int64_t rows, int64_t columns, int64_t ld, bool transpose) {
    dc_tensor t{};
    t.data = const_cast<float*>(p);
    t.dtype = DC_F32;
    t.rank = 2;
    t.dim[0] = rows, t.dim[1] = columns, t.dim[2] = t.dim[3] = 1;
    t.stride[0] = transpose ? 1 : ld, t.stride[1] = transpose ? ld : 1;
    return t;
  };
  Product x;
  x.c = view(out, m, n, ldc, false), x.a = view(a, m, k, lda, transpose_a), x.b = view(b, k, n, ldb, transpose_b);
  x.m = m, x.n = n, x.k = k;
  x.alpha = alpha, x.beta = beta;
  multiply(c, x);
}

}  // namespace dc

using namespace dc;

namespace {

// Views of matrix `i` of a batch.
dc_tensor matrix(const dc_tensor& t, int64_t i) {
  if (t.rank == 2) return t;
  dc_tensor m = t;
  m.data = element(t, i * t.stride[0]);
  m.rank = 2;
  for (int d = 0; d < 2; d++) m.dim[d] = t.dim[d + 1], m.stride[d] = t.stride[d + 1];
  return m;
}

}  // namespace

extern "C" int dc_cpu_gemm(dc_context* c, const dc_call* call) {
  const dc_tensor &C = call->t[0], &A = call->t[1], &B = call->t[2], &bias = call->t[3];
  if (count(C) == 0) return 0;
  const int64_t batch = C.rank == 3 ? C.dim[0] : 1;
  Product x;
  x.alpha = call->f[0];
  x.beta = call->f[1];
  std::vector<float> bias_row;
  if (present(bias)) {
    bias_row.resize(size_t(bias.dim[0]));
    load_strided(bias_row.data(), bias, 0, bias.stride[0], bias.dim[0]);
    x.bias = bias_row.data();
  }
  auto one = [&](int64_t i, dc_context* threads) {
    Product p = x;
    p.c = matrix(C, i), p.a = matrix(A, i), p.b = matrix(B, i);
    p.m = p.c.dim[0], p.n = p.c.dim[1], p.k = p.a.dim[1];
    multiply(threads, p);
  };
  const int64_t work = C.dim[C.rank - 2] * C.dim[C.rank - 1] * A.dim[A.rank - 1];
  if (batch >= c->threads && work < 128 * 128 * 128) {  // many small products: one thread each
    parallel_for(c, batch, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) one(i, nullptr);
    });
  } else {
    for (int64_t i = 0; i < batch; i++) one(i, c);
  }
  return 0;
}

extern "C" int dc_cpu_grouped_gemm(dc_context* c, const dc_call* call) {
  const dc_tensor &C = call->t[0], &A = call->t[1], &B = call->t[2], &offsets = call->t[3];
  const int64_t experts = B.dim[0];
  const int32_t* offset = data<int32_t>(offsets);
  for (int64_t e = 0; e < experts; e++) {
    const int64_t begin = offset[e * offsets.stride[0]], end = offset[(e + 1) * offsets.stride[0]];
    if (begin < 0 || end < begin || end > A.dim[0])
      return fail(c, "offsets[%ld..%ld] = %ld..%ld of %ld rows", long(e), long(e + 1), long(begin), long(end), long(A.dim[0]));
    Product p;
    p.c = C, p.a = A;
    p.c.data = element(C, begin * C.stride[0]), p.a.data = element(A, begin * A.stride[0]);
    p.b = matrix(B, e);
    std::swap(p.b.dim[0], p.b.dim[1]);
    std::swap(p.b.stride[0], p.b.stride[1]);
    p.m = end - begin, p.n = C.dim[1], p.k = A.dim[1];
    multiply(c, p);
  }
  return 0;
}
