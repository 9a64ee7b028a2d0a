// Stored blocks -> fp32, one table per instruction set (kernels/decode.cc).
#pragma once
#include <cstdint>

namespace dc {

struct DecodeKernels {
  // `blocks` blocks of a GGML encoding (see block_shape); the same arithmetic in the same order as ggml: exact bits.
  void (*blocks)(float* dst, const uint8_t* src, int encoding, int64_t blocks);
  void (*f8_e4m3)(float* dst, const uint8_t* src, int64_t n);
  // Two values a byte, the lower half first; `src` begins with an even value.
  void (*f4_e2m1)(float* dst, const uint8_t* src, int64_t n);
};

struct BlockShape {
  int values, bytes;  // 0: not a GGML encoding
};
BlockShape block_shape(int encoding);

const DecodeKernels& decode_kernels();

}  // namespace dc
