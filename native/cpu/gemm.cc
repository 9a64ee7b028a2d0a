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

// fp32 panels of any float dtype.
const Panels& float_panels() {
  static const Panels panels = {
      gemm_kernels().mr,
      gemm_kernels().nr,
      1,
      4,
      0x80000000,
      gemm_kernels().depth,
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

constexpr int64_t kPacked = 1 << 23;  // elements of A packed at a time
constexpr int64_t kTall = 96;        // rows whose sums are still in L2 when they are rounded

int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t up(int64_t n, int64_t step) { return parts_of(n, step) * step; }

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
  const int64_t mr = kernel.mr, nr = kernel.nr;
  // Pieces of k of one size, whatever else is cut: every element is summed in the same order.
  const int64_t depth = parts_of(x.k, std::max<int64_t>(1, parts_of(x.k, kernel.depth)));
  const int64_t m_block = std::min(x.m, std::max(kernel.rows, kPacked / std::max<int64_t>(1, x.k)) / mr * mr);
  // C itself takes the sums where it can.
  const bool direct = x.c.dtype == DC_F32 && x.c.stride[1] == 1 && x.alpha == 1 && (x.beta == 0 || x.beta == 1);
  const bool add = direct && x.beta == 1;
  static thread_local Scratch a_memory;
  float* a = a_memory.take(size_t(up(m_block, mr) * x.k));

  for (int64_t m0 = 0; m0 < x.m; m0 += m_block) {
    const int64_t m = std::min(m_block, x.m - m0), a_panels = parts_of(m, mr), b_panels = parts_of(x.n, nr);
    parallel_for(c, a_panels, parts_of(16384, mr * std::max<int64_t>(1, x.k)), [&](int64_t begin, int64_t end) {
      const int64_t from = begin * mr, rows = std::min(end * mr, m) - from;
      for (int64_t k0 = 0; k0 < x.k; k0 += depth) {
        const int64_t k = std::min(depth, x.k - k0);
        kernel.pack_a(a + a_panels * mr * k0 + from * k, element(x.a, (m0 + from) * x.a.stride[0] + k0 * x.a.stride[1]),
                      x.a.dtype, x.a.stride[0], x.a.stride[1], rows, k);
      }
    });
    // A task packs its columns, for each piece of k, and takes its rows past them. With few rows a single panel, in L1.
    const int64_t tasks = c && c->threads > 1 ? 4 * c->threads : 1;
    int64_t columns = parts_of(b_panels, m <= kernel.rows ? 1 : gemm_kernels().wide / nr), rows = 1;
    if (columns < tasks) columns = std::min(tasks, parts_of(b_panels, 2));
    if (columns < tasks) rows = std::min(parts_of(tasks, columns), parts_of(m, 128));
    auto task = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
      static thread_local Scratch b_memory, sums;
      const int64_t n = j1 - j0, ld = direct ? x.c.stride[0] : n;
      float* b = b_memory.take(size_t(up(n, nr) * depth));
      float* sum = direct ? data<float>(x.c) + (m0 + i0) * ld + j0 : sums.take(size_t((i1 - i0) * n));
      for (int64_t k0 = 0; k0 < x.k; k0 += depth) {
        const int64_t k = std::min(depth, x.k - k0);
        kernel.pack_b(b, element(x.b, k0 * x.b.stride[0] + j0 * x.b.stride[1]), x.b.dtype, x.b.stride[1], x.b.stride[0], n, k);
        for (int64_t i = i0; i < i1; i += up(kTall, mr)) {
          const int64_t some = std::min(up(kTall, mr), i1 - i);
          if (!direct && k0 + k == x.k && x.c.stride[1] == 1)  // on their way while the sums are made
            for (int64_t r = 0; r < some; r++)
              for (int64_t j = 0; j < n; j += 64 / int64_t(dtype_size(x.c.dtype)))
                __builtin_prefetch(element(x.c, (m0 + i + r) * x.c.stride[0] + j0 + j), 1, 2);
          kernel.block(sum + (i - i0) * ld, ld, a + a_panels * mr * k0 + i * k, b, some, n, k, k0 > 0 || add);
          if (k0 + k == x.k) finish(x, sum + (i - i0) * ld, ld, m0 + i, j0, some, n, direct);
        }
      }
      if (x.k > 0) return;
      for (int64_t i = 0; i < i1 - i0 && !add; i++) std::fill(sum + i * ld, sum + i * ld + n, 0.0f);
      finish(x, sum, ld, m0 + i0, j0, i1 - i0, n, direct);
    };
    parallel_for(c, rows * columns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const int64_t i = t % rows, j = t / rows;
        task(a_panels * i / rows * mr, std::min(a_panels * (i + 1) / rows * mr, m), b_panels * j / columns * nr,
             std::min(b_panels * (j + 1) / columns * nr, x.n));
      }
    });
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
