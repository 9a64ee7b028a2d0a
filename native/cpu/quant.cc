// Quantization to integer grids: search of the grids, rounding, error feedback.
#include <algorithm>
#include <vector>

#include "gemm.h"
#include "grid.h"
#include "kernels/gemm.h"
#include "kernels/sweep.h"

using namespace dc;

namespace {

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The factor R, packed for the sweep. Columns go in units of the micro-kernel's rows and units in blocks: what earlier
// blocks contribute to a block is a product in pieces of kDepth positions, what earlier units of the block do another.
struct PackedFactor {
  static constexpr int64_t kDepth = 256;
  const Panels& panels;
  int64_t k, unit, block;
  std::vector<int64_t> offset;  // of each block, in floats (a packed element is as large)
  explicit PackedFactor(int64_t k_)
      : panels(k_ >= 128 && split_panels() ? *split_panels() : float_panels()), k(k_), unit(panels.mr), block(512 / unit * unit) {
    int64_t at = 0;
    for (int64_t j0 = 0; j0 < k; j0 += block) {
      offset.push_back(at);
      at += up(end(j0) - j0, unit) * (j0 + block);
    }
    offset.push_back(at);
  }
  int64_t end(int64_t j0) const { return std::min(j0 + block, k); }
  int64_t floats() const { return offset.back() + up(k, unit) * (unit + 2); }
  // Positions i.. of all columns of block j0, i a multiple of kDepth (the last piece ends with the block before).
  int64_t before(int64_t j0, int64_t i) const { return offset[size_t(j0 / block)] + up(end(j0) - j0, unit) * i; }
  // The block's own positions up to the unit at column j.
  int64_t own(int64_t j0, int64_t j) const { return before(j0, j0) + (j - j0) * block; }
  // In fp32: the unit's square, then R_jj and 1 / R_jj.
  int64_t square(int64_t j) const { return offset.back() + j * (unit + 2); }

  void pack(dc_context* c, float* out, const Matrix<float>& r) const {
    struct Job {
      int64_t j0, i0, n;
    };
    std::vector<Job> jobs;
    for (int64_t j0 = 0; j0 < k; j0 += block) {
      for (int64_t i0 = 0; i0 < j0; i0 += kDepth) jobs.push_back({j0, i0, std::min(kDepth, j0 - i0)});
      for (int64_t j = j0; j < end(j0); j += unit) jobs.push_back({j, j, 0});
    }
    parallel_for(c, int64_t(jobs.size()), 1, [&](int64_t begin, int64_t finish) {
      for (int64_t p = begin; p < finish; p++) {
        const Job& x = jobs[size_t(p)];
        if (x.n > 0) {
          panels.pack_a(out + before(x.j0, x.i0), r.row(x.i0) + x.j0, DC_F32, 1, r.stride, end(x.j0) - x.j0, x.n);
          continue;
        }
        const int64_t j0 = x.j0 / block * block, width = std::min(unit, k - x.j0);
        if (x.j0 > j0) panels.pack_a(out + own(j0, x.j0), r.row(j0) + x.j0, DC_F32, 1, r.stride, width, x.j0 - j0);
        float* square_out = out + square(x.j0);
        for (int64_t i = 0; i < width; i++) {
          const float* row = r.row(x.j0 + i) + x.j0;
          std::memcpy(square_out + i * unit, row, size_t(width) * 4);
          square_out[unit * unit + i] = row[i];
          square_out[unit * unit + unit + i] = 1 / row[i];
        }
      }
    });
  }
};

struct LdlqJob {
  const PackedFactor& layout;
  const float* factor;
  const Grid& grid;
  int64_t e;
  Matrix<int8_t> codes;
  Matrix<float> q, w;
  const dc_tensor& error;
};

// Sweeps rows [row0, row0 + rows) through all columns. The rows are held in strips (kernels/sweep.h), those of a block at
// a time; W - Q of the columns done is kept packed, so that their feedback on a block is one product.
void ldlq_rows(const LdlqJob& job, int64_t row0, int64_t rows) {
  const PackedFactor& layout = job.layout;
  const Panels& panels = layout.panels;
  const GemmKernels& kernel = gemm_kernels();
  const SweepKernels& sweep = sweep_kernels();
  const Grid& grid = job.grid;
  const int64_t nr = panels.nr, k = layout.k, unit = layout.unit, groups = grid.scale.columns;
  const int64_t strips = (rows + nr - 1) / nr, chunk = 128 / unit * unit;
  static thread_local Scratch scratch;
  const int64_t packed_floats = nr * up(k, panels.step), grid_floats = nr * groups, block_floats = nr * std::min(layout.block, up(k, unit));
  float* packed = scratch.take(size_t(strips * (packed_floats + 2 * grid_floats + block_floats + nr) + block_floats + 2 * nr * chunk));
  float* scale = packed + strips * packed_floats;
  float* zero = scale + strips * grid_floats;
  float* feedback = zero + strips * grid_floats;
  float* loss = feedback + strips * block_floats;
  float* errors = loss + strips * nr;
  float* codes = errors + block_floats;
  float* values = codes + nr * chunk;
  std::vector<double> losses(size_t(strips * nr), 0.0);
  for (int64_t s = 0; s < strips; s++) {
    const int64_t r0 = row0 + s * nr, n = std::min(nr, row0 + rows - r0);
    kernel.pack(scale + s * grid_floats, grid.scales(job.e, r0), DC_F32, grid.scale.stride, 1, n, groups, int(nr));
    if (grid.zero)
      kernel.pack(zero + s * grid_floats, grid.zeros(job.e, r0), DC_F32, grid.zero_stride, 1, n, groups, int(nr));
    else
      std::fill(zero + s * grid_floats, zero + (s + 1) * grid_floats, 0.0f);
  }
  for (int64_t j0 = 0; j0 < k; j0 += layout.block) {
    const int64_t width = layout.end(j0) - j0;
    std::fill(feedback, feedback + strips * block_floats, 0.0f);
    for (int64_t i0 = 0; i0 < j0; i0 += layout.kDepth) {
      const int64_t n = std::min(layout.kDepth, j0 - i0);
      for (int64_t p = 0; p < width; p += chunk)  // so that a piece of the factor stays in L2
        for (int64_t s = 0; s < strips; s++)
          panels.block(feedback + s * block_floats + p * nr, nr, job.factor + layout.before(j0, i0) + p * n,
                       packed + s * packed_floats + i0 * nr, std::min(chunk, width - p), nr, n, true);
    }
    std::fill(loss, loss + strips * nr, 0.0f);
    for (int64_t s = 0; s < strips; s++) {
      const int64_t r0 = row0 + s * nr, rest = std::min(nr, row0 + rows - r0);
      float *own = packed + s * packed_floats + j0 * nr, *back = feedback + s * block_floats;
      kernel.pack(errors, job.w.row(r0) + j0, DC_F32, job.w.stride, 1, rest, width, int(nr));
      for (int64_t c0 = 0; c0 < width; c0 += chunk) {
        const int64_t c1 = std::min(c0 + chunk, width);
        for (int64_t p = c0; p < c1; p += unit) {
          const int64_t m = std::min(unit, width - p);
          if (p > 0) panels.block(back + p * nr, nr, job.factor + layout.own(j0, j0 + p), own, m, nr, p, true);
          const float *square = job.factor + layout.square(j0 + p), *scales[32], *zeros[32];
          for (int64_t j = 0; j < m; j++) {
            const int64_t g = grid.group_of(job.e, j0 + p + j);
            scales[j] = scale + s * grid_floats + g * nr;
            zeros[j] = zero + s * grid_floats + g * nr;
          }
          LdlqColumns columns{};
          columns.m = int(m), columns.mr = int(unit), columns.nr = int(nr);
          columns.low = grid.low, columns.high = grid.high;
          columns.e = errors + p * nr, columns.feedback = back + p * nr;
          columns.factor = square, columns.diagonal = square + unit * unit;
          columns.inverse = columns.diagonal + unit;
          columns.scale = scales, columns.zero = zeros;
          columns.codes = codes + (p - c0) * nr, columns.q = values + (p - c0) * nr;
          columns.loss = loss + s * nr;
          sweep.ldlq(columns);
          if (j0 + p + m < k) panels.pack_b(own + p * nr, errors + p * nr, DC_F32, 1, nr, nr, m);
        }
        sweep.unstrip_bytes(job.codes.row(r0) + j0 + c0, job.codes.stride, codes, int(nr), rest, c1 - c0);
        sweep.unstrip(job.q.row(r0) + j0 + c0, job.q.stride, values, int(nr), rest, c1 - c0);
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
  float* factor = scratch.take(size_t(layout.floats()));
  // Tiles of rows: what a thread keeps of them should stay in a few MB; their number divides evenly over the threads.
  const int64_t nr = layout.panels.nr, strips = (rows + nr - 1) / nr;
  const int64_t most = std::min<int64_t>(16, std::max<int64_t>(4, (1 << 20) / (nr * std::max<int64_t>(k, 1))));
  const int64_t tiles = std::min(strips, up((strips + most - 1) / most, c->threads == 1 ? 1 : 4 * c->threads));
  for (int64_t e = 0; e < w.batch; e++) {
    layout.pack(c, factor, r[e]);
    const LdlqJob job{layout, factor, grid, e, codes[e], q[e], w[e], t[7]};
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
        if (base > 0 && std::isfinite(base) && points == 1 && !asymmetric && !search.free_sign) {  // no choice
          best = base * multiples[0];
          if (!(best != 0)) best = base;
        } else if (base > 0 && std::isfinite(base)) {
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
