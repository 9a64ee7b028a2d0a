// Codes <-> fields of 32-bit words.
#include <algorithm>
#include <vector>

#include "matrices.h"

using namespace dc;

namespace {

// Where the fields of a line of codes stand in its words: field i of a line begins at bit `bit(i)`.
struct Fields {
  int bits;
  int order;  // 0: little end first, 1: AWQ's interleave, 2: a dense stream, fields may cross words
  int64_t per;
  Fields(int64_t bits_, int64_t order_) : bits(int(bits_)), order(int(order_)), per(bits_ > 0 ? 32 / bits_ : 1) {}
  int64_t words(int64_t n) const { return order == 2 ? (n * bits + 31) / 32 : (n + per - 1) / per; }
  int64_t bit(int64_t i) const {
    if (order == 2) return i * bits;
    static const int place[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // column 8 c + i goes to nibble place[i]
    const int64_t within = i % per;
    return i / per * 32 + (order == 1 ? place[within] : within) * bits;
  }
  int check(dc_context* c) const {
    if (bits < 1 || bits > 8 || order < 0 || order > 2) return fail(c, "bits %d, order %d", bits, order);
    if (order == 1 && bits != 4) return fail(c, "AWQ's order is for 4 bits, got %d", bits);
    return 0;
  }
  bool whole() const { return order == 0 || (order == 2 && 32 % bits == 0); }  // fields in order, none crosses
};

constexpr uint64_t kBytes = 0x0101010101010101;

// Eight bytes' low halves -> a word, in order; or interleaved, even ones first.
uint32_t join(uint64_t x) {
  x = (x | x >> 4) & 0x00FF00FF00FF00FF;
  x = (x | x >> 8) & 0x0000FFFF0000FFFF;
  return uint32_t(x | x >> 16);
}
uint32_t join_awq(uint64_t x) {
  auto gather = [](uint64_t t) {
    t &= 0x000F000F000F000F;
    t = (t | t >> 12) & 0x000000FF000000FF;
    return uint32_t(t | t >> 24) & 0xFFFF;
  };
  return gather(x) | gather(x >> 8) << 16;
}
uint64_t split(uint32_t word) {
  uint64_t x = word;
  x = (x | x << 16) & 0x0000FFFF0000FFFF;
  x = (x | x << 8) & 0x00FF00FF00FF00FF;
  return (x | x << 4) & 0x0F0F0F0F0F0F0F0F;
}

}  // namespace

extern "C" int dc_cpu_pack(dc_context* c, const dc_call* call) {
  const dc_tensor &wt = call->t[0], &ct = call->t[1];
  const Fields fields(call->i[0], call->i[3]);
  if (fields.check(c)) return 1;
  const uint32_t mask = (1u << fields.bits) - 1;
  const int64_t bias = call->i[1];
  const int axis = int(call->i[2]);
  const int64_t lines = ct.dim[1 - axis], n = ct.dim[axis], words = fields.words(n);
  if (wt.dim[axis] != words || wt.dim[1 - axis] != lines) return fail(c, "words do not fit codes");
  const int8_t* codes = data<int8_t>(ct);
  uint32_t* out = data<uint32_t>(wt);
  const int64_t line = ct.stride[1 - axis], step = ct.stride[axis], word_line = wt.stride[1 - axis],
                word_step = wt.stride[axis];
  if (axis == 0 && fields.whole() && line == 1 && word_line == 1) {  // whole rows of words at a time
    parallel_for(c, words, 4, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; w++) {
        uint32_t* row = out + w * word_step;
        std::fill(row, row + lines, 0);
        for (int64_t i = w * fields.per; i < std::min((w + 1) * fields.per, n); i++) {
          const int8_t* from = codes + i * step;
          const int shift = int(i % fields.per) * fields.bits;
          for (int64_t l = 0; l < lines; l++) row[l] |= (uint32_t(from[l] + int32_t(bias)) & mask) << shift;
        }
      }
    });
    return 0;
  }
  const bool nibbles = fields.bits == 4 && step == 1 && word_step == 1;
  parallel_for(c, lines, 16, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> buffer(static_cast<size_t>(words));
    for (int64_t l = begin; l < end; l++) {
      const int8_t* from = codes + l * line;
      uint32_t* to = nibbles ? out + l * word_line : buffer.data();
      int64_t i = 0;
      if (nibbles) {
        const uint64_t add = kBytes * uint64_t(bias & 15);
        for (; i + 8 <= n; i += 8) {
          uint64_t x;
          std::memcpy(&x, from + i, 8);
          x = ((x & kBytes * 15) + add) & kBytes * 15;
          to[i / 8] = fields.order == 1 ? join_awq(x) : join(x);
        }
      }
      if (i < n) std::fill(to + i / fields.per, to + words, 0);
      for (; i < n; i++) {
        const uint32_t field = uint32_t(from[i * step] + bias) & mask;
        const int64_t bit = fields.bit(i), shift = bit % 32;
        to[bit / 32] |= field << shift;
        if (shift + fields.bits > 32) to[bit / 32 + 1] |= field >> (32 - shift);
      }
      if (!nibbles)
        for (int64_t w = 0; w < words; w++) out[l * word_line + w * word_step] = buffer[size_t(w)];
    }
  });
  return 0;
}

extern "C" int dc_cpu_unpack(dc_context* c, const dc_call* call) {
  const dc_tensor &ct = call->t[0], &wt = call->t[1];
  const Fields fields(call->i[0], call->i[3]);
  if (fields.check(c)) return 1;
  const uint32_t mask = (1u << fields.bits) - 1;
  const int64_t bias = call->i[1];
  const int axis = int(call->i[2]);
  const int64_t lines = ct.dim[1 - axis], n = ct.dim[axis];
  if (wt.dim[axis] < fields.words(n) || wt.dim[1 - axis] != lines) return fail(c, "words do not fit codes");
  int8_t* codes = data<int8_t>(ct);
  const uint32_t* in = data<uint32_t>(wt);
  const int64_t line = ct.stride[1 - axis], step = ct.stride[axis], word_line = wt.stride[1 - axis],
                word_step = wt.stride[axis];
  if (axis == 0 && fields.whole() && line == 1 && word_line == 1) {
    parallel_for(c, n, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const uint32_t* row = in + i / fields.per * word_step;
        const int shift = int(i % fields.per) * fields.bits;
        for (int64_t l = 0; l < lines; l++)
          codes[i * step + l] = int8_t(int32_t(row[l] >> shift & mask) - int32_t(bias));
      }
    });
    return 0;
  }
  const bool nibbles =
      fields.bits == 4 && fields.order != 1 && step == 1 && word_step == 1 && bias >= 0 && bias < 128;
  parallel_for(c, lines, 16, [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; l++) {
      const uint32_t* from = in + l * word_line;
      int8_t* to = codes + l * line;
      int64_t i = 0;
      if (nibbles) {
        const uint64_t subtract = kBytes * uint64_t(bias & 127), sign = kBytes * 128;
        for (; i + 8 <= n; i += 8) {
          const uint64_t x = ((split(from[i / 8]) | sign) - subtract) ^ sign;
          std::memcpy(to + i, &x, 8);
        }
      }
      for (; i < n; i++) {
        const int64_t bit = fields.bit(i), shift = bit % 32;
        uint32_t field = from[bit / 32 * word_step] >> shift;
        if (shift + fields.bits > 32) field |= from[(bit / 32 + 1) * word_step] << (32 - shift);
        to[i * step] = int8_t(int64_t(field & mask) - bias);
      }
    }
  });
  return 0;
}
