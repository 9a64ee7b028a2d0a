// decode: stored blocks of GGUF files, FP8 and FP4 with block scales -> values. A thread per value; the arithmetic is
// that of native/cpu/kernels/decode.cc, without fused multiplications, so that the bits are the same.
#include "cuda.cuh"

namespace dc {
namespace {

__constant__ float iq4_table[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
__constant__ float mxfp4_table[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
__constant__ float f4_table[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6};

__device__ __forceinline__ float half_at(const uint8_t* p) { return __half2float(__ushort_as_half(uint16_t(p[0] | p[1] << 8))); }
__device__ __forceinline__ uint32_t word_at(const uint8_t* p) { return p[0] | p[1] << 8 | p[2] << 16 | uint32_t(p[3]) << 24; }

// Value i of a block of 32: scale [, minimum] [, fifth bits], 16 bytes of halves.
__device__ float value_32(const uint8_t* b, int i, bool minimum, bool fifth) {
  const float d = half_at(b), m = minimum ? half_at(b + 2) : 0;
  const uint8_t* rest = b + (minimum ? 4 : 2);
  const uint8_t* q = rest + (fifth ? 4 : 0);
  int v = i < 16 ? q[i] & 15 : q[i - 16] >> 4;
  if (fifth) v |= (word_at(rest) >> i & 1) << 4;
  return minimum ? __fadd_rn(__fmul_rn(d, float(v)), m) : __fmul_rn(d, float(v - (fifth ? 16 : 8)));
}

__device__ float block_value(const uint8_t* b, int encoding, int i) {
  switch (encoding) {
    case DC_ENC_Q4_0: return value_32(b, i, false, false);
    case DC_ENC_Q4_1: return value_32(b, i, true, false);
    case DC_ENC_Q5_0: return value_32(b, i, false, true);
    case DC_ENC_Q5_1: return value_32(b, i, true, true);
    case DC_ENC_Q8_0: return __fmul_rn(float(int8_t(b[2 + i])), half_at(b));
    case DC_ENC_Q2_K: {
      const int g = i / 16;
      const float dl = __fmul_rn(half_at(b + 80), float(b[g] & 15)), ml = __fmul_rn(half_at(b + 82), float(b[g] >> 4));
      const int v = b[16 + g / 8 * 32 + g % 2 * 16 + i % 16] >> (g % 8 / 2 * 2) & 3;
      return __fsub_rn(__fmul_rn(dl, float(v)), ml);
    }
    case DC_ENC_Q3_K: {
      const int g = i / 16;
      const uint8_t* scales = b + 96;
      const int low = scales[g % 8] >> (g / 8 * 4) & 15, high = scales[8 + g % 4] >> (g / 4 * 2) & 3;
      const float dl = __fmul_rn(half_at(b + 108), float((low | high << 4) - 32));
      const int v = b[32 + g / 8 * 32 + g % 2 * 16 + i % 16] >> (g % 8 / 2 * 2) & 3, bit = b[g % 2 * 16 + i % 16] >> (g / 2) & 1;
      return __fmul_rn(dl, float(v - (bit ? 0 : 4)));
    }
    case DC_ENC_Q4_K:
    case DC_ENC_Q5_K: {
      const bool fifth = encoding == DC_ENC_Q5_K;
      const int g = i / 32, k = i % 32;
      const uint8_t* s = b + 4;
      const int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
      const int minimum = g < 4 ? s[g + 4] & 63 : (s[g + 4] >> 4) | (s[g] >> 6) << 4;
      int v = b[(fifth ? 48 : 16) + g / 2 * 32 + k] >> (g % 2 * 4) & 15;
      if (fifth) v |= (b[16 + k] >> g & 1) << 4;
      return __fsub_rn(__fmul_rn(__fmul_rn(half_at(b), float(scale)), float(v)), __fmul_rn(half_at(b + 2), float(minimum)));
    }
    case DC_ENC_Q6_K: {
      const int g = i / 16, k = i % 16;
      const float dl = __fmul_rn(half_at(b + 208), float(int8_t(b[192 + g])));
      const int low = b[g / 8 * 64 + g % 4 * 16 + k] >> (g % 8 / 4 * 4) & 15, high = b[128 + g / 8 * 32 + g % 2 * 16 + k] >> (g % 8 / 2 * 2) & 3;
      return __fmul_rn(dl, float((low | high << 4) - 32));
    }
    case DC_ENC_IQ4_NL: return __fmul_rn(half_at(b), iq4_table[i < 16 ? b[2 + i] & 15 : b[2 + i - 16] >> 4]);
    case DC_ENC_MXFP4: {
      const float d = __uint_as_float(b[0] < 2 ? 0x00200000u << b[0] : uint32_t(b[0] - 1) << 23);
      return __fmul_rn(d, mxfp4_table[i < 16 ? b[1 + i] & 15 : b[1 + i - 16] >> 4]);
    }
  }
  return 0;
}

__global__ void decode_values(dc_tensor dst, const uint8_t* src, dc_tensor scale, int encoding, int64_t block_rows, int64_t block_columns, int64_t rows, int64_t width, int64_t pitch, int values, int bytes) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < rows * width; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t r = i / width, k = i % width;
    const uint8_t* row = src + r * pitch;
    float v;
    if (values) {
      v = block_value(row + k / values * bytes, encoding, int(k % values));
    } else if (encoding == DC_ENC_F8_E4M3) {
      const uint32_t u = row[k], sign = (u & 0x80) << 24;
      v = (u & 0x7F) == 0x7F ? __uint_as_float(sign | 0x7FC00000) : __fmul_rn(__uint_as_float(sign | (u & 0x7F) << 20), 0x1p120f);
    } else {
      v = f4_table[row[k / 2] >> (k % 2 * 4) & 15];
    }
    if (scale.data) {
      const int64_t at = r / block_rows * scale.stride[0] + k / block_columns * scale.stride[1];
      float s;
      if (scale.dtype == DC_U8) {
        const uint32_t u = static_cast<const uint8_t*>(scale.data)[at];
        s = u == 255 ? NAN : u == 0 ? 0x1p-127f : __uint_as_float(u << 23);
      } else {
        s = load(scale.data, scale.dtype, at);
      }
      v = __fmul_rn(v, s);
    }
    store(dst.data, dst.dtype, offset_of(dst, i), v);
  }
}

}  // namespace
}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_decode(dc_context* c, const dc_call* call) {
  const dc_tensor &dst = call->t[0], &src = call->t[1], &scale = call->t[2];
  const int encoding = int(call->i[0]);
  static const int shapes[][2] = {{32, 18}, {32, 20}, {32, 22}, {32, 24}, {32, 34}, {256, 84}, {256, 110}, {256, 144}, {256, 176}, {256, 210}, {32, 18}, {32, 17}};
  const int64_t width = dst.dim[dst.rank - 1], rows = width ? count(dst) / width : 0;
  if (count(dst) == 0) return 0;
  const bool blocks = encoding >= 0 && encoding <= DC_ENC_MXFP4;
  if (!blocks && encoding != DC_ENC_F8_E4M3 && encoding != DC_ENC_F4_E2M1) return fail(c, "unknown encoding %d", encoding);
  const int values = blocks ? shapes[encoding][0] : 0, bytes = blocks ? shapes[encoding][1] : 0;
  if (blocks && width % values != 0) return fail(c, "rows of %lld values in blocks of %d", (long long)width, values);
  const int64_t pitch = blocks ? width / values * bytes : encoding == DC_ENC_F8_E4M3 ? width : (width + 1) / 2;
  if (count(src) != rows * pitch) return fail(c, "%lld bytes stored, but %lld rows of %lld values take %lld", (long long)count(src), (long long)rows, (long long)width, (long long)(rows * pitch));
  if (present(scale) && (blocks || call->i[1] < 1 || call->i[2] < 1 || scale.dim[0] * call->i[1] < rows || scale.dim[1] * call->i[2] < width))
    return fail(c, "scales [%lld, %lld] do not fit [%lld, %lld]", (long long)scale.dim[0], (long long)scale.dim[1], (long long)rows, (long long)width);
  decode_values<<<grid_for(c, rows * width, 256), 256, 0, c->stream>>>(dst, data<uint8_t>(src), scale, encoding, call->i[1], call->i[2], rows, width, pitch, values, bytes);
  return launched(c, "decode");
}
