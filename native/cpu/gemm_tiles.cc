// Matrix multiplication on the processor's unit for bf16: how the work is cut, around the kernels of kernels/gemm_amx.cc and
// gemm_bf16.cc. Every sum runs through k in order, however it is cut.
#include <algorithm>

#include "gemm.h"
#include "kernels/gemm.h"
#include "view.h"

namespace dc {

namespace {

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// An operand as lines along k.
struct Lines {
  dc_tensor t;
  int64_t count, stride, step;  // elements from line to line and along a line
  const void* at(int64_t line, int64_t position) const { return element(t, line * stride + position * step); }
};

// Products are cut into `rows` x `columns` tasks, k into `depths`. A task packs its columns for each piece of k, as many as
// stay in L2, and then takes its rows past them, panel by panel.
struct Cut {
  int64_t rows = 1, columns = 1, depths = 1, depth = 0;

  Cut(const Panels& kernel, int64_t m, int64_t n, int64_t k, int64_t threads) {
    const int64_t m_panels = parts_of(m, kernel.mr), n_panels = parts_of(n, kernel.nr);
    // One part a thread; packing a column costs about four times what packing a row does.
    int64_t least = INT64_MAX;
    for (int64_t r = 1; r <= std::min(threads, m_panels); r++) {
      const int64_t cost = parts_of(m_panels, r) + 4 * parts_of(n_panels, parts_of(threads, r));
      if (cost < least) least = cost, rows = r, columns = std::min(parts_of(threads, r), n_panels);
    }
    // More columns at a time: rows are read less often. More pieces of k: sums are, but for the last, written and read, which
    // costs some four times as much a byte as rows that are fetched ahead (measured on Zen 5).
    const int64_t own = parts_of(n_panels, columns), tall = parts_of(m_panels, rows) * kernel.mr;
    int64_t groups = 1;
    least = INT64_MAX;
    for (int64_t d = 1; d == 1 || k / d >= 256; d++) {
      const int64_t piece = std::min(up(parts_of(k, d), kernel.piece), up(k, kernel.step));
      const int64_t g = parts_of(own, std::max<int64_t>(1, kernel.resident / (piece * kernel.nr * kernel.bytes)));
      const int64_t moved = g * tall * k * kernel.bytes + (d - 1) * 8 * tall * own * kernel.nr * 4;
      if (moved < least) least = moved, depths = d, depth = piece, groups = g;
    }
    columns = std::min(columns * groups, n_panels);
  }
};

Scratch& scratch(int which) {
  static thread_local Scratch memory[3];
  return memory[which];
}

}  // namespace

void multiply_tiles(dc_context* c, const Product& x, const Panels& kernel) {
  const bool direct = x.c.dtype == DC_F32 && x.c.stride[1] == 1 && x.alpha == 1 && (x.beta == 0 || x.beta == 1);
  const bool rounded = kernel.block_bf16 && x.c.dtype == DC_BF16 && x.c.stride[1] == 1 && x.alpha == 1 && x.beta == 0 && !x.bias;
  // Packing the second operand turns its tiles (some 100 cycles for 512 elements), packing the first one copies them. So the
  // one with fewer lines is the second, where that saves more than turning the result costs (300 cycles for 1024 sums).
  const bool swapped = rounded && 2 * x.k * (x.n - x.m) > 3 * x.m * x.n;
  Lines p{x.a, x.m, x.a.stride[0], x.a.stride[1]}, q{x.b, x.n, x.b.stride[1], x.b.stride[0]};
  if (swapped) std::swap(p, q);
  const int64_t mr = kernel.mr, nr = kernel.nr, p_panels = parts_of(p.count, mr), q_panels = parts_of(q.count, nr);
  const Cut cut(kernel, p.count, q.count, x.k, c ? c->threads : 1);

  auto task = [&](int64_t row, int64_t column) {
    const int64_t i0 = p_panels * row / cut.rows * mr, i1 = std::min(p_panels * (row + 1) / cut.rows * mr, p.count);
    const int64_t j0 = q_panels * column / cut.columns * nr, j1 = std::min(q_panels * (column + 1) / cut.columns * nr, q.count);
    const int64_t n = j1 - j0, wide = up(n, nr), bytes = up(cut.depth, kernel.step) * kernel.bytes;
    float* a = scratch(0).take(size_t(mr * bytes / 4));
    float* b = scratch(1).take(size_t(wide * bytes / 4));
    // Sums that wait for the next piece of k, or for `finish`.
    float* sums = direct || (rounded && cut.depths == 1) ? nullptr : scratch(2).take(size_t((cut.depths == 1 ? mr : up(i1 - i0, mr)) * wide));
    for (int64_t k0 = 0; k0 < x.k; k0 += cut.depth) {
      const int64_t k = std::min(cut.depth, x.k - k0), steps = up(k, kernel.step);
      const bool last = k0 + k == x.k;
      kernel.pack_b(b, q.at(j0, k0), q.t.dtype, q.stride, q.step, n, k);
      for (int64_t i = i0; i < i1; i += mr) {
        const int64_t m = std::min(mr, i1 - i);
        const bool lies = kernel.lines && p.step == 1 && k == steps && m % kernel.group == 0;
        const auto* line = static_cast<const uint16_t*>(p.at(i, k0));
        if (!lies) kernel.pack_a(a, line, p.t.dtype, p.stride, p.step, m, k);
        float* sum = direct ? data<float>(x.c) + i * x.c.stride[0] + j0 : sums ? sums + (cut.depths == 1 ? 0 : (i - i0) * wide) : nullptr;
        if (rounded && last) {
          auto* out = data<uint16_t>(x.c) + (swapped ? j0 * x.c.stride[0] + i : i * x.c.stride[0] + j0);
          const float* before = k0 > 0 ? sum : nullptr;
          if (lies)
            kernel.lines_bf16(out, x.c.stride[0], swapped, before, wide, line, p.stride, b, m, n, steps);
          else
            kernel.block_bf16(out, x.c.stride[0], swapped, before, wide, a, b, m, n, steps);
        } else {
          const int64_t ld = direct ? x.c.stride[0] : wide, columns = direct ? n : wide;
          const bool add = k0 > 0 || (direct && x.beta == 1);
          if (lies)
            kernel.lines(sum, ld, line, p.stride, b, m, columns, steps, add);
          else
            kernel.block(sum, ld, a, b, direct ? m : mr, columns, steps, add);
        }
        if (last && !rounded) finish(x, sum, direct ? x.c.stride[0] : wide, i, j0, m, n, direct);
      }
    }
  };
  parallel_for(c, cut.rows * cut.columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) task(t % cut.rows, t / cut.rows);
  });
}

}  // namespace dc
