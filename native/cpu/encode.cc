// encode: values -> GGML blocks, with a search of the scales that minimises the weighted squared error; and the ops that
// let an algorithm choose the codes on a block's grid itself.
#include <algorithm>
#include <vector>

#include "blas.h"
#include "blocks.h"
#include "kernels/encode.h"
#include "matrices.h"

namespace dc {

extern const EncodeKernels encode_kernels_base;
#if defined(__x86_64__)
extern const EncodeKernels encode_kernels_avx2, encode_kernels_avx512;
#endif

const EncodeKernels& encode_kernels() {
#if defined(__x86_64__)
  static const EncodeKernels& chosen = !strcmp(dc_isa(), "base")   ? encode_kernels_base
                                       : !strcmp(dc_isa(), "avx2") ? encode_kernels_avx2
                                                                   : encode_kernels_avx512;
  return chosen;
#else
  return encode_kernels_base;
#endif
}

}  // namespace dc

using namespace dc;

namespace {

float half(float x) { return f16_to_float(float_to_f16(std::clamp(x, -65504.0f, 65504.0f))); }

// The grid (scale alone) that minimises the error of one group: multiples of the scale that lets the largest value reach
// the longer side of the range, of both signs, each followed by least squares for its codes.
GroupGrid search_scale(const float* x, const float* w, int n, float low, float high) {
  const EncodeKernels& kernel = encode_kernels();
  float most = 0;
  for (int i = 0; i < n; i++) most = std::max(most, std::fabs(x[i]));
  if (most == 0) return {0, 0};
  const float base = most / std::max(-low, high);
  GroupGrid best{base, 0};
  float least = INFINITY;
  for (const float sign : {1.0f, -1.0f}) {
    for (int step = 0; step < 15; step++) {
      const GroupGrid start{sign * base * (0.7f + 0.03f * float(step)), 0};
      GroupSums s;
      kernel.sums(x, w, n, start, low, high, &s);
      if (!(s.qq > 0)) continue;
      const GroupGrid fitted{float(s.xq / s.qq), 0};
      const float error = kernel.error(x, w, n, fitted, low, high);
      if (error < least) least = error, best = fitted;
    }
  }
  return best;
}

// Scale and minimum of one group; with `positive` the minimum is at least 0.
GroupGrid search_range(const float* x, const float* w, int n, float high, bool positive) {
  const EncodeKernels& kernel = encode_kernels();
  float bottom = x[0], top = x[0];
  for (int i = 1; i < n; i++) bottom = std::min(bottom, x[i]), top = std::max(top, x[i]);
  if (positive) bottom = std::min(bottom, 0.0f);
  if (top <= bottom) return {0, -bottom};
  GroupGrid best{(top - bottom) / high, -bottom};
  float least = kernel.error(x, w, n, best, 0, high);
  for (int step = 0; step < 20; step++) {
    GroupGrid grid{(top - bottom) / high * (0.6f + 0.025f * float(step)), -bottom};
    for (int turn = 0; turn < 2; turn++) {
      GroupSums s;
      kernel.sums(x, w, n, grid, 0, high, &s);
      const double determinant = s.one * s.qq - s.q * s.q;
      if (!(determinant > 0)) break;
      double scale = (s.one * s.xq - s.q * s.x) / determinant, offset = (s.qq * s.x - s.q * s.xq) / determinant;
      if (positive && offset > 0) offset = 0, scale = s.qq > 0 ? s.xq / s.qq : 0;
      if (!(scale > 0)) break;
      grid = {float(scale), float(-offset)};
      const float error = kernel.error(x, w, n, grid, 0, high);
      if (error < least) least = error, best = grid;
    }
  }
  return best;
}

// The grids of a block's groups once scales are integers times d (and minima times dmin).
struct Superblock {
  const BlockFormat& format;
  const float *x, *w;
  int size;  // values of a group

  GroupGrid grid(const BlockHead& h, int g) const {
    if (format.scale_high == 0) return {h.d, h.dmin};
    return {h.d * float(h.scale[g]), h.dmin * float(h.minimum[g])};
  }
  float error(const BlockHead& h, int g) const {
    return encode_kernels().error(x + g * size, w + g * size, size, grid(h, g), float(format.low), float(format.high));
  }
  float error(const BlockHead& h) const {
    float sum = 0;
    for (int g = 0; g < format.groups; g++) sum += error(h, g);
    return sum;
  }
  // The best integers of each group near those of its ideal grid.
  void fit_integers(BlockHead& h, const GroupGrid* ideal) const {
    for (int g = 0; g < format.groups; g++) {
      const int s = h.d != 0 ? int(std::nearbyint(std::clamp(ideal[g].scale / h.d, -1e4f, 1e4f))) : 0;
      const int m = h.dmin != 0 ? int(std::nearbyint(std::clamp(ideal[g].minimum / h.dmin, -1e4f, 1e4f))) : 0;
      float least = INFINITY;
      int best_s = 0, best_m = 0;
      for (int ds = -1; ds <= 1; ds++) {
        for (int dm = -1; dm <= 1; dm++) {
          if (!format.minimum && dm != 0) continue;
          h.scale[g] = std::clamp(s + ds, format.scale_low, format.scale_high);
          h.minimum[g] = format.minimum ? std::clamp(m + dm, format.scale_low, format.scale_high) : 0;
          const float e = error(h, g);
          if (e < least) least = e, best_s = h.scale[g], best_m = h.minimum[g];
        }
      }
      h.scale[g] = best_s, h.minimum[g] = best_m;
    }
  }
  // d and dmin by least squares for the codes and integers as they are.
  void fit_steps(BlockHead& h) const {
    double aa = 0, ab = 0, bb = 0, xa = 0, xb = 0;
    for (int g = 0; g < format.groups; g++) {
      GroupSums s;
      encode_kernels().sums(x + g * size, w + g * size, size, grid(h, g), float(format.low), float(format.high), &s);
      const double p = h.scale[g], q = h.minimum[g];
      aa += p * p * s.qq, ab += p * q * s.q, bb += q * q * s.one, xa += p * s.xq, xb += q * s.x;
    }
    // x ~ d a - dmin b
    const double determinant = aa * bb - ab * ab;
    if (format.minimum && determinant > 1e-12 * aa * bb) {
      h.d = half(float((xa * bb - xb * ab) / determinant));
      h.dmin = half(float((xa * ab - xb * aa) / determinant));
    } else if (aa > 0) {
      h.d = half(float((xa + double(h.dmin) * ab) / aa));
    }
  }
};

BlockHead search_block(const BlockFormat& format, const float* x, const float* w) {
  const Superblock block{format, x, w, format.values / format.groups};
  const float low = float(format.low), high = float(format.high);
  GroupGrid ideal[kMostGroups];
  for (int g = 0; g < format.groups; g++) {
    const float *xg = x + g * block.size, *wg = w + g * block.size;
    ideal[g] = format.minimum ? search_range(xg, wg, block.size, high, format.scale_high != 0)
                              : search_scale(xg, wg, block.size, low, high);
  }
  BlockHead best;
  if (format.scale_high == 0) {
    best.d = half(ideal[0].scale), best.dmin = half(ideal[0].minimum);
    return best;
  }
  float scale = 0, minimum = 0;
  for (int g = 0; g < format.groups; g++) {
    if (std::fabs(ideal[g].scale) > std::fabs(scale)) scale = ideal[g].scale;
    minimum = std::max(minimum, ideal[g].minimum);
  }
  // Signed integers: the largest scale takes the longer, negative side.
  best.d = half(scale / float(format.scale_low < 0 ? format.scale_low : format.scale_high));
  best.dmin = half(minimum / float(format.scale_high));
  block.fit_integers(best, ideal);
  float least = block.error(best);
  BlockHead next = best;
  for (int turn = 0; turn < 4; turn++) {
    block.fit_steps(next);
    if (!std::isfinite(next.d) || !std::isfinite(next.dmin)) break;
    for (int g = 0; g < format.groups; g++) ideal[g] = block.grid(next, g);
    block.fit_integers(next, ideal);
    const float error = block.error(next);
    if (error < least) {
      least = error, best = next;
    } else {
      break;
    }
  }
  return best;
}

void encode_grid(int64_t encoding, const BlockFormat& format, uint8_t* out, const float* x, const float* w) {
  const int size = format.values / format.groups;
  const BlockHead head = search_block(format, x, w);
  float codes[256];
  int8_t integers[256];
  for (int g = 0; g < format.groups; g++)
    encode_kernels().codes(x + g * size, size, Superblock{format, x, w, size}.grid(head, g), float(format.low),
                           float(format.high), codes + g * size);
  for (int i = 0; i < format.values; i++) integers[i] = int8_t(codes[i]);
  write_head(encoding, out, head);
  write_codes(encoding, out, integers);
}

// 32 values in 16 bytes on a table of 16 levels, value = scale level; `scales` are tried in turn.
template <class Scales>
float encode_table(uint8_t* out, const float* x, const float* w, const float table[16], const Scales& scales) {
  float least = INFINITY, best = 0;
  uint8_t codes[32], best_codes[32] = {};
  for (const float scale : scales) {
    float error = 0;
    const float inverse = scale != 0 ? 1 / scale : 0;
    for (int i = 0; i < 32; i++) {
      const float v = x[i] * inverse;
      int nearest = 0;
      for (int q = 1; q < 16; q++)
        if (std::fabs(v - table[q]) < std::fabs(v - table[nearest])) nearest = q;
      codes[i] = uint8_t(nearest);
      const float d = x[i] - scale * table[nearest];
      error += w[i] * d * d;
    }
    if (error < least) {
      least = error, best = scale;
      std::copy(codes, codes + 32, best_codes);
    }
  }
  for (int i = 0; i < 16; i++) out[i] = uint8_t(best_codes[i] | best_codes[i + 16] << 4);
  return best;
}

float largest(const float* x, int n) {
  float most = 0;
  for (int i = 0; i < n; i++) most = std::max(most, std::fabs(x[i]));
  return most;
}

void encode_iq4_nl(uint8_t* out, const float* x, const float* w) {
  static const float table[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  const float most = largest(x, 32);
  std::vector<float> scales;
  for (int step = 0; step < 18; step++)
    for (const float sign : {1.0f, -1.0f}) scales.push_back(half(sign * most / 127 * (0.75f + 0.03f * float(step))));
  const uint16_t d = float_to_f16(encode_table(out + 2, x, w, table, scales));
  std::memcpy(out, &d, 2);
}

void encode_mxfp4(uint8_t* out, const float* x, const float* w) {
  static const float table[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // doubled, as in decode
  const float most = largest(x, 32);
  // Powers of two about the one that lets the largest value reach 6; byte e stands for 2^(e - 127), half of it here.
  const int near = most > 0 ? std::clamp(int(std::ilogb(most)) - 2 + 127, 1, 252) : 0;
  std::vector<float> scales;
  std::vector<int> exponents;
  for (int e = std::max(near - 1, 0); e <= near + 1; e++) {
    exponents.push_back(e);
    scales.push_back(float(std::ldexp(1.0, e - 128)));
  }
  const float best = encode_table(out + 1, x, w, table, scales);
  out[0] = uint8_t(exponents[size_t(std::find(scales.begin(), scales.end(), best) - scales.begin()) % exponents.size()]);
}

}  // namespace

extern "C" int dc_cpu_encode(dc_context* c, const dc_call* call) {
  const dc_tensor &dst = call->t[0], &src = call->t[1], &weight = call->t[2];
  const int64_t encoding = call->i[0], rows = src.dim[0], k = src.dim[1];
  const BlockFormat* format = block_format(encoding);
  const bool table = encoding == DC_ENC_IQ4_NL || encoding == DC_ENC_MXFP4;
  if (!format && !table) return fail(c, "no encoder for encoding %lld", (long long)encoding);
  const int64_t values = format ? format->values : 32, bytes = format ? format->bytes : encoding == DC_ENC_MXFP4 ? 17 : 18;
  if (k % values != 0) return fail(c, "%lld columns are not whole blocks of %lld", (long long)k, (long long)values);
  if (!dense_rows(dst) || !dense_rows(src) || !dense_rows(weight)) return fail(c, "tensors must have dense rows");
  if (dst.dim[0] != rows || dst.dim[1] != k / values * bytes) return fail(c, "dst does not fit src");
  parallel_for(c, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(size_t(k + 2 * values));
    float *row = buffer.data(), *x = row + k, *w = x + values;
    for (int64_t r = begin; r < end; r++) {
      load_row(row, row_of(src, 0, r), src.dtype, k);
      auto* out = static_cast<uint8_t*>(row_of(dst, 0, r));
      for (int64_t j = 0; j < k; j += values, out += bytes) {
        float energy = 0;
        for (int64_t i = 0; i < values; i++) {
          const bool finite = std::isfinite(row[j + i]);
          x[i] = finite ? row[j + i] : 0;
          w[i] = !finite ? 0 : present(weight) ? data<float>(weight)[j + i] : 1;
          energy += w[i];
        }
        if (!(energy > 0) || !std::isfinite(energy))
          for (int64_t i = 0; i < values; i++) w[i] = std::isfinite(row[j + i]) ? 1 : 0;
        if (encoding == DC_ENC_IQ4_NL)
          encode_iq4_nl(out, x, w);
        else if (encoding == DC_ENC_MXFP4)
          encode_mxfp4(out, x, w);
        else
          encode_grid(encoding, *format, out, x, w);
      }
    }
  });
  return 0;
}

extern "C" int dc_cpu_block_grid(dc_context* c, const dc_call* call) {
  const dc_tensor &st = call->t[0], &zt = call->t[1], &src = call->t[2];
  const int64_t encoding = call->i[0];
  const BlockFormat* format = block_format(encoding);
  if (!format) return fail(c, "encoding %lld has no integer grid", (long long)encoding);
  if (!dense_rows(st) || !dense_rows(zt) || !dense_rows(src)) return fail(c, "tensors must have dense rows");
  const int64_t rows = src.dim[0], blocks = src.dim[1] / format->bytes;
  if (st.dim[0] != rows || st.dim[1] != blocks * format->groups) return fail(c, "scale does not fit src");
  if (present(zt) != format->minimum) return fail(c, "zero must be given for encodings with minima, and only there");
  const Matrices<float> scale(st), zero(zt);
  parallel_for(c, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const auto* block = static_cast<const uint8_t*>(row_of(src, 0, r));
      for (int64_t b = 0; b < blocks; b++, block += format->bytes) {
        const BlockHead head = read_head(encoding, block);
        for (int g = 0; g < format->groups; g++) {
          const bool plain = format->scale_high == 0;
          const float s = plain ? head.d : head.d * float(head.scale[g]);
          const float m = plain ? head.dmin : head.dmin * float(head.minimum[g]);
          // A scale of 0 gives the minimum whatever the code: a tiny one stands for it.
          const float usable = s != 0 ? s : 1e-30f;
          scale.row(0, r)[b * format->groups + g] = usable;
          if (format->minimum) zero.row(0, r)[b * format->groups + g] = m / usable;
        }
      }
    }
  });
  return 0;
}

extern "C" int dc_cpu_block_codes(dc_context* c, const dc_call* call) {
  const dc_tensor &dst = call->t[0], &codes = call->t[1];
  const int64_t encoding = call->i[0], rows = codes.dim[0], k = codes.dim[1];
  const BlockFormat* format = block_format(encoding);
  if (!format) return fail(c, "encoding %lld has no integer grid", (long long)encoding);
  if (!dense_rows(dst) || !dense_rows(codes)) return fail(c, "tensors must have dense rows");
  if (k % format->values != 0 || dst.dim[0] != rows || dst.dim[1] != k / format->values * format->bytes)
    return fail(c, "dst does not fit codes");
  parallel_for(c, rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      auto* block = static_cast<uint8_t*>(row_of(dst, 0, r));
      const auto* row = static_cast<const int8_t*>(row_of(codes, 0, r));
      int8_t clamped[256];
      for (int64_t j = 0; j < k; j += format->values, block += format->bytes) {
        for (int i = 0; i < format->values; i++)
          clamped[i] = int8_t(std::clamp<int>(row[j + i], format->low, format->high));
        write_codes(encoding, block, clamped);
      }
    }
  });
  return 0;
}
