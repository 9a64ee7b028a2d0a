// Row kernels, one table per instruction set (elementwise.cc). All rows are contiguous fp32 unless said otherwise.
#pragma once
#include <cstdint>

namespace dc {

struct ElementKernels {
  // Contiguous f32, bf16 or f16 <-> fp32, round to nearest even.
  void (*load)(float* dst, const void* src, int dtype, int64_t n);
  void (*store)(void* dst, int dtype, const float* src, int64_t n);
  // x = f(x): kinds of dc_unary.
  void (*unary)(float* x, int64_t n, int kind, float a, float b);
  // x = f'(x) for the activations; false: no rule for this kind.
  bool (*slope)(float* x, int64_t n, int kind);
  // y = a (kind) alpha b: kinds of dc_binary.
  void (*binary)(float* y, const float* a, const float* b, int64_t n, int kind, float alpha);
  void (*axpy)(float* y, float a, const float* x, int64_t n);  // y += a x
  void (*scale)(float* x, float a, int64_t n);                 // x *= a
  void (*multiply)(float* x, const float* y, int64_t n);       // x *= y
  float (*dot)(const float* a, const float* b, int64_t n);
  float (*max)(const float* x, int64_t n);  // -infinity when n is 0; NaNs are passed over
  // x = e^(scale x - shift); returns their sum.
  double (*exp_sum)(float* x, float scale, float shift, int64_t n);
  double (*sum)(const float* x, int64_t n);
  double (*sum_squares)(const float* x, int64_t n);
  // Of two distributions: out = {Jensen-Shannon divergence in nats, p q, p p, q q}.
  void (*divergence)(const float* p, const float* q, int64_t n, double out[4]);
};

// The table of the instruction set in use (dc_isa).
const ElementKernels& element_kernels();

}  // namespace dc
