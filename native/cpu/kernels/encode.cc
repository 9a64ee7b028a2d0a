#include "encode.h"

#include "../cpu.h"
#include "vec.h"

namespace dc {
namespace {

inline __attribute__((always_inline)) vf code(vf x, float inverse, float minimum, vf low, vf high) {
  const vf shift = splat(12582912.0f);  // rounds to nearest even
  return (vmin(vmax((x + minimum) * inverse, low), high) + shift) - shift;
}
inline float inverse_of(GroupGrid grid) { return grid.scale != 0 ? 1 / grid.scale : 0; }

void codes(const float* x, int n, GroupGrid grid, float low, float high, float* out) {
  const float inverse = inverse_of(grid);
  for (int i = 0; i < n; i += W) storef(out + i, code(loadf(x + i), inverse, grid.minimum, splat(low), splat(high)));
}

float error(const float* x, const float* w, int n, GroupGrid grid, float low, float high) {
  const float inverse = inverse_of(grid);
  vf sum = vf{};
  for (int i = 0; i < n; i += W) {
    const vf v = loadf(x + i);
    const vf d = v - (code(v, inverse, grid.minimum, splat(low), splat(high)) * grid.scale - grid.minimum);
    sum = madd(loadf(w + i) * d, d, sum);
  }
  return hsum(sum);
}

void sums(const float* x, const float* w, int n, GroupGrid grid, float low, float high, GroupSums* out) {
  const float inverse = inverse_of(grid);
  vf one = vf{}, sx = vf{}, sxx = vf{}, sq = vf{}, sqq = vf{}, sxq = vf{};
  for (int i = 0; i < n; i += W) {
    const vf v = loadf(x + i), h = loadf(w + i), hv = h * v;
    const vf q = code(v, inverse, grid.minimum, splat(low), splat(high)), hq = h * q;
    one += h;
    sx += hv;
    sxx = madd(hv, v, sxx);
    sq += hq;
    sqq = madd(hq, q, sqq);
    sxq = madd(hv, q, sxq);
  }
  *out = {hsum(one), hsum(sx), hsum(sxx), hsum(sq), hsum(sqq), hsum(sxq)};
}

}  // namespace

extern const EncodeKernels DC_FOR_ISA(encode_kernels);
const EncodeKernels DC_FOR_ISA(encode_kernels) = {codes, error, sums};

}  // namespace dc
