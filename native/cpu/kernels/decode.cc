// GGML blocks (ggml-common.h, ggml-quants.c), FP8 and FP4 -> fp32. Compiled once per instruction set.
#include "decode.h"

#include "../cpu.h"
#include "vec.h"

namespace dc {
namespace {

inline float half(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, 2);
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  return f16_to_float(h);
#endif
}

// 32 values: scale d (f16) [, minimum m (f16)] [, fifth bits], 16 bytes: value i in the low half of byte i, value
// i + 16 in the high half.
template <bool kMinimum, bool kFifth>
void decode_32(float* y, const uint8_t* b) {
  const float d = half(b), m = kMinimum ? half(b + 2) : 0;
  const uint8_t* rest = b + (kMinimum ? 4 : 2);
  uint32_t fifth = 0;
  if (kFifth) memcpy(&fifth, rest, 4);
  const uint8_t* q = rest + (kFifth ? 4 : 0);
  const int middle = kMinimum ? 0 : kFifth ? 16 : 8;
  for (int i = 0; i < 16; i++) {
    const int low = (q[i] & 15) | (kFifth ? (fifth >> i & 1) << 4 : 0);
    const int high = (q[i] >> 4) | (kFifth ? (fifth >> (i + 16) & 1) << 4 : 0);
    y[i] = kMinimum ? d * float(low) + m : d * float(low - middle);
    y[i + 16] = kMinimum ? d * float(high) + m : d * float(high - middle);
  }
}

void decode_q8_0(float* y, const uint8_t* b) {
  const float d = half(b);
  for (int i = 0; i < 32; i++) y[i] = float(int8_t(b[2 + i])) * d;
}

// scales[16] (4 bits scale, 4 bits minimum), 64 bytes of 2-bit values, d, dmin.
void decode_q2_k(float* y, const uint8_t* b) {
  const uint8_t *scales = b, *q = b + 16;
  const float d = half(b + 80), dmin = half(b + 82);
  for (int g = 0; g < 16; g++) {
    const float dl = d * float(scales[g] & 15), ml = dmin * float(scales[g] >> 4);
    const uint8_t* from = q + g / 8 * 32 + g % 2 * 16;
    const int shift = g % 8 / 2 * 2;
    for (int i = 0; i < 16; i++) y[g * 16 + i] = dl * float(from[i] >> shift & 3) - ml;
  }
}

// 32 bytes of third bits, 64 bytes of 2-bit values, 16 scales of 6 bits in 12 bytes, d.
void decode_q3_k(float* y, const uint8_t* b) {
  const uint8_t *mask = b, *q = b + 32, *scales = b + 96;
  const float d = half(b + 108);
  for (int g = 0; g < 16; g++) {
    const int low = scales[g % 8] >> (g / 8 * 4) & 15, high = scales[8 + g % 4] >> (g / 4 * 2) & 3;
    const float dl = d * float((low | high << 4) - 32);
    const uint8_t *from = q + g / 8 * 32 + g % 2 * 16, *bits = mask + g % 2 * 16;
    const int shift = g % 8 / 2 * 2, bit = g / 2;
    for (int i = 0; i < 16; i++) y[g * 16 + i] = dl * float(int(from[i] >> shift & 3) - ((bits[i] >> bit & 1) ? 0 : 4));
  }
}

// d, dmin, 8 scales and minima of 6 bits in 12 bytes [, 32 bytes of fifth bits], 128 bytes of 4-bit values.
template <bool kFifth>
void decode_q45_k(float* y, const uint8_t* b) {
  const float d = half(b), dmin = half(b + 2);
  const uint8_t *s = b + 4, *fifth = b + 16, *q = b + (kFifth ? 48 : 16);
  for (int g = 0; g < 8; g++) {
    const int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
    const int minimum = g < 4 ? s[g + 4] & 63 : (s[g + 4] >> 4) | (s[g] >> 6) << 4;
    const float dl = d * float(scale), ml = dmin * float(minimum);
    const uint8_t* from = q + g / 2 * 32;
    for (int i = 0; i < 32; i++) {
      int v = from[i] >> (g % 2 * 4) & 15;
      if (kFifth) v |= (fifth[i] >> g & 1) << 4;
      y[g * 32 + i] = dl * float(v) - ml;
    }
  }
}

// 128 bytes of low halves, 64 bytes of upper two bits, 16 scales i8, d.
void decode_q6_k(float* y, const uint8_t* b) {
  const uint8_t *low = b, *high = b + 128;
  const float d = half(b + 208);
  for (int g = 0; g < 16; g++) {
    const float dl = d * float(int8_t(b[192 + g]));
    const uint8_t *l = low + g / 8 * 64 + g % 4 * 16, *h = high + g / 8 * 32 + g % 2 * 16;
    const int shift = g % 8 / 4 * 4, bits = g % 8 / 2 * 2;
    for (int i = 0; i < 16; i++) y[g * 16 + i] = dl * float(int((l[i] >> shift & 15) | (h[i] >> bits & 3) << 4) - 32);
  }
}

void decode_table(float* y, float d, const uint8_t* q, const float table[16]) {
  for (int i = 0; i < 16; i++) {
    y[i] = d * table[q[i] & 15];
    y[i + 16] = d * table[q[i] >> 4];
  }
}
void decode_iq4_nl(float* y, const uint8_t* b) {
  static const float table[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  decode_table(y, half(b), b + 2, table);
}
// E8M0 exponent, 16 bytes of E2M1. The table holds doubled values, the scale is halved: exact.
void decode_mxfp4(float* y, const uint8_t* b) {
  static const float table[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  decode_table(y, bits_float(b[0] < 2 ? uint32_t(0x00200000) << b[0] : uint32_t(b[0] - 1) << 23), b + 1, table);
}

void decode_blocks(float* dst, const uint8_t* src, int encoding, int64_t blocks) {
  void (*decode)(float*, const uint8_t*) = nullptr;
  switch (encoding) {
    case DC_ENC_Q4_0: decode = decode_32<false, false>; break;
    case DC_ENC_Q4_1: decode = decode_32<true, false>; break;
    case DC_ENC_Q5_0: decode = decode_32<false, true>; break;
    case DC_ENC_Q5_1: decode = decode_32<true, true>; break;
    case DC_ENC_Q8_0: decode = decode_q8_0; break;
    case DC_ENC_Q2_K: decode = decode_q2_k; break;
    case DC_ENC_Q3_K: decode = decode_q3_k; break;
    case DC_ENC_Q4_K: decode = decode_q45_k<false>; break;
    case DC_ENC_Q5_K: decode = decode_q45_k<true>; break;
    case DC_ENC_Q6_K: decode = decode_q6_k; break;
    case DC_ENC_IQ4_NL: decode = decode_iq4_nl; break;
    case DC_ENC_MXFP4: decode = decode_mxfp4; break;
  }
  const BlockShape shape = block_shape(encoding);
  for (int64_t i = 0; i < blocks; i++) decode(dst + i * shape.values, src + i * shape.bytes);
}

// sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7F is NaN. The bits moved to an fp32's place, times 2^120.
void decode_f8(float* dst, const uint8_t* src, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t u = src[i];
    const uint32_t moved = (u & 0x80) << 24 | (u & 0x7F) << 20;
    const uint32_t value = float_bits(bits_float(moved) * 0x1p120f);
    dst[i] = bits_float((u & 0x7F) == 0x7F ? (u & 0x80) << 24 | 0x7FC00000 : value);
  }
}
void decode_f4(float* dst, const uint8_t* src, int64_t n) {
  static const float table[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6};
  for (int64_t i = 0; i < n; i++) dst[i] = table[src[i / 2] >> (i % 2 * 4) & 15];
}

}  // namespace

extern const DecodeKernels DC_FOR_ISA(decode_kernels);
const DecodeKernels DC_FOR_ISA(decode_kernels) = {decode_blocks, decode_f8, decode_f4};

}  // namespace dc
