// int4_matmul. Few rows of x: every packed weight is read once, on the fly. Many: pieces of W are unpacked for the
// matrix product.
#include <algorithm>
#include <vector>

#include "blas.h"
#include "gemm.h"
#include "kernels/int4.h"
#include "matrices.h"

namespace dc {

extern const Int4Kernels int4_kernels_base;
#if defined(__x86_64__)
extern const Int4Kernels int4_kernels_avx2, int4_kernels_avx512;
#endif

const Int4Kernels& int4_kernels() {
#if defined(__x86_64__)
  static const Int4Kernels& chosen = !strcmp(dc_isa(), "base")   ? int4_kernels_base
                                     : !strcmp(dc_isa(), "avx2") ? int4_kernels_avx2
                                                                 : int4_kernels_avx512;
  return chosen;
#else
  return int4_kernels_base;
#endif
}

}  // namespace dc

using namespace dc;

extern "C" int dc_cpu_int4_matmul(dc_context* c, const dc_call* call) {
  const dc_tensor &y = call->t[0], &x = call->t[1], &words = call->t[2], &scale = call->t[3], &zero = call->t[4],
                  &bias = call->t[5];
  for (int i : {0, 1, 2, 3, 4, 5})
    if (!dense_rows(call->t[i])) return fail(c, "tensors must have dense rows");
  const int64_t m = x.dim[0], k = x.dim[1], n = y.dim[1], group = call->i[0], groups = scale.dim[1];
  if (group <= 0 || groups * group < k || words.dim[1] * 8 < k) return fail(c, "words or scale do not fit x and group");
  const Int4Kernels& kernel = int4_kernels();
  const Matrices<uint32_t> packed(words), zeros(zero);
  // Scales and zeros of row r as fp32.
  auto grid_row = [&](int64_t r, float* s, float* z) {
    load_row(s, row_of(scale, 0, r), scale.dtype, groups);
    for (int64_t g = 0; g < groups; g++)
      z[g] = present(zero) ? float(zeros.row(0, r / 8)[g] >> (r % 8 * 4) & 15) : 8.0f;
  };
  std::vector<float> offset(size_t(n), 0.0f);
  if (present(bias)) load_row(offset.data(), bias.data, bias.dtype, n);

  if (m <= 16 && group % 8 == 0) {
    const int64_t block = kernel.block, word_count = (k + 7) / 8, group_words = group / 8;
    const bool mixed = group_words % block != 0;  // groups meet within a block
    const auto whole = [&](int64_t count) { return (count + block - 1) / block * block; };
    const int64_t ldx = whole(word_count) * 8, lds = whole(groups);
    std::vector<float> blocks(size_t(m * ldx), 0.0f), sums(size_t(m * lds), 0.0f), out(size_t(m * n));
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t i = 0; i < m; i++) {
      load_row(row.data(), row_of(x, 0, i), x.dtype, k);
      for (int64_t g = 0, j = 0; j < k; g++)
        for (const int64_t end = std::min(k, j + group); j < end; j++) {
          const int64_t word = j / 8, column = j % 8;
          blocks[size_t(i * ldx + (word / block * 8 + column) * block + word % block)] = row[size_t(j)];
          sums[size_t(i * lds + g)] += row[size_t(j)];
        }
    }
    parallel_for(c, n, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> grid(size_t(2 * groups)), word_scale(size_t(whole(word_count)));
      std::vector<float> shift(static_cast<size_t>(lds));
      float *s = grid.data(), *z = s + groups, dots[8];
      for (int64_t r = begin; r < end; r++) {
        grid_row(r, s, z);
        for (int64_t g = 0; g < groups; g++) {
          shift[size_t(g)] = s[g] * z[g];
          if (mixed) std::fill_n(word_scale.data() + g * group_words, std::min(group_words, word_count - g * group_words), s[g]);
        }
        for (int64_t i = 0; i < m; i += 8) {
          const int rows = int(std::min<int64_t>(8, m - i));
          kernel.dot(dots, blocks.data() + i * ldx, ldx, sums.data() + i * lds, lds, rows, packed.row(0, r), word_count,
                     mixed ? 0 : group_words, mixed ? word_scale.data() : s, groups, shift.data());
          for (int q = 0; q < rows; q++) out[size_t((i + q) * n + r)] = dots[q] + offset[size_t(r)];
        }
      }
    });
    for (int64_t i = 0; i < m; i++) store_row(row_of(y, 0, i), y.dtype, out.data() + i * n, n);
    return 0;
  }
  const int64_t piece = std::min<int64_t>(n, std::max<int64_t>(64, (4 << 20) / std::max<int64_t>(k, 1)));
  Scratch scratch;
  float* w = scratch.take(size_t(piece * k));
  for (int64_t r0 = 0; r0 < n; r0 += piece) {
    const int64_t rows = std::min(piece, n - r0);
    parallel_for(c, rows, 8, [&](int64_t begin, int64_t end) {
      std::vector<float> grid(size_t(2 * groups));
      for (int64_t r = begin; r < end; r++) {
        grid_row(r0 + r, grid.data(), grid.data() + groups);
        kernel.expand(w + r * k, packed.row(0, r0 + r), k, group, grid.data(), grid.data() + groups);
      }
    });
    Product product;
    product.c = y;
    product.c.data = static_cast<char*>(y.data) + r0 * y.stride[1] * int64_t(dtype_size(y.dtype));
    product.a = x;
    product.b = dc_tensor{w, DC_F32, 2, {k, rows, 1, 1}, {1, k, 0, 0}};
    product.m = m, product.n = rows, product.k = k;
    product.bias = offset.data() + r0;
    multiply(c, product);
  }
  return 0;
}
