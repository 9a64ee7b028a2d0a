// Training: fake quantization with learned step sizes, AdamW.
#include "cuda.cuh"

namespace dc {
namespace {

// A warp per row and group. Straight through the rounding; LSQ gradients (Esser et al. 2020).
__global__ void fake_quant_groups(dc_tensor y, dc_tensor w, const float* scale, const float* zero, int64_t rows, int64_t K, int64_t groups, int64_t group, float low, float high) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < rows * K; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t n = i / K, j = i % K, g = n * groups + j / group;
    const float s = scale[g], z = zero ? zero[g] : 0.f;
    const float q = fminf(fmaxf(rintf(__fadd_rn(__fdiv_rn(load(w.data, w.dtype, n * w.stride[0] + j), s), z)), low), high) + 0.f;  // no -0
    store(y.data, y.dtype, n * y.stride[0] + j, s * (q - z));
  }
}
__global__ void fake_quant_grad(dc_tensor dw, float* dscale, float* dzero, dc_tensor dy, dc_tensor w, const float* scale, const float* zero, int64_t rows, int64_t K, int64_t groups, int64_t group, float low, float high) {
  const int lane = threadIdx.x & 31;
  const int64_t item = blockIdx.x * int64_t(blockDim.x / 32) + (threadIdx.x >> 5);
  if (item >= rows * groups) return;
  const int64_t n = item / groups, g = item % groups, end = min((g + 1) * group, K);
  const float s = scale[item], z = zero ? zero[item] : 0.f;
  float ds = 0, dz = 0;
  for (int64_t j = g * group + lane; j < end; j += 32) {
    const float v = __fadd_rn(__fdiv_rn(load(w.data, w.dtype, n * w.stride[0] + j), s), z), r = rintf(v), d = load(dy.data, dy.dtype, n * dy.stride[0] + j);
    const bool inside = r >= low && r <= high;
    const float q = fminf(fmaxf(r, low), high);
    store(dw.data, dw.dtype, n * dw.stride[0] + j, inside ? d : 0.f);
    ds += d * (inside ? q - v : q - z);  // d s(q - z) / d s
    dz += inside ? 0.f : -d * s;
  }
  ds = warp_sum(ds), dz = warp_sum(dz);
  if (lane == 0) {
    dscale[item] = ds;
    if (dzero) dzero[item] = dz;
  }
}

__global__ void adamw_step(float* p, float* m, float* v, dc_tensor g, const float* clip, int64_t n, float lr, float b1, float b2, float eps, float decay, float c1, float c2) {
  const float factor = clip ? *clip : 1.f;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const float grad = factor * load(g.data, g.dtype, i);
    m[i] = b1 * m[i] + (1 - b1) * grad;
    v[i] = b2 * v[i] + (1 - b2) * grad * grad;
    p[i] = p[i] * (1 - lr * decay) - lr * (m[i] / c1) / (sqrtf(v[i] / c2) + eps);
  }
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_fake_quant(dc_context* c, const dc_call* call) {
  const dc_tensor &y = call->t[0], &w = call->t[1], &scale = call->t[2], &zero = call->t[3];
  const int64_t n = count(w), groups = scale.dim[1];
  if (n == 0) return 0;
  fake_quant_groups<<<grid_for(c, n, 256), 256, 0, c->stream>>>(y, w, data<float>(scale), data<float>(zero), w.dim[0], w.dim[1], groups, call->i[2], float(call->i[0]), float(call->i[1]));
  return launched(c, "fake_quant");
}
extern "C" int dc_cuda_fake_quant_backward(dc_context* c, const dc_call* call) {
  const dc_tensor &dw = call->t[0], &dscale = call->t[1], &dzero = call->t[2], &dy = call->t[3], &w = call->t[4], &scale = call->t[5], &zero = call->t[6];
  const int64_t groups = scale.dim[1], items = w.dim[0] * groups;
  if (count(w) == 0) return 0;
  fake_quant_grad<<<unsigned(ceil_div(items, 4)), 128, 0, c->stream>>>(dw, data<float>(dscale), data<float>(dzero), dy, w, data<float>(scale), data<float>(zero), w.dim[0], w.dim[1], groups, call->i[2], float(call->i[0]), float(call->i[1]));
  return launched(c, "fake_quant_backward");
}
extern "C" int dc_cuda_adamw(dc_context* c, const dc_call* call) {
  const dc_tensor &p = call->t[0], &m = call->t[1], &v = call->t[2], &g = call->t[3], &clip = call->t[4];
  const int64_t n = count(p);
  if (n == 0) return 0;
  if (!contiguous(p) || !contiguous(m) || !contiguous(v) || !contiguous(g)) return fail(c, "adamw: contiguous tensors expected");
  const double step = double(call->i[0]), b1 = call->f[1], b2 = call->f[2];
  adamw_step<<<grid_for(c, n, 256), 256, 0, c->stream>>>(data<float>(p), data<float>(m), data<float>(v), g, data<float>(clip), n, float(call->f[0]), float(b1), float(b2), float(call->f[3]), float(call->f[4]), float(1 - pow(b1, step)), float(1 - pow(b2, step)));
  return launched(c, "adamw");
}
