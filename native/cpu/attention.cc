// Attention, forward: tiles of queries by tiles of keys with a running softmax (Milakov & Gimelshein 2018; Dao et al.
// 2022), on the packed matrix kernel. No S x T map is ever stored.
#include "attention.h"

#include "gemm.h"
#include "kernels/gemm.h"

using namespace dc;

namespace {

constexpr int64_t kKeys = 256;  // keys of a tile

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Attention {
  const dc_tensor &o, &q, &k, &v, &lengths, &sinks, &lse;
  Mask mask;
  float scale, cap;
  int64_t B, S, H, D, T, G, Dv;

  float sink(int64_t h) const { return present(sinks) ? data<float>(sinks)[h * sinks.stride[0]] : -INFINITY; }

  // Scores of one row to be: scale, then the soft cap.
  void scores(float* x, int64_t n) const {
    const auto& kernels = element_kernels();
    kernels.scale(x, scale, n);
    if (cap > 0) kernels.unary(x, n, DC_SOFTCAP, cap, 0);
  }

  // Their maximum; NaN where all of them are NaN or -infinity and one is NaN: it must not vanish.
  static float maximum(const float* x, int64_t n) {
    const float most = element_kernels().max(x, n);
    if (most == -INFINITY)
      for (int64_t i = 0; i < n; i++)
        if (std::isnan(x[i])) return x[i];
    return most;
  }

  // Ends a row: `sum` holds the weighted values relative to e^most, `total` the weights' sum without the sink.
  void finish(int64_t b, int64_t h, int64_t s, float* sum, double most, double total) const {
    const double extra = sink(h);
    if (extra > most) {
      const double shrink = std::exp(most - extra);
      element_kernels().scale(sum, float(shrink), Dv);
      total *= shrink;
      most = extra;
    }
    if (most != -INFINITY) total += std::exp(extra - most);
    if (total != 0)  // NaN too
      element_kernels().scale(sum, float(1 / total), Dv);
    else
      std::fill(sum, sum + Dv, 0.0f);
    store_strided(o, b * o.stride[0] + s * o.stride[1] + h * o.stride[2], o.stride[3], sum, Dv);
    if (present(lse))
      data<float>(lse)[b * lse.stride[0] + h * lse.stride[1] + s * lse.stride[2]] =
          total == 0 ? -INFINITY : float(most + std::log(total));
  }

  // Few queries (decoding): every key is read once, for all query heads that share it. Pieces of keys of a fixed size
  // are combined in order.
  void few(dc_context* c) const {
    const auto& kernels = element_kernels();
    const int64_t Hk = k.dim[2], R = G * S, piece = 512, pieces = (T + piece - 1) / piece;
    const int64_t width = Dv + 2;  // per row of a piece: values, maximum, sum
    std::vector<float> parts(size_t(B * Hk * pieces * R * width));
    std::vector<double> totals(size_t(B * Hk * pieces * R));
    parallel_for(c, B * Hk * pieces, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> queries(size_t(R * D)), x(size_t(R * piece)), row(size_t(std::max(D, Dv)));
      for (int64_t w = begin; w < end; w++) {
        const int64_t b = w / pieces / Hk, g = w / pieces % Hk, t0 = w % pieces * piece;
        const int64_t n = std::min(t0 + piece, key_count(lengths, b, T)) - t0;
        for (int64_t r = 0; r < R; r++)
          load_strided(&queries[size_t(r * D)], q, b * q.stride[0] + r % S * q.stride[1] + (g * G + r / S) * q.stride[2],
                       q.stride[3], D);
        for (int64_t t = 0; t < n; t++) {
          load_strided(row.data(), k, b * k.stride[0] + (t0 + t) * k.stride[1] + g * k.stride[2], k.stride[3], D);
          for (int64_t r = 0; r < R; r++) x[size_t(r * piece + t)] = kernels.dot(&queries[size_t(r * D)], row.data(), D);
        }
        for (int64_t r = 0; r < R; r++) {
          float* part = &parts[size_t((w * R + r) * width)];
          std::fill(part, part + Dv, 0.0f);
          part[Dv] = -INFINITY;
          totals[size_t(w * R + r)] = 0;
          int64_t first, last;
          mask.keys(r % S, t0 + n, &first, &last);
          first = std::max<int64_t>(first - t0, 0), last -= t0;
          float* p = &x[size_t(r * piece)];
          std::fill(p, p + std::max<int64_t>(0, std::min(first, n)), 0.0f);
          if (last > first) {
            scores(p + first, last - first);
            const float most = maximum(p + first, last - first);
            part[Dv] = most;
            totals[size_t(w * R + r)] = most != -INFINITY ? kernels.exp_sum(p + first, 1, most, last - first) : 0;
          }
          if (part[Dv] == -INFINITY) first = last = 0;
          std::fill(p, p + first, 0.0f);
          std::fill(p + std::max<int64_t>(last, 0), p + std::max<int64_t>(n, 0), 0.0f);
        }
        for (int64_t t = 0; t < n; t++) {
          load_strided(row.data(), v, b * v.stride[0] + (t0 + t) * v.stride[1] + g * v.stride[2], v.stride[3], Dv);
          for (int64_t r = 0; r < R; r++)
            if (x[size_t(r * piece + t)] != 0)
              kernels.axpy(&parts[size_t((w * R + r) * width)], x[size_t(r * piece + t)], row.data(), Dv);
        }
      }
    });
    parallel_for(c, B * Hk * R, row_grain(pieces * Dv), [&](int64_t begin, int64_t end) {
      std::vector<float> sum(static_cast<size_t>(Dv));
      for (int64_t i = begin; i < end; i++) {
        const int64_t pair = i / R, r = i % R;
        auto at = [&](int64_t p) { return (pair * pieces + p) * R + r; };
        double most = -INFINITY, total = 0;
        for (int64_t p = 0; p < pieces; p++) {
          const double high = parts[size_t(at(p) * width + Dv)];
          if (!(high <= most)) most = high;
        }
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t p = 0; p < pieces; p++) {
          const float* part = &parts[size_t(at(p) * width)];
          if (part[Dv] == -INFINITY) continue;
          const double weight = std::exp(double(part[Dv]) - most);
          kernels.axpy(sum.data(), float(weight), part, Dv);
          total += weight * totals[size_t(at(p))];
        }
        finish(pair / Hk, pair % Hk * G + r / S, r % S, sum.data(), most, total);
      }
    });
  }

  // Many queries. Keys and values of some heads are packed, then all tiles of queries of these heads run in parallel.
  void tiled(dc_context* c) const {
    // Weights that are rounded to bf16 are good enough for a result that is.
    const bool half = bf16_panels() && q.dtype == DC_BF16 && k.dtype == DC_BF16 && v.dtype == DC_BF16 && o.dtype == DC_BF16;
    const Panels& kernel = half ? *bf16_panels() : float_panels();
    const int64_t mr = kernel.mr, Hk = k.dim[2], rows = std::max<int64_t>(1, 64 / mr) * mr, blocks = (S + rows - 1) / rows;
    const int64_t tiles = (T + kKeys - 1) / kKeys, depth = up(D, kernel.step);
    const int64_t key_bytes = up(kKeys, kernel.nr) * depth * kernel.bytes;  // of a tile
    const int64_t tile_bytes = up(key_bytes + up(Dv, kernel.nr) * kKeys * kernel.bytes, 64);
    int64_t pairs = std::max<int64_t>(1, (c->threads * 32 + G * blocks - 1) / (G * blocks));
    pairs = std::min({pairs, B * Hk, std::max<int64_t>(1, (int64_t(1) << 26) / (tiles * tile_bytes))});
    static thread_local Scratch scratch;
    char* const packed = reinterpret_cast<char*>(scratch.take(size_t(pairs * tiles * tile_bytes / 4)));
    for (int64_t pair0 = 0; pair0 < B * Hk; pair0 += pairs) {
      const int64_t n_pairs = std::min(pairs, B * Hk - pair0);
      parallel_for(c, n_pairs * tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t w = begin; w < end; w++) {
          const int64_t pair = w / tiles, b = (pair0 + pair) / Hk, g = (pair0 + pair) % Hk, t0 = w % tiles * kKeys;
          const int64_t n = std::min(t0 + kKeys, key_count(lengths, b, T)) - t0;
          if (n <= 0) continue;
          const dc_tensor keys = head_rows(k, b, g, t0, n), values = head_rows(v, b, g, t0, n);
          char* at = packed + w * tile_bytes;
          kernel.pack_b(at, keys.data, keys.dtype, keys.stride[0], keys.stride[1], n, D);
          kernel.pack_b(at + key_bytes, values.data, values.dtype, values.stride[1], values.stride[0], Dv, n);
        }
      });
      parallel_for(c, n_pairs * G * blocks, 1, [&](int64_t begin, int64_t end) {
        static thread_local Scratch memory;
        Tile t{kernel, half, depth, key_bytes, tile_bytes, memory.take(size_t(rows * (depth + 2 * kKeys + up(Dv, 16))))};
        t.scores = t.sums + rows * up(Dv, 16), t.weights = t.scores + rows * kKeys, t.queries = t.weights + rows * kKeys;
        std::vector<double> most(static_cast<size_t>(rows)), total(static_cast<size_t>(rows));
        for (int64_t w = begin; w < end; w++) {
          // Late queries first: under a causal mask they have the most work.
          const int64_t pair = w / (G * blocks), h_in = w / blocks % G, s0 = (blocks - 1 - w % blocks) * rows;
          const int64_t b = (pair0 + pair) / Hk, h = (pair0 + pair) % Hk * G + h_in, m = std::min(rows, S - s0);
          tile(t, b, h, s0, m, packed + pair * tiles * tile_bytes, most.data(), total.data());
        }
      });
    }
  }

  // What tiles of queries work with: the matrix kernel, the packed form of keys and values, memory (weights are packed).
  struct Tile {
    const Panels& kernel;
    bool half;
    int64_t depth, key_bytes, tile_bytes;
    float *sums, *scores = nullptr, *weights = nullptr, *queries = nullptr;
  };

  void tile(const Tile& x, int64_t b, int64_t h, int64_t s0, int64_t m, const char* packed, double* most, double* total) const {
    const auto& kernels = element_kernels();
    const Panels& kernel = x.kernel;
    const int64_t length = key_count(lengths, b, T);
    const dc_tensor rows = head_rows(q, b, h, s0, m);
    kernel.pack_a(x.queries, rows.data, rows.dtype, rows.stride[0], rows.stride[1], m, D);
    std::fill(x.sums, x.sums + m * Dv, 0.0f);
    std::fill(most, most + m, -INFINITY);
    std::fill(total, total + m, 0.0);
    const bool scaled = cap > 0 || !(scale > 0);  // before the maximum is taken; else by the exponential
    const float factor = scaled ? 1 : scale;
    int64_t from = T, to = 0;  // keys that any row of the tile sees
    for (int64_t i = 0; i < m; i++) {
      int64_t first, last;
      mask.keys(s0 + i, length, &first, &last);
      if (first < last) from = std::min(from, first), to = std::max(to, last);
    }
    for (int64_t t0 = from / kKeys * kKeys; t0 < to; t0 += kKeys) {
      const char* keys = packed + t0 / kKeys * x.tile_bytes;
      const int64_t stored = std::min(kKeys, length - t0), n = std::min(stored, up(to - t0, kernel.nr));
      const int64_t n_up = up(n, kernel.step);
      kernel.block(x.scores, kKeys, x.queries, keys, m, n, x.depth, false);
      for (int64_t i = 0; i < m; i++) {
        float *row = x.scores + i * kKeys, *sum = x.sums + i * Dv;
        int64_t first, last;
        mask.keys(s0 + i, length, &first, &last);
        first = std::min(std::max<int64_t>(first - t0, 0), n), last = std::min(std::max(last - t0, first), n);
        if (scaled && first < last) scores(row + first, last - first);
        if (x.half) {
          auto* weights = reinterpret_cast<uint16_t*>(x.weights) + i / kernel.mr * kernel.mr * n_up + i % kernel.mr * kernel.step;
          const float shrink = kernels.weigh(weights, kernel.mr * kernel.step, row, n, first, last, factor, &most[i], &total[i]);
          if (shrink != 1) kernels.scale(sum, shrink, Dv);
          continue;
        }
        const float high = first < last ? maximum(row + first, last - first) * factor : -INFINITY;
        if (!(high <= most[i])) {
          const double shrink = std::exp(most[i] - high);
          kernels.scale(sum, float(shrink), Dv);
          total[i] *= shrink;
          most[i] = high;
        }
        if (most[i] != -INFINITY && first < last)
          total[i] += kernels.exp_sum(row + first, factor, float(most[i]), last - first);
        else
          last = first;
        std::fill(row, row + first, 0.0f);
        std::fill(row + last, row + n, 0.0f);
      }
      if (!x.half) kernel.pack_a(x.weights, x.scores, DC_F32, kKeys, 1, m, n);
      const int64_t line = up(stored, kernel.step) * kernel.bytes;
      for (int64_t j = 0; j < Dv; j += kernel.nr)
        kernel.block(x.sums + j, Dv, x.weights, keys + x.key_bytes + j * line, m, std::min<int64_t>(kernel.nr, Dv - j), n_up, true);
    }
    for (int64_t i = 0; i < m; i++) finish(b, h, s0 + i, x.sums + i * Dv, most[i], total[i]);
  }
};

}  // namespace

extern "C" int dc_cpu_attention(dc_context* c, const dc_call* call) {
  const dc_tensor* t = call->t;
  const dc_tensor &o = t[0], &q = t[1], &k = t[2], &v = t[3];
  const Attention a{o,
                    q,
                    k,
                    v,
                    t[4],
                    t[5],
                    t[6],
                    {call->i[0] != 0, call->i[1], call->i[2]},
                    float(call->f[0]),
                    float(call->f[1]),
                    q.dim[0],
                    q.dim[1],
                    q.dim[2],
                    q.dim[3],
                    k.dim[1],
                    q.dim[2] / k.dim[2],
                    v.dim[3]};
  if (count(o) == 0) return 0;
  if (a.G * a.S < 12)
    a.few(c);
  else
    a.tiled(c);
  return 0;
}
