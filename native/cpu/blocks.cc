#include "blocks.h"

#include <algorithm>

namespace dc {

const BlockFormat* block_format(int64_t encoding) {
  static const BlockFormat q4_0{32, 18, 1, -8, 7, false, 0, 0}, q4_1{32, 20, 1, 0, 15, true, 0, 0},
      q5_0{32, 22, 1, -16, 15, false, 0, 0}, q5_1{32, 24, 1, 0, 31, true, 0, 0}, q8_0{32, 34, 1, -127, 127, false, 0, 0},
      q2_k{256, 84, 16, 0, 3, true, 0, 15}, q3_k{256, 110, 16, -4, 3, false, -32, 31},
      q4_k{256, 144, 8, 0, 15, true, 0, 63}, q5_k{256, 176, 8, 0, 31, true, 0, 63},
      q6_k{256, 210, 16, -32, 31, false, -128, 127};
  switch (encoding) {
    case DC_ENC_Q4_0: return &q4_0;
    case DC_ENC_Q4_1: return &q4_1;
    case DC_ENC_Q5_0: return &q5_0;
    case DC_ENC_Q5_1: return &q5_1;
    case DC_ENC_Q8_0: return &q8_0;
    case DC_ENC_Q2_K: return &q2_k;
    case DC_ENC_Q3_K: return &q3_k;
    case DC_ENC_Q4_K: return &q4_k;
    case DC_ENC_Q5_K: return &q5_k;
    case DC_ENC_Q6_K: return &q6_k;
    default: return nullptr;
  }
}

namespace {

void put_half(uint8_t* p, float value) {
  const uint16_t h = float_to_f16(value);
  std::memcpy(p, &h, 2);
}
float get_half(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return f16_to_float(h);
}

}  // namespace

void write_head(int64_t encoding, uint8_t* b, const BlockHead& head) {
  switch (encoding) {
    case DC_ENC_Q4_0:
    case DC_ENC_Q5_0:
    case DC_ENC_Q8_0: put_half(b, head.d); break;
    case DC_ENC_Q4_1:
    case DC_ENC_Q5_1:
      put_half(b, head.d);
      put_half(b + 2, -head.dmin);
      break;
    case DC_ENC_Q2_K:
      for (int g = 0; g < 16; g++) b[g] = uint8_t(head.scale[g] | head.minimum[g] << 4);
      put_half(b + 80, head.d);
      put_half(b + 82, head.dmin);
      break;
    case DC_ENC_Q3_K:
      std::fill(b + 96, b + 108, uint8_t(0));
      for (int g = 0; g < 16; g++) {
        const int v = head.scale[g] + 32;
        b[96 + g % 8] |= uint8_t((v & 15) << (g / 8 * 4));
        b[104 + g % 4] |= uint8_t((v >> 4) << (g / 4 * 2));
      }
      put_half(b + 108, head.d);
      break;
    case DC_ENC_Q4_K:
    case DC_ENC_Q5_K: {
      put_half(b, head.d);
      put_half(b + 2, head.dmin);
      uint8_t* s = b + 4;
      for (int g = 0; g < 4; g++) {
        const int scale = head.scale[g + 4], minimum = head.minimum[g + 4];
        s[g] = uint8_t(head.scale[g] | (scale >> 4) << 6);
        s[g + 4] = uint8_t(head.minimum[g] | (minimum >> 4) << 6);
        s[g + 8] = uint8_t((scale & 15) | (minimum & 15) << 4);
      }
      break;
    }
    case DC_ENC_Q6_K:
      for (int g = 0; g < 16; g++) b[192 + g] = uint8_t(int8_t(head.scale[g]));
      put_half(b + 208, head.d);
      break;
  }
}

BlockHead read_head(int64_t encoding, const uint8_t* b) {
  BlockHead head;
  switch (encoding) {
    case DC_ENC_Q4_0:
    case DC_ENC_Q5_0:
    case DC_ENC_Q8_0: head.d = get_half(b); break;
    case DC_ENC_Q4_1:
    case DC_ENC_Q5_1:
      head.d = get_half(b);
      head.dmin = -get_half(b + 2);
      break;
    case DC_ENC_Q2_K:
      for (int g = 0; g < 16; g++) head.scale[g] = b[g] & 15, head.minimum[g] = b[g] >> 4;
      head.d = get_half(b + 80);
      head.dmin = get_half(b + 82);
      break;
    case DC_ENC_Q3_K:
      for (int g = 0; g < 16; g++)
        head.scale[g] = ((b[96 + g % 8] >> (g / 8 * 4) & 15) | (b[104 + g % 4] >> (g / 4 * 2) & 3) << 4) - 32;
      head.d = get_half(b + 108);
      break;
    case DC_ENC_Q4_K:
    case DC_ENC_Q5_K: {
      head.d = get_half(b);
      head.dmin = get_half(b + 2);
      const uint8_t* s = b + 4;
      for (int g = 0; g < 4; g++) {
        head.scale[g] = s[g] & 63, head.minimum[g] = s[g + 4] & 63;
        head.scale[g + 4] = (s[g + 8] & 15) | (s[g] >> 6) << 4;
        head.minimum[g + 4] = (s[g + 8] >> 4) | (s[g + 4] >> 6) << 4;
      }
      break;
    }
    case DC_ENC_Q6_K:
      for (int g = 0; g < 16; g++) head.scale[g] = int8_t(b[192 + g]);
      head.d = get_half(b + 208);
      break;
  }
  return head;
}

void write_codes(int64_t encoding, uint8_t* b, const int8_t* codes) {
  switch (encoding) {
    case DC_ENC_Q4_0:
      for (int i = 0; i < 16; i++) b[2 + i] = uint8_t((codes[i] + 8) | (codes[i + 16] + 8) << 4);
      break;
    case DC_ENC_Q4_1:
      for (int i = 0; i < 16; i++) b[4 + i] = uint8_t(codes[i] | codes[i + 16] << 4);
      break;
    case DC_ENC_Q5_0:
    case DC_ENC_Q5_1: {
      const int middle = encoding == DC_ENC_Q5_0 ? 16 : 0;
      uint8_t* rest = b + (encoding == DC_ENC_Q5_0 ? 2 : 4);
      uint32_t fifth = 0;
      for (int i = 0; i < 32; i++) fifth |= uint32_t((codes[i] + middle) >> 4) << i;
      std::memcpy(rest, &fifth, 4);
      for (int i = 0; i < 16; i++)
        rest[4 + i] = uint8_t(((codes[i] + middle) & 15) | ((codes[i + 16] + middle) & 15) << 4);
      break;
    }
    case DC_ENC_Q8_0: std::memcpy(b + 2, codes, 32); break;
    case DC_ENC_Q2_K:
      std::fill(b + 16, b + 80, uint8_t(0));
      for (int g = 0; g < 16; g++)
        for (int i = 0; i < 16; i++)
          b[16 + g / 8 * 32 + g % 2 * 16 + i] |= uint8_t(codes[g * 16 + i] << (g % 8 / 2 * 2));
      break;
    case DC_ENC_Q3_K:
      std::fill(b, b + 96, uint8_t(0));
      for (int g = 0; g < 16; g++)
        for (int i = 0; i < 16; i++) {
          const int v = codes[g * 16 + i] + 4;
          b[g % 2 * 16 + i] |= uint8_t((v >> 2) << (g / 2));
          b[32 + g / 8 * 32 + g % 2 * 16 + i] |= uint8_t((v & 3) << (g % 8 / 2 * 2));
        }
      break;
    case DC_ENC_Q4_K:
    case DC_ENC_Q5_K: {
      uint8_t* q = b + (encoding == DC_ENC_Q5_K ? 48 : 16);
      std::fill(b + 16, q + 128, uint8_t(0));
      for (int g = 0; g < 8; g++)
        for (int i = 0; i < 32; i++) {
          const int v = codes[g * 32 + i];
          q[g / 2 * 32 + i] |= uint8_t((v & 15) << (g % 2 * 4));
          if (encoding == DC_ENC_Q5_K) b[16 + i] |= uint8_t((v >> 4) << g);
        }
      break;
    }
    case DC_ENC_Q6_K:
      std::fill(b, b + 192, uint8_t(0));
      for (int g = 0; g < 16; g++)
        for (int i = 0; i < 16; i++) {
          const int v = codes[g * 16 + i] + 32;
          b[g / 8 * 64 + g % 4 * 16 + i] |= uint8_t((v & 15) << (g % 8 / 4 * 4));
          b[128 + g / 8 * 32 + g % 2 * 16 + i] |= uint8_t((v >> 4) << (g % 8 / 2 * 2));
        }
      break;
  }
}

}  // namespace dc
