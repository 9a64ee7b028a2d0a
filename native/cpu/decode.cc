// decode: stored blocks of GGUF files, FP8 and FP4 with block scales -> values.
#include "kernels/decode.h"

#include <algorithm>

#include "blas.h"
#include "view.h"

namespace dc {

extern const DecodeKernels decode_kernels_base;
#if defined(__x86_64__)
extern const DecodeKernels decode_kernels_avx2, decode_kernels_avx512;
#endif

const DecodeKernels& decode_kernels() {
#if defined(__x86_64__)
  static const DecodeKernels& chosen = !strcmp(dc_isa(), "base")   ? decode_kernels_base
                                       : !strcmp(dc_isa(), "avx2") ? decode_kernels_avx2
                                                                   : decode_kernels_avx512;
  return chosen;
#else
  return decode_kernels_base;
#endif
}

BlockShape block_shape(int encoding) {
  static const BlockShape shapes[] = {{32, 18},  {32, 20},   {32, 22},   {32, 24},   {32, 34}, {256, 84},
                                      {256, 110}, {256, 144}, {256, 176}, {256, 210}, {32, 18}, {32, 17}};
  return encoding >= 0 && encoding <= DC_ENC_MXFP4 ? shapes[encoding] : BlockShape{0, 0};
}

}  // namespace dc

using namespace dc;

namespace {

constexpr int64_t kChunk = 1024;  // a multiple of every block, and even

float scale_of(const dc_tensor& scale, int64_t r, int64_t k) {
  if (!present(scale)) return 1;
  const int64_t at = r * scale.stride[0] + k * scale.stride[1];
  if (scale.dtype == DC_U8) {  // E8M0: 2^(u - 127), 255 is NaN
    const uint32_t u = data<uint8_t>(scale)[at];
    return u == 255 ? NAN : u == 0 ? 0x1p-127f : bits_float(u << 23);
  }
  float value;
  load_strided(&value, scale, at, 1, 1);
  return value;
}

}  // namespace

extern "C" int dc_cpu_decode(dc_context* c, const dc_call* call) {
  const dc_tensor dst = aligned(call->t[0]);
  const dc_tensor &src = call->t[1], &scale = call->t[2];
  const int encoding = int(call->i[0]);
  const int64_t block_rows = call->i[1], block_columns = call->i[2], rows = row_count(dst), width = dst.dim[3];
  if (count(dst) == 0) return 0;
  const BlockShape shape = block_shape(encoding);
  if (shape.values == 0 && encoding != DC_ENC_F8_E4M3 && encoding != DC_ENC_F4_E2M1)
    return fail(c, "unknown encoding %d", encoding);
  if (shape.values && width % shape.values != 0)
    return fail(c, "rows of %ld values in blocks of %d", long(width), shape.values);
  const int64_t pitch = shape.values                  ? width / shape.values * shape.bytes
                        : encoding == DC_ENC_F8_E4M3 ? width
                                                     : (width + 1) / 2;
  if (count(src) != rows * pitch)
    return fail(c, "%ld bytes stored, but %ld rows of %ld values take %ld", long(count(src)), long(rows), long(width),
                long(rows * pitch));
  if (present(scale)) {
    if (shape.values) return fail(c, "encoding %d holds its own scales", encoding);
    if (block_rows < 1 || block_columns < 1 || scale.dim[0] * block_rows < rows || scale.dim[1] * block_columns < width)
      return fail(c, "scales [%ld, %ld] of blocks %ld x %ld for [%ld, %ld]", long(scale.dim[0]), long(scale.dim[1]),
                  long(block_rows), long(block_columns), long(rows), long(width));
  }
  const auto& kernels = decode_kernels();
  parallel_for(c, rows, row_grain(width), [&](int64_t begin, int64_t end) {
    float x[kChunk];
    for (int64_t r = begin; r < end; r++) {
      const uint8_t* row = data<uint8_t>(src) + r * pitch;
      const int64_t at = row_at(dst, r);
      for (int64_t i = 0; i < width; i += kChunk) {
        const int64_t n = std::min(kChunk, width - i);
        if (shape.values)
          kernels.blocks(x, row + i / shape.values * shape.bytes, encoding, n / shape.values);
        else if (encoding == DC_ENC_F8_E4M3)
          kernels.f8_e4m3(x, row + i, n);
        else
          kernels.f4_e2m1(x, row + i / 2, n);
        if (present(scale))
          for (int64_t j = 0; j < n;) {
            const int64_t block = (i + j) / block_columns, m = std::min(n, (block + 1) * block_columns - i) - j;
            element_kernels().scale(x + j, scale_of(scale, r / block_rows, block), m);
            j += m;
          }
        store_strided(dst, at + i * dst.stride[3], dst.stride[3], x, n);
      }
    }
  });
  return 0;
}
