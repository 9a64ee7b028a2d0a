// Matrix multiplication: blocking and threads around the packed kernel of kernels/gemm.cc, OpenBLAS where it is found.
#include "kernels/gemm.h"

#include <stdlib.h>
#include <sys/mman.h>

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

// fp32 panels of any float dtype. 320 positions: a micro-panel of each operand stays in L1.
const Panels& float_panels() {
  static const Panels panels = {
      gemm_kernels().mr,
      gemm_kernels().nr,
      1,
      4,
      0x80000000,
      320,
      140,
      [](void* dst, const void* src, int dtype, int64_t line_stride, int64_t position_stride, int64_t lines, int64_t k) {
        gemm_kernels().pack(static_cast<float*>(dst), src, dtype, line_stride, position_stride, lines, k, gemm_kernels().mr);
      },
      [](void* dst, const void* src, int dtype, int64_t line_stride, int64_t position_stride, int64_t lines, int64_t k) {
        gemm_kernels().pack(static_cast<float*>(dst), src, dtype, line_stride, position_stride, lines, k, gemm_kernels().nr);
      },
      [](float* c, int64_t ldc, const void* a, const void* b, int64_t m, int64_t n, int64_t k, bool accumulate) {
        gemm_kernels().block(c, ldc, static_cast<const float*>(a), static_cast<const float*>(b), m, n, k, accumulate);
      },
  };
  return panels;
}

Scratch::~Scratch() { free(data_); }
float* Scratch::take(size_t floats) {
  if (floats <= size_) return data_;
  free(data_);
  const size_t page = floats >= (1 << 19) ? 1 << 21 : 64;  // large pages: packed panels are read in long strides
  size_ = 0;
  const size_t bytes = (floats * 4 + floats + page - 1) / page * page;
  data_ = static_cast<float*>(aligned_alloc(page, bytes));
  if (!data_) throw std::bad_alloc();
  if (page > 64) madvise(data_, bytes, MADV_HUGEPAGE);
  size_ = bytes / 4;
  return data_;
}

void finish(const Product& x, float* sum, int64_t ld, int64_t i0, int64_t j0, int64_t rows, int64_t columns, bool direct) {
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

namespace {

constexpr int64_t kRows = 1024;    // rows of A packed at a time
constexpr int64_t kColumns = 4096;  // columns of B packed at a time

Scratch& panel_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Few rows of A times lines of B that lie along k (weights as checkpoints store them): B is read once, unpacked.
void multiply_few(dc_context* c, const Product& x) {
  static thread_local Scratch scratch;
  float* a = scratch.take(size_t(x.m * (x.k + x.n)));
  float* sum = a + x.m * x.k;
  for (int64_t i = 0; i < x.m; i++) load_strided(a + i * x.k, x.a, i * x.a.stride[0], x.a.stride[1], x.k);
  auto part = [&](int64_t begin, int64_t end) {
    gemm_kernels().dots(sum + begin, x.n, a, x.m, element(x.b, begin * x.b.stride[1]), x.b.dtype, x.b.stride[1],
                        end - begin, x.k);
    finish(x, sum + begin, x.n, 0, begin, x.m, end - begin, false);
  };
  if (c)
    parallel_for(c, x.n, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, x.k)), part);
  else
    part(0, x.n);
}

// The panels of the unit that both operands can use.
const Panels& panels_of(const Product& x) {
  if (x.a.dtype == DC_BF16 && x.b.dtype == DC_BF16 && bf16_panels()) return *bf16_panels();
  const bool large = x.k >= 512 && x.n >= 512;  // whatever the rows: the same sums for any number of them
  if (x.split && large && x.a.dtype == DC_F32 && x.b.dtype == DC_F32 && split_panels()) return *split_panels();
  return float_panels();
}

// The product by OpenBLAS: large, fp32, every operand with one stride of 1. False: not of that kind.
bool multiply_blas(dc_context* c, const Product& x) {
  if (!c || !c->blas || x.m * x.n * x.k < 128 * 128 * 128) return false;
  constexpr int64_t most = INT32_MAX;
  auto transpose = [](const dc_tensor& t) { return t.stride[1] == 1 ? 111 : 112; };
  auto leading = [](const dc_tensor& t) { return t.stride[1] == 1 ? t.stride[0] : t.stride[1]; };
  for (const dc_tensor* t : {&x.a, &x.b, &x.c}) {
    if (t->dtype != DC_F32 || (t->stride[0] != 1 && t->stride[1] != 1)) return false;
    const int64_t line = t->stride[1] == 1 ? t->dim[1] : t->dim[0];
    if (leading(*t) < line || leading(*t) > most) return false;
  }
  if (x.c.stride[1] != 1 || x.m > most || x.n > most || x.k > most) return false;
  c->blas->sgemm(101, transpose(x.a), transpose(x.b), int(x.m), int(x.n), int(x.k), float(x.alpha), data<float>(x.a),
                 int(leading(x.a)), data<float>(x.b), int(leading(x.b)), float(x.beta), data<float>(x.c),
                 int(x.c.stride[0]));
  if (x.bias)
    parallel_for(c, x.m, row_grain(x.n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        element_kernels().axpy(data<float>(x.c) + i * x.c.stride[0], 1, x.bias, x.n);
    });
  return true;
}

}  // namespace

void multiply(dc_context* c, const Product& x) {
  if (x.m == 0 || x.n == 0) return;
  if (x.m <= 8 && x.b.stride[0] == 1 && x.k > 0) return multiply_few(c, x);
  const Panels& kernel = panels_of(x);
  if (&kernel != &float_panels() && x.k > 0) return multiply_tiles(c, x, kernel);
  if (multiply_blas(c, x)) return;
  auto each = [&](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
    if (c)
      parallel_for(c, n, 1, body);
    else if (n > 0)
      body(0, n);
  };
  const int64_t mr = kernel.mr, nr = kernel.nr, bytes = kernel.bytes;
  const int64_t depth = std::min(kernel.depth, up(std::max<int64_t>(x.k, 1), kernel.step));
  // C itself takes the sums where it can.
  const bool direct = x.c.dtype == DC_F32 && x.c.stride[1] == 1 && x.alpha == 1 && (x.beta == 0 || x.beta == 1);
  const int64_t m_block = std::min(kRows, x.m), n_block = std::min(kColumns, x.n);
  static thread_local Scratch a_memory, b_memory, sums;
  auto* a = reinterpret_cast<char*>(a_memory.take(size_t(up(m_block, mr) * depth * bytes / 4)));
  char* b = nullptr;
  if (x.m > kernel.rows) b = reinterpret_cast<char*>(b_memory.take(size_t(up(n_block, nr) * depth * bytes / 4)));
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
        const int64_t k = std::min(depth, x.k - k0), line = up(k, kernel.step) * bytes;  // of a packed line
        const bool last = k0 + k == x.k, accumulate = k0 > 0 || (direct && x.beta == 1);
        auto pack_a = [&](int64_t from, int64_t to) {
          kernel.pack_a(a + from * line, element(x.a, (m0 + from) * x.a.stride[0] + k0 * x.a.stride[1]), x.a.dtype,
                        x.a.stride[0], x.a.stride[1], to - from, k);
        };
        auto pack_b = [&](char* to, int64_t from, int64_t columns) {
          kernel.pack_b(to, element(x.b, k0 * x.b.stride[0] + (n0 + from) * x.b.stride[1]), x.b.dtype, x.b.stride[1],
                        x.b.stride[0], columns, k);
        };
        auto compute = [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, const char* panels) {
          float* at = out + i0 * ldc + j0;
          kernel.block(at, ldc, a + i0 * line, panels, rows, columns, line / bytes, accumulate);
          if (last) finish(x, at, ldc, m0 + i0, n0 + j0, rows, columns, direct);
        };
        const int64_t a_panels = (m + mr - 1) / mr, b_panels = (n + nr - 1) / nr;
        if (m <= kernel.rows) {  // one tile of rows: every panel of B is used where it was packed, in L1
          pack_a(0, m);
          each(b_panels, [&](int64_t begin, int64_t end) {
            auto* panel = reinterpret_cast<char*>(panel_scratch().take(size_t(nr * line / 4)));
            for (int64_t j = begin * nr; j < std::min(end * nr, n); j += nr) {
              const int64_t columns = std::min(nr, n - j);
              pack_b(panel, j, columns);
              compute(0, m, j, columns, panel);
            }
          });
          continue;
        }
        each(a_panels + b_panels, [&](int64_t begin, int64_t end) {
          if (begin < a_panels) pack_a(begin * mr, std::min(std::min(end, a_panels) * mr, m));
          if (end > a_panels) {
            const int64_t from = (std::max(begin, a_panels) - a_panels) * nr;
            pack_b(b + from * line, from, std::min((end - a_panels) * nr, n) - from);
          }
        });
        // Tiles: rows that fit L2 once packed, by enough columns; as many of them as divide evenly among the threads, all
        // of nearly the same size.
        int64_t m_tiles = (m + kernel.rows - 1) / kernel.rows;
        if (m_tiles > threads) m_tiles = std::min(up(m_tiles, threads), a_panels);
        const int64_t n_tiles = std::max<int64_t>(1, std::min(b_panels, (threads * 4 + m_tiles - 1) / m_tiles));
        each(m_tiles * n_tiles, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; t++) {
            const int64_t i = t / n_tiles, j = t % n_tiles;
            const int64_t i0 = a_panels * i / m_tiles * mr, i1 = std::min(a_panels * (i + 1) / m_tiles * mr, m);
            const int64_t j0 = b_panels * j / n_tiles * nr, j1 = std::min(b_panels * (j + 1) / n_tiles * nr, n);
            compute(i0, i1 - i0, j0, j1 - j0, b + j0 * line);
          }
        });
      }
      if (x.k == 0) finish(x, out, ldc, m0, n0, m, n, direct);
    }
  }
}

void sgemm_into(dc_context* c, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                bool transpose_a, const float* b, int64_t ldb, bool transpose_b, float beta, float* out, int64_t ldc,
                bool exact) {
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
  x.alpha = alpha, x.beta = beta, x.split = !exact;
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
  x.split = call->i[0] != 0;
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
