// Codes <-> 32-bit words, and products with packed 4-bit weights.
#include "matrices.h"

#include <algorithm>
#include <vector>

using namespace dc;

namespace {

// Where the fields of a line of codes stand in its words: field i of a line begins at bit `bit(i)`.
struct Fields {
  int bits;
  int order;  // 0: little end first, 1: AWQ's interleave, 2: a dense stream, fields may cross words
  int64_t per;
  Fields(int64_t bits_, int64_t order_) : bits(int(bits_)), order(int(order_)), per(32 / bits_) {}
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
};

}  // namespace

extern "C" int dc_cpu_pack(dc_context* c, const dc_call* call) {
  const dc_tensor &wt = call->t[0], &ct = call->t[1];
  const Fields fields(call->i[0], call->i[3]);
  const uint32_t mask = (1u << fields.bits) - 1;
  const int64_t bias = call->i[1];
  const int axis = int(call->i[2]);
  if (fields.check(c)) return 1;
  const int64_t lines = ct.dim[1 - axis], n = ct.dim[axis], words = fields.words(n);
  if (wt.dim[axis] != words || wt.dim[1 - axis] != lines) return fail(c, "words do not fit codes");
  const int8_t* codes = data<int8_t>(ct);
  uint32_t* out = data<uint32_t>(wt);
  parallel_for(c, lines, 16, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> line(static_cast<size_t>(words));
    for (int64_t l = begin; l < end; l++) {
      std::fill(line.begin(), line.end(), 0);
      for (int64_t i = 0; i < n; i++) {
        const uint32_t field = uint32_t(codes[l * ct.stride[1 - axis] + i * ct.stride[axis]] + bias) & mask;
        const int64_t bit = fields.bit(i), shift = bit % 32;
        line[size_t(bit / 32)] |= field << shift;
        if (shift + fields.bits > 32) line[size_t(bit / 32 + 1)] |= field >> (32 - shift);
      }
      for (int64_t i = 0; i < words; i++) out[l * wt.stride[1 - axis] + i * wt.stride[axis]] = line[size_t(i)];
    }
  });
  return 0;
}

extern "C" int dc_cpu_unpack(dc_context* c, const dc_call* call) {
  const dc_tensor &ct = call->t[0], &wt = call->t[1];
  const Fields fields(call->i[0], call->i[3]);
  const uint32_t mask = (1u << fields.bits) - 1;
  const int64_t bias = call->i[1];
  const int axis = int(call->i[2]);
  if (fields.check(c)) return 1;
  const int64_t lines = ct.dim[1 - axis], n = ct.dim[axis];
  if (wt.dim[axis] < fields.words(n) || wt.dim[1 - axis] != lines) return fail(c, "words do not fit codes");
  int8_t* codes = data<int8_t>(ct);
  const uint32_t* in = data<uint32_t>(wt);
  parallel_for(c, lines, 16, [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; l++) {
      const uint32_t* line = in + l * wt.stride[1 - axis];
      for (int64_t i = 0; i < n; i++) {
        const int64_t bit = fields.bit(i), shift = bit % 32, step = wt.stride[axis];
        uint32_t field = line[bit / 32 * step] >> shift;
        if (shift + fields.bits > 32) field |= line[(bit / 32 + 1) * step] << (32 - shift);
        codes[l * ct.stride[1 - axis] + i * ct.stride[axis]] = int8_t(int64_t(field & mask) - bias);
      }
    }
  });
  return 0;
}
