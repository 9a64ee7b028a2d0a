// Quantization to integer grids: search of the grids, rounding, error feedback.
#include <algorithm>
#include <vector>

#include "gemm.h"
#include "grid.h"
#include "kernels/gemm.h"
#include "kernels/sweep.h"

using namespace dc;

namespace {

constexpr int64_t kDepth = 256;

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Columns a block holds: a multiple of the micro-kernel's rows, so that its panel of the factor stays in L2.
int64_t block_columns() { return 128 / gemm_kernels().mr * gemm_kernels().mr; }

// R_ij / R_jj, packed: for each block of columns its panels (of mr columns) over positions 0..end of the block, in
// pieces of kDepth positions before the block and one piece for the block itself.
struct PackedFactor {
  int64_t k, block;
  std::vector<int64_t> offset;  // of each block, in floats
  explicit PackedFactor(int64_t k_) : k(k_), block(block_columns()) {
    int64_t at = 0;
    for (int64_t j0 = 0; j0 < k; j0 += block) {
      offset.push_back(at);
      at += width(j0) * end(j0);
    }
    offset.push_back(at);
  }
  int64_t end(int64_t j0) const { return std::min(j0 + block, k); }
  int64_t width(int64_t j0) const { return up(end(j0) - j0, gemm_kernels().mr); }
  // The piece of block j0 that begins at position i.
  int64_t piece(int64_t j0, int64_t i) const { return offset[size_t(j0 / block)] + width(j0) * i; }

  void pack(dc_context* c, float* out, const Matrix<float>& r) const {
    const GemmKernels& kernel = gemm_kernels();
    struct Job {
      int64_t j0, i0, n;
    };
    std::vector<Job> jobs;
    for (int64_t j0 = 0; j0 < k; j0 += block) {
      for (int64_t i0 = 0; i0 < j0; i0 += kDepth) jobs.push_back({j0, i0, std::min(kDepth, j0 - i0)});
      jobs.push_back({j0, j0, end(j0) - j0});
    }
    parallel_for(c, int64_t(jobs.size()), 1, [&](int64_t begin, int64_t finish) {
      for (int64_t p = begin; p < finish; p++) {
        const Job& x = jobs[size_t(p)];
        float* piece_out = out + piece(x.j0, x.i0);
        kernel.pack(piece_out, r.row(x.i0) + x.j0, DC_F32, 1, r.stride, end(x.j0) - x.j0, x.n, kernel.mr);
        for (int64_t j = x.j0; j < end(x.j0); j++) {
          const float inverse = 1 / r.row(j)[j];
          float* column = piece_out + (j - x.j0) / kernel.mr * kernel.mr * x.n + (j - x.j0) % kernel.mr;
          for (int64_t i = 0; i < x.n; i++) column[i * kernel.mr] *= inverse;
        }
      }
    });
  }
};

struct LdlqJob {
  const PackedFactor& layout;
  const float* factor;
  const float* diagonal;
  const Grid& grid;
  int64_t e;
  Matrix<int8_t> codes;
  Matrix<float> q, w;
  const dc_tensor& error;
};

// Sweeps rows [row0, row0 + rows) through all columns. The rows are held in strips (kernels/sweep.h), W being replaced
// by W - Q as the sweep goes, so that the feedback of all earlier columns is one product per block.
void ldlq_rows(const LdlqJob& job, int64_t row0, int64_t rows) {
  const GemmKernels& kernel = gemm_kernels();
  const SweepKernels& sweep = sweep_kernels();
  const PackedFactor& layout = job.layout;
  const Grid& grid = job.grid;
  const int64_t mr = kernel.mr, nr = kernel.nr, k = layout.k, groups = grid.scale.columns, block = layout.block;
  const int64_t strips = (rows + nr - 1) / nr;
  static thread_local Scratch scratch;
  const int64_t strip_floats = nr * k, grid_floats = nr * groups, block_floats = nr * block;
  float* strip = scratch.take(size_t(strips * (strip_floats + 2 * grid_floats + block_floats + nr) + 2 * block_floats));
  float* scale = strip + strips * strip_floats;
  float* zero = scale + strips * grid_floats;
  float* feedback = zero + strips * grid_floats;
  float* loss = feedback + strips * block_floats;
  float* codes = loss + strips * nr;
  float* values = codes + block_floats;
  std::vector<double> losses(size_t(strips * nr), 0.0);
  for (int64_t s = 0; s < strips; s++) {
    const int64_t r0 = row0 + s * nr, n = std::min(nr, row0 + rows - r0);
    kernel.pack(strip + s * strip_floats, job.w.row(r0), DC_F32, job.w.stride, 1, n, k, int(nr));
    kernel.pack(scale + s * grid_floats, grid.scales(job.e, r0), DC_F32, grid.scale.stride, 1, n, groups, int(nr));
    if (grid.zero)
      kernel.pack(zero + s * grid_floats, grid.zeros(job.e, r0), DC_F32, grid.zero_stride, 1, n, groups, int(nr));
    else
      std::fill(zero + s * grid_floats, zero + (s + 1) * grid_floats, 0.0f);
  }
  for (int64_t j0 = 0; j0 < k; j0 += block) {
    const int64_t width = layout.end(j0) - j0;
    std::fill(feedback, feedback + strips * block_floats, 0.0f);
    for (int64_t i0 = 0; i0 < j0; i0 += kDepth) {
      const float* piece = job.factor + layout.piece(j0, i0);
      const int64_t n = std::min(kDepth, j0 - i0);
      for (int64_t s = 0; s < strips; s++)
        kernel.block(feedback + s * block_floats, nr, piece, strip + s * strip_floats + i0 * nr, width, nr, n, true);
    }
    const float* own = job.factor + layout.piece(j0, j0);
    std::fill(loss, loss + strips * nr, 0.0f);
    for (int64_t s = 0; s < strips; s++) {
      float* e = strip + s * strip_floats + j0 * nr;
      float* back = feedback + s * block_floats;
      for (int64_t p = 0; p < width; p += mr) {
        const int64_t m = std::min(mr, width - p);
        const float *panel = own + p * width, *scales[32], *zeros[32];
        if (p > 0) kernel.block(back + p * nr, nr, panel, e, m, nr, p, true);
        for (int64_t j = 0; j < m; j++) {
          const int64_t g = grid.group_of(job.e, j0 + p + j);
          scales[j] = scale + s * grid_floats + g * nr;
          zeros[j] = zero + s * grid_floats + g * nr;
        }
        LdlqColumns columns{};
        columns.m = int(m), columns.mr = int(mr), columns.nr = int(nr);
        columns.low = grid.low, columns.high = grid.high;
        columns.e = e + p * nr, columns.feedback = back + p * nr;
        columns.factor = panel + p * mr, columns.diagonal = job.diagonal + j0 + p;
        columns.scale = scales, columns.zero = zeros;
        columns.codes = codes + p * nr, columns.q = values + p * nr;
        columns.loss = loss + s * nr;
        sweep.ldlq(columns);
      }
      const int64_t r0 = row0 + s * nr, n = std::min(nr, row0 + rows - r0);
      for (int64_t r = 0; r < n; r++) {
        int8_t* code_row = job.codes.row(r0 + r) + j0;
        float* value_row = job.q.row(r0 + r) + j0;
        for (int64_t j = 0; j < width; j++) {
          code_row[j] = int8_t(codes[j * nr + r]);
          value_row[j] = values[j * nr + r];
        }
      }
    }
    for (int64_t i = 0; i < strips * nr; i++) losses[size_t(i)] += double(loss[i]);
  }
  if (present(job.error))
    for (int64_t r = 0; r < rows; r++) *per_row<float>(job.error, job.e, row0 + r) = float(losses[size_t(r)]);
}

}  // namespace

extern "C" int dc_cpu_ldlq(dc_context* c, const dc_call* call) {
  const dc_tensor* t = call->t;
  for (int i : {0, 1, 2, 3, 4, 5, 6})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const Matrices<int8_t> codes(t[0]);
  const Matrices<float> q(t[1]), w(t[2]), r(t[3]);
  const Grid grid(t[4], t[5], t[6], call->i[0], call->i[1], call->i[2]);
  const int64_t rows = w.rows, k = w.columns;
  if (grid.check(c, w.batch, k)) return 1;
  const PackedFactor layout(k);
  static thread_local Scratch scratch;
  float* factor = scratch.take(size_t(layout.offset.back() + k));
  float* diagonal = factor + layout.offset.back();
  // Tiles of rows: what a thread keeps of them should stay in a few MB; their number divides evenly over the threads.
  const int64_t nr = gemm_kernels().nr, strips = (rows + nr - 1) / nr;
  const int64_t most = std::min<int64_t>(16, std::max<int64_t>(4, (1 << 20) / (nr * std::max<int64_t>(k, 1))));
  const int64_t tiles = std::min(strips, up((strips + most - 1) / most, c->threads == 1 ? 1 : 4 * c->threads));
  for (int64_t e = 0; e < w.batch; e++) {
    layout.pack(c, factor, r[e]);
    for (int64_t j = 0; j < k; j++) diagonal[j] = r.row(e, j)[j];
    const LdlqJob job{layout, factor, diagonal, grid, e, codes[e], q[e], w[e], t[7]};
    parallel_for(c, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) {
        const int64_t from = strips * p / tiles * nr, to = std::min(strips * (p + 1) / tiles * nr, rows);
        if (from < to) ldlq_rows(job, from, to - from);
      }
    });
  }
  return 0;
}

extern "C" int dc_cpu_scale_search(dc_context* c, const dc_call* call) {
  const dc_tensor *t = call->t, &weight = t[3];
  for (int i : {0, 1, 2, 3})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const Matrices<float> scale(t[0]), zero(t[1]);
  const int64_t batch = t[2].rank == 3 ? t[2].dim[0] : 1, rows = t[2].dim[t[2].rank - 2], k = t[2].dim[t[2].rank - 1];
  const int64_t group = call->i[2], points = std::max<int64_t>(1, call->i[3]);
  const double from = call->f[0], to = call->f[1];
  if (group <= 0 || scale.columns != (k + group - 1) / group) return fail(c, "scale does not fit W and group");
  if (!(from > 0 && to > 0)) return fail(c, "multiples from %g to %g: they must be positive", from, to);
  std::vector<float> multiples(static_cast<size_t>(points));
  for (int64_t i = 0; i < points; i++)
    multiples[size_t(i)] = float(points > 1 ? from + (to - from) * double(i) / double(points - 1) : from);
  GridSearch search{};
  search.low = float(call->i[0]), search.high = float(call->i[1]);
  search.points = int(points), search.multiples = multiples.data();
  search.free_sign = call->i[4] != 0;
  const float low = search.low, high = search.high;
  const SweepKernels& sweep = sweep_kernels();
  const int64_t weight_batch = weight.rank == 2 ? weight.stride[0] : 0, padded = up(group, 16);
  const bool asymmetric = present(t[1]);
  parallel_for(c, batch * rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(static_cast<size_t>(k + 2 * padded));
    float *row = buffer.data(), *values = row + k, *importance = values + padded;
    for (int64_t p = begin; p < end; p++) {
      const int64_t e = p / rows, n = p % rows;
      load_row(row, row_of(t[2], e, n), t[2].dtype, k);
      for (int64_t g = 0; g * group < k; g++) {
        const float* w = row + g * group;
        const float* given = present(weight) ? data<float>(weight) + e * weight_batch + g * group : nullptr;
        const int64_t m = std::min(group, k - g * group);
        float least = 0, most = 0, best_zero = 0;
        sweep.range(w, m, &least, &most);
        const float span = asymmetric ? most - least : std::max(most, -least) * 2, base = span / (high - low);
        float best = 1;
        if (asymmetric) best_zero = std::min(std::max(0.0f, low), high);
        if (base > 0 && std::isfinite(base)) {
          std::fill(values, values + 2 * padded, 0.0f);
          float energy = 0;
          for (int64_t j = 0; j < m; j++) {
            if (!std::isfinite(w[j])) continue;
            values[j] = w[j];
            importance[j] = given ? given[j] : 1;
            energy += importance[j] * std::fabs(w[j]);
          }
          if (!(energy > 0) || !std::isfinite(energy))  // dead or broken channels: judge by the weights alone
            for (int64_t j = 0; j < m; j++) importance[j] = std::isfinite(w[j]) ? 1 : 0;
          if (asymmetric) {
            float zeros[3];
            int candidates = 0;
            const float center = code_of(-least, base, low, low, high);
            for (const float z : {center, center - 1, center + 1})
              if (z >= low && z <= high) zeros[candidates++] = z;
            best = sweep.search_zero(search, values, importance, up(m, 16), base, zeros, candidates, &best_zero);
          } else {
            best = sweep.search(search, values, importance, up(m, 16), base);
          }
          if (!(best != 0)) best = base;  // underflow
        }
        scale.row(e, n)[g] = best;
        if (asymmetric) zero.row(e, n)[g] = best_zero;
      }
    }
  });
  return 0;
}

namespace {

// body(group, first column, columns) for each run of columns of one group.
template <class Body>
void for_runs(const Grid& grid, int64_t e, int64_t k, const Body& body) {
  for (int64_t j = 0; j < k;) {
    const int64_t g = grid.group_of(e, j);
    int64_t end = grid.column_group ? j + 1 : std::min((g + 1) * grid.group, k);
    if (grid.column_group)
      while (end < k && grid.group_of(e, end) == g) end++;
    body(g, j, end - j);
    j = end;
  }
}

}  // namespace

extern "C" int dc_cpu_quantize(dc_context* c, const dc_call* call) {
  const dc_tensor* t = call->t;
  for (int i : {0, 1, 2, 3, 4})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const Matrices<int8_t> codes(t[0]);
  const Grid grid(t[2], t[3], t[4], call->i[0], call->i[1], call->i[2]);
  const int64_t rows = codes.rows, k = codes.columns;
  if (grid.check(c, codes.batch, k)) return 1;
  const SweepKernels& sweep = sweep_kernels();
  parallel_for(c, codes.batch * rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t p = begin; p < end; p++) {
      const int64_t e = p / rows, n = p % rows;
      load_row(row.data(), row_of(t[1], e, n), t[1].dtype, k);
      const float *scale = grid.scales(e, n), *zero = grid.zeros(e, n);
      for_runs(grid, e, k, [&](int64_t g, int64_t j, int64_t m) {
        sweep.quantize(codes.row(e, n) + j, row.data() + j, m, scale[g], zero ? zero[g] : 0, grid.low, grid.high);
      });
    }
  });
  return 0;
}

extern "C" int dc_cpu_dequantize(dc_context* c, const dc_call* call) {
  const dc_tensor* t = call->t;
  for (int i : {0, 1, 2, 3, 4})
    if (!dense_rows(t[i])) return fail(c, "tensors must have dense rows");
  const Matrices<int8_t> codes(t[1]);
  const Grid grid(t[2], t[3], t[4], 0, 0, call->i[0]);
  const int64_t rows = codes.rows, k = codes.columns;
  if (grid.check(c, codes.batch, k)) return 1;
  const SweepKernels& sweep = sweep_kernels();
  parallel_for(c, codes.batch * rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t p = begin; p < end; p++) {
      const int64_t e = p / rows, n = p % rows;
      const float *scale = grid.scales(e, n), *zero = grid.zeros(e, n);
      for_runs(grid, e, k, [&](int64_t g, int64_t j, int64_t m) {
        sweep.dequantize(row.data() + j, codes.row(e, n) + j, m, scale[g], zero ? zero[g] : 0);
      });
      store_row(row_of(t[0], e, n), t[0].dtype, row.data(), k);
    }
  });
  return 0;
}
