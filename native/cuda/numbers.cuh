// Single numbers of any dtype: the device twin of native/cpu/numbers.cc, rounding once and saturating alike.
#pragma once
#include "cuda.cuh"

namespace dc {

__device__ inline bool is_integer(int dtype) { return dtype >= DC_I8 && dtype <= DC_BOOL; }

__device__ inline double f8_value(uint8_t b, int exponent_bits) {
  const int mantissa_bits = 7 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int e = (b & 0x7F) >> mantissa_bits, m = b & ((1 << mantissa_bits) - 1);
  double v;
  if (exponent_bits == 5 && e == 31) v = m ? NAN : INFINITY;
  else if (exponent_bits == 4 && (b & 0x7F) == 0x7F) v = NAN;
  else v = e ? ldexp(double(m + (1 << mantissa_bits)), e - bias - mantissa_bits) : ldexp(double(m), 1 - bias - mantissa_bits);
  return b & 0x80 ? -v : v;
}
// Nearest even. E4M3 has no infinity: finite values saturate at 448, infinities become NaN; E5M2 overflows to infinity.
__device__ inline uint8_t f8_code(double x, int exponent_bits) {
  const int mantissa_bits = 7 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const uint8_t sign = signbit(x) ? 0x80 : 0;
  if (isnan(x)) return sign | 0x7F;
  if (isinf(x)) return sign | (exponent_bits == 5 ? 0x7C : 0x7F);
  const double a = fabs(x);
  int e = 0;
  frexp(a, &e);
  e = a == 0 || e - 1 < 1 - bias ? 1 - bias : e - 1;
  const int64_t code = int64_t(rint(ldexp(a, mantissa_bits - e))) + (int64_t(e + bias - 1) << mantissa_bits);
  const int64_t most = exponent_bits == 5 ? 0x7C : 0x7E;
  return uint8_t(sign | (code > most ? most : code));
}
// To float, round to odd: a second rounding to bf16 or f16 is then right.
__device__ inline float odd_float(double x) {
  const float f = float(x);
  if (double(f) == x || isnan(x) || isinf(x)) return f;
  uint32_t u = __float_as_uint(f);
  if (!(u & 1)) u = fabs(double(f)) > fabs(x) ? u - 1 : u + 1;
  return __uint_as_float(u);
}

__device__ inline double read_number(const void* p, int dtype, int64_t i) {
  switch (dtype) {
    case DC_F32: return static_cast<const float*>(p)[i];
    case DC_BF16: return to_float(static_cast<const bf16*>(p)[i]);
    case DC_F16: return to_float(static_cast<const f16*>(p)[i]);
    case DC_F64: return static_cast<const double*>(p)[i];
    case DC_I8: return static_cast<const int8_t*>(p)[i];
    case DC_U8: return static_cast<const uint8_t*>(p)[i];
    case DC_I16: return static_cast<const int16_t*>(p)[i];
    case DC_U16: return static_cast<const uint16_t*>(p)[i];
    case DC_I32: return static_cast<const int32_t*>(p)[i];
    case DC_U32: return static_cast<const uint32_t*>(p)[i];
    case DC_I64: return double(static_cast<const int64_t*>(p)[i]);
    case DC_U64: return double(static_cast<const uint64_t*>(p)[i]);
    case DC_BOOL: return static_cast<const uint8_t*>(p)[i] != 0;
    case DC_F8_E4M3: return f8_value(static_cast<const uint8_t*>(p)[i], 4);
    default: return f8_value(static_cast<const uint8_t*>(p)[i], 5);
  }
}

// A 64-bit integer keeps all its bits on the way to another integer; towards a float its lowest bits are folded into
// one sticky bit, so that the one rounding is right.
struct Integer {
  bool negative;
  uint64_t magnitude;
};
__device__ inline Integer read_integer(const void* p, int dtype, int64_t i) {
  if (dtype == DC_U64) return {false, static_cast<const uint64_t*>(p)[i]};
  const int64_t v = dtype == DC_I64 ? static_cast<const int64_t*>(p)[i] : int64_t(read_number(p, dtype, i));
  return {v < 0, v < 0 ? ~uint64_t(v) + 1 : uint64_t(v)};
}
__device__ inline double sticky_double(Integer x) {
  uint64_t m = x.magnitude;
  if (m >> 54) m = (m & ~uint64_t(0x3FF)) | ((m & 0x3FF) ? 0x400 : 0);
  return x.negative ? -double(m) : double(m);
}
// Whether the value had to be saturated.
__device__ inline bool write_integer(void* p, int dtype, int64_t i, Integer x) {
  if (dtype == DC_BOOL) {
    static_cast<uint8_t*>(p)[i] = x.magnitude != 0;
    return false;
  }
  const int bytes = dtype == DC_I8 || dtype == DC_U8 ? 1 : dtype == DC_I16 || dtype == DC_U16 ? 2 : dtype == DC_I32 || dtype == DC_U32 ? 4 : 8, bits = bytes * 8;
  const bool is_signed = dtype == DC_I8 || dtype == DC_I16 || dtype == DC_I32 || dtype == DC_I64;
  const uint64_t high = is_signed ? (uint64_t(1) << (bits - 1)) - 1 : bits == 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1;
  const uint64_t most = x.negative ? (is_signed ? high + 1 : 0) : high;
  const bool saturated = x.magnitude > most;
  const uint64_t magnitude = saturated ? most : x.magnitude, value = x.negative ? ~magnitude + 1 : magnitude;
  switch (bytes) {
    case 1: static_cast<uint8_t*>(p)[i] = uint8_t(value); break;
    case 2: static_cast<uint16_t*>(p)[i] = uint16_t(value); break;
    case 4: static_cast<uint32_t*>(p)[i] = uint32_t(value); break;
    default: static_cast<uint64_t*>(p)[i] = value;
  }
  return saturated;
}
// Round to nearest even; a NaN becomes 0. Returns whether a finite value did not fit.
__device__ inline bool write_rounded(void* p, int dtype, int64_t i, double v) {
  if (dtype == DC_BOOL) {
    static_cast<uint8_t*>(p)[i] = v != 0;
    return false;
  }
  const double r = rint(v), a = fabs(r);
  const Integer x{r < 0, isnan(v) ? 0 : a >= 18446744073709551616.0 ? ~uint64_t(0) : uint64_t(a)};
  const bool saturated = write_integer(p, dtype, i, x) || a >= 18446744073709551616.0;
  return saturated && isfinite(v);
}
// Returns whether a finite value became infinite or saturated.
__device__ inline bool write_number(void* p, int dtype, int64_t i, double v) {
  switch (dtype) {
    case DC_F32: static_cast<float*>(p)[i] = float(v); return isfinite(v) && !isfinite(float(v));
    case DC_BF16: {
      const bf16 y = from_float<bf16>(odd_float(v));
      static_cast<bf16*>(p)[i] = y;
      return isfinite(v) && !isfinite(to_float(y));
    }
    case DC_F16: {
      const f16 y = from_float<f16>(odd_float(v));
      static_cast<f16*>(p)[i] = y;
      return isfinite(v) && !isfinite(to_float(y));
    }
    case DC_F64: static_cast<double*>(p)[i] = v; return false;
    case DC_F8_E4M3: static_cast<uint8_t*>(p)[i] = f8_code(v, 4); return isfinite(v) && fabs(v) > 464;
    case DC_F8_E5M2: {
      const uint8_t y = f8_code(v, 5);
      static_cast<uint8_t*>(p)[i] = y;
      return isfinite(v) && (y & 0x7F) == 0x7C;
    }
    default: return write_rounded(p, dtype, i, v);
  }
}

}  // namespace dc
