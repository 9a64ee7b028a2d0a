// What the CPU ops share: the context with its thread pool, errors, views, number formats.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "backend.h"

namespace dc {

class ThreadPool;

}  // namespace dc

struct dc_context {
  dc::ThreadPool* pool;
  int threads;
  std::string error;
  const struct dc_blas* blas;  // OpenBLAS when it was found, else NULL
};

// collective.cc
extern "C" {
dc_group* dc_cpu_join(dc_context* const* ranks, int n, char* error, size_t error_bytes);
void dc_cpu_part(dc_group*);
int dc_cpu_collective(dc_group*, int kind, const dc_tensor* const* x, int tensors, char* error, size_t error_bytes);
}

namespace dc {

// Runs body(begin, end) over [0, n) in pieces of at least `grain`, on the context's threads; returns when all are done.
// Pieces are fixed by n, grain and the thread count alone, so results that depend on them are reproducible. Without a
// context all of it runs on the calling thread.
void parallel_for(dc_context* c, int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

int fail(dc_context* c, const char* format, ...) __attribute__((format(printf, 2, 3)));

static inline bool present(const dc_tensor& t) { return t.data != nullptr; }
static inline int64_t count(const dc_tensor& t) { return t.dim[0] * t.dim[1] * t.dim[2] * t.dim[3]; }
template <class T>
static inline T* data(const dc_tensor& t) {
  return static_cast<T*>(t.data);
}
static inline size_t dtype_size(int dtype) {
  static const uint8_t size[] = {4, 2, 2, 8, 1, 1, 2, 2, 4, 4, 8, 8, 1, 1, 1};
  return size[dtype];
}

// --- number formats; conversions to narrower ones round to nearest even. Static: kernels/ compiles them once per
// instruction set, and the linker must not mix those copies ---
static inline float bits_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t float_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
static inline float bf16_to_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }
static inline uint16_t float_to_bf16(float f) {
  uint32_t u = float_bits(f);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return uint16_t((u >> 16) | 0x40);  // NaN stays NaN
  return uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}
static inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, body = h & 0x7FFF;
  if (body >= 0x7C00) return bits_float(sign | 0x7F800000 | ((body & 0x3FF) << 13));
  if (body < 0x400) return bits_float(sign | float_bits(float(body) * 5.9604644775390625e-8f));  // 2^-24
  return bits_float(sign | ((body << 13) + 0x38000000));
}
static inline uint16_t float_to_f16(float f) {
  const uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000;
  const uint32_t a = u & 0x7FFFFFFF;
  if (a > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (a >= 0x477FF000) return uint16_t(sign | 0x7C00);  // rounds to infinity
  if (a < 0x38800000) {                                 // subnormal: let the adder round
    const float magic = bits_float(0x3F000000);         // 0.5
    return uint16_t(sign | (float_bits(bits_float(a) + magic) - 0x3F000000));
  }
  return uint16_t(sign | ((a + 0xC8000FFF + ((a >> 13) & 1)) >> 13));
}

}  // namespace dc
