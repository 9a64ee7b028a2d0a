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
  // Weights of attention's scores x[first, last) among n: e^(factor x - most) in bf16, 0 for the other scores and up to
  // whole pieces of 32, for which x has room; pieces stand `stride` apart. First `most` is raised to the scores' maximum
  // (NaN if there is nothing but NaN and -infinity) and `total`, the sum of all weights so far, brought there; returns the
  // factor for whatever else was summed so far.
  float (*weigh)(uint16_t* weights, int64_t stride, float* x, int64_t n, int64_t first, int64_t last, float factor,
                 double* most, double* total);
  void (*silu_bf16)(uint16_t* y, const uint16_t* gate, const uint16_t* up, int64_t n);  // y = silu(gate) up
};

// The table of the instruction set in use (dc_isa).
const ElementKernels& element_kernels();

}  // namespace dc
