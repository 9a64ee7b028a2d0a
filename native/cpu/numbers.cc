// Single numbers of any dtype, strided rows, and the choice of row kernels.
#include "blas.h"
#include "view.h"

namespace dc {

extern const ElementKernels element_kernels_base;
#if defined(__x86_64__)
extern const ElementKernels element_kernels_avx2, element_kernels_avx512;
#endif

const ElementKernels& element_kernels() {
#if defined(__x86_64__)
  static const ElementKernels& chosen = !strcmp(dc_isa(), "base")   ? element_kernels_base
                                        : !strcmp(dc_isa(), "avx2") ? element_kernels_avx2
                                                                    : element_kernels_avx512;
  return chosen;
#else
  return element_kernels_base;
#endif
}

static float f8_to_float(uint8_t b, int exponent_bits) {
  const int mantissa_bits = 7 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int e = (b & 0x7F) >> mantissa_bits, m = b & ((1 << mantissa_bits) - 1);
  float v;
  if (exponent_bits == 5 && e == 31)
    v = m ? NAN : INFINITY;
  else if (exponent_bits == 4 && (b & 0x7F) == 0x7F)
    v = NAN;
  else
    v = e ? std::ldexp(float(m + (1 << mantissa_bits)), e - bias - mantissa_bits)
          : std::ldexp(float(m), 1 - bias - mantissa_bits);
  return b & 0x80 ? -v : v;
}
// Round to nearest even. E4M3 has no infinity: finite values saturate at 448, infinities become NaN. E5M2 overflows
// to infinity.
static uint8_t double_to_f8(double x, int exponent_bits) {
  const int mantissa_bits = 7 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return uint8_t(sign | 0x7F);
  if (std::isinf(x)) return uint8_t(sign | (exponent_bits == 5 ? 0x7C : 0x7F));
  const double a = std::fabs(x);
  int e = 0;
  std::frexp(a, &e);  // a in [2^(e-1), 2^e)
  e = a == 0 || e - 1 < 1 - bias ? 1 - bias : e - 1;
  const int64_t code = int64_t(std::nearbyint(std::ldexp(a, mantissa_bits - e))) + (int64_t(e + bias - 1) << mantissa_bits);
  const int64_t most = exponent_bits == 5 ? 0x7C : 0x7E;
  return uint8_t(sign | (code > most ? most : code));
}
// To float with the last bit set where it is inexact ("round to odd"): a second rounding to bf16 or f16 is then right.
static float odd_float(double x) {
  const float f = float(x);
  if (double(f) == x || std::isnan(x) || std::isinf(x)) return f;
  uint32_t u = float_bits(f);
  const bool away = std::fabs(double(f)) > std::fabs(x);
  if (!(u & 1)) u = away ? u - 1 : u + 1;
  return bits_float(u);
}

double read_number(const void* p, int dtype) {
  switch (dtype) {
    case DC_F32: return *static_cast<const float*>(p);
    case DC_BF16: return bf16_to_float(*static_cast<const uint16_t*>(p));
    case DC_F16: return f16_to_float(*static_cast<const uint16_t*>(p));
    case DC_F64: return *static_cast<const double*>(p);
    case DC_I8: return *static_cast<const int8_t*>(p);
    case DC_U8: return *static_cast<const uint8_t*>(p);
    case DC_I16: return *static_cast<const int16_t*>(p);
    case DC_U16: return *static_cast<const uint16_t*>(p);
    case DC_I32: return *static_cast<const int32_t*>(p);
    case DC_U32: return *static_cast<const uint32_t*>(p);
    case DC_I64: return double(*static_cast<const int64_t*>(p));
    case DC_U64: return double(*static_cast<const uint64_t*>(p));
    case DC_BOOL: return *static_cast<const uint8_t*>(p) != 0;
    case DC_F8_E4M3: return f8_to_float(*static_cast<const uint8_t*>(p), 4);
    default: return f8_to_float(*static_cast<const uint8_t*>(p), 5);
  }
}

template <class T>
static void write_integer(void* p, double v, double low, double above) {
  v = std::nearbyint(v);
  *static_cast<T*>(p) = std::isnan(v)   ? T(0)
                        : v < low       ? std::numeric_limits<T>::min()
                        : v >= above    ? std::numeric_limits<T>::max()
                                        : T(v);
}
void write_number(void* p, int dtype, double v) {
  switch (dtype) {
    case DC_F32: *static_cast<float*>(p) = float(v); return;
    case DC_BF16: *static_cast<uint16_t*>(p) = float_to_bf16(odd_float(v)); return;
    case DC_F16: *static_cast<uint16_t*>(p) = float_to_f16(odd_float(v)); return;
    case DC_F64: *static_cast<double*>(p) = v; return;
    case DC_I8: return write_integer<int8_t>(p, v, -128, 128);
    case DC_U8: return write_integer<uint8_t>(p, v, 0, 256);
    case DC_I16: return write_integer<int16_t>(p, v, -32768, 32768);
    case DC_U16: return write_integer<uint16_t>(p, v, 0, 65536);
    case DC_I32: return write_integer<int32_t>(p, v, -2147483648.0, 2147483648.0);
    case DC_U32: return write_integer<uint32_t>(p, v, 0, 4294967296.0);
    case DC_I64: return write_integer<int64_t>(p, v, -9223372036854775808.0, 9223372036854775808.0);
    case DC_U64: return write_integer<uint64_t>(p, v, 0, 18446744073709551616.0);
    case DC_BOOL: *static_cast<uint8_t*>(p) = v != 0; return;
    case DC_F8_E4M3: *static_cast<uint8_t*>(p) = double_to_f8(v, 4); return;
    default: *static_cast<uint8_t*>(p) = double_to_f8(v, 5); return;
  }
}

void load_strided(float* dst, const dc_tensor& t, int64_t offset, int64_t stride, int64_t n) {
  const char* src = element(t, offset);
  if (is_float(t.dtype) && (stride == 1 || n == 1)) return element_kernels().load(dst, src, t.dtype, n);
  switch (t.dtype) {
    case DC_F32:
      for (int64_t i = 0; i < n; i++) dst[i] = reinterpret_cast<const float*>(src)[i * stride];
      return;
    case DC_BF16:
      for (int64_t i = 0; i < n; i++) dst[i] = bf16_to_float(reinterpret_cast<const uint16_t*>(src)[i * stride]);
      return;
    case DC_F16:
      for (int64_t i = 0; i < n; i++) dst[i] = f16_to_float(reinterpret_cast<const uint16_t*>(src)[i * stride]);
      return;
    default: {
      const int64_t step = stride * int64_t(dtype_size(t.dtype));
      for (int64_t i = 0; i < n; i++) dst[i] = float(read_number(src + i * step, t.dtype));
    }
  }
}
void store_strided(const dc_tensor& t, int64_t offset, int64_t stride, const float* src, int64_t n) {
  char* dst = element(t, offset);
  if (is_float(t.dtype) && (stride == 1 || n == 1)) return element_kernels().store(dst, t.dtype, src, n);
  switch (t.dtype) {
    case DC_F32:
      for (int64_t i = 0; i < n; i++) reinterpret_cast<float*>(dst)[i * stride] = src[i];
      return;
    case DC_BF16:
      for (int64_t i = 0; i < n; i++) reinterpret_cast<uint16_t*>(dst)[i * stride] = float_to_bf16(src[i]);
      return;
    case DC_F16:
      for (int64_t i = 0; i < n; i++) reinterpret_cast<uint16_t*>(dst)[i * stride] = float_to_f16(src[i]);
      return;
    default: {
      const int64_t step = stride * int64_t(dtype_size(t.dtype));
      for (int64_t i = 0; i < n; i++) write_number(dst + i * step, t.dtype, src[i]);
    }
  }
}

}  // namespace dc
