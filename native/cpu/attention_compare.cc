// How far two attentions on the same positions differ, row by row: the maps are never stored.
#include "attention.h"
#include "gemm.h"
#include "kernels/gemm.h"

using namespace dc;

namespace {

constexpr int kTop = 8;

// The positions of the `kTop` greatest of x[0..n), ties to the lower one; returns how many there are.
int top(const float* x, int64_t n, int64_t at[kTop]) {
  int held = 0;
  for (int64_t i = 0; i < n; i++) {
    if (held == kTop && !(x[i] > x[at[kTop - 1]])) continue;
    int j = held < kTop ? held++ : kTop - 1;
    for (; j > 0 && x[i] > x[at[j - 1]]; j--) at[j] = at[j - 1];
    at[j] = i;
  }
  return held;
}

}  // namespace

extern "C" int dc_cpu_attention_compare(dc_context* c, const dc_call* call) {
  const dc_tensor &out = call->t[0], &lengths = call->t[5];
  const dc_tensor* q[2] = {&call->t[1], &call->t[3]};
  const dc_tensor* k[2] = {&call->t[2], &call->t[4]};
  const Mask mask{call->i[0] != 0, call->i[1], call->i[2]};
  const int64_t B = q[0]->dim[0], S = q[0]->dim[1], H = q[0]->dim[2], T = k[0]->dim[1];
  if (count(out) == 0) return 0;
  const GemmKernels& gemm = gemm_kernels();
  const auto& kernels = element_kernels();
  const int64_t rows = gemm.mr * 2, blocks = (S + rows - 1) / rows, nr = gemm.nr, Tn = (T + nr - 1) / nr * nr;
  static thread_local Scratch scratch;
  float* packed = scratch.take(size_t(Tn * (q[0]->dim[3] + q[1]->dim[3])));
  float* keys[2] = {packed, packed + Tn * q[0]->dim[3]};
  for (int64_t b = 0; b < B; b++) {
    const int64_t length = key_count(lengths, b, T);
    for (int64_t h = 0; h < H; h++) {
      const int64_t panels = (length + nr - 1) / nr;
      parallel_for(c, panels * 2, 4, [&](int64_t begin, int64_t end) {
        for (int64_t w = begin; w < end; w++) {
          const int m = int(w & 1);
          const int64_t t0 = (w >> 1) * nr, n = std::min(nr, length - t0), D = q[m]->dim[3];
          const dc_tensor x = head_rows(*k[m], b, h / (H / k[m]->dim[2]), t0, n);
          gemm.pack(keys[m] + t0 * D, x.data, x.dtype, x.stride[0], x.stride[1], n, D, int(nr));
        }
      });
      parallel_for(c, blocks, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> queries(size_t(rows * std::max(q[0]->dim[3], q[1]->dim[3]))), scores[2];
        for (auto& x : scores) x.resize(size_t(rows * T));
        for (int64_t w = begin; w < end; w++) {
          // Late queries first: under a causal mask they have the most work.
          const int64_t s0 = (blocks - 1 - w) * rows, m = std::min(rows, S - s0);
          int64_t first, last, highest = 0;
          for (int64_t i = 0; i < m; i++) {
            mask.keys(s0 + i, length, &first, &last);
            highest = std::max(highest, last);
          }
          for (int a = 0; a < 2; a++) {
            const dc_tensor x = head_rows(*q[a], b, h, s0, m);
            gemm.pack(queries.data(), x.data, x.dtype, x.stride[0], x.stride[1], m, x.dim[1], gemm.mr);
            if (highest > 0) gemm.block(scores[a].data(), T, queries.data(), keys[a], m, highest, x.dim[1], false);
          }
          for (int64_t i = 0; i < m; i++) {
            mask.keys(s0 + i, length, &first, &last);
            first = std::max<int64_t>(first, 1);  // attention sinks would drown everything else
            float* y = data<float>(out) + b * out.stride[0] + h * out.stride[1] + (s0 + i) * out.stride[2];
            float result[3] = {NAN, NAN, NAN};
            if (first < last) {
              const int64_t n = last - first;
              int64_t best[2][kTop];
              int found = 0;
              float* row[2];
              for (int a = 0; a < 2; a++) {
                row[a] = scores[a].data() + i * T + first;
                const float scale = float(call->f[a]);
                kernels.scale(row[a], scale, n);
                if (call->f[2 + a] > 0) kernels.unary(row[a], n, DC_SOFTCAP, float(call->f[2 + a]), 0);
                found = top(row[a], n, best[a]);
                const double sum = kernels.exp_sum(row[a], 1, kernels.max(row[a], n), n);
                kernels.scale(row[a], float(1 / sum), n);
              }
              double d[4];
              kernels.divergence(row[0], row[1], n, d);
              int shared = 0;
              for (int u = 0; u < found; u++)
                for (int v = 0; v < found; v++) shared += best[0][u] == best[1][v];
              result[0] = float(d[0]);
              result[1] = float(d[1] / std::sqrt(d[2] * d[3]));
              result[2] = float(shared) / float(found);
            }
            for (int a = 0; a < 3; a++) y[a * out.stride[3]] = result[a];
          }
        }
      });
    }
  }
  return 0;
}
