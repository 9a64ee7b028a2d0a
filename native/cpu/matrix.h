// Matrix products for the CPU ops.
#pragma once
#include "cpu.h"

namespace dc {

// C [m,n] = alpha A [m,k] B [k,n] + beta C + bias [n]: float views of rank 2, any strides.
struct Product {
  dc_tensor c, a, b;
  int64_t m = 0, n = 0, k = 0;
  double alpha = 1, beta = 0;
  const float* bias = nullptr;

  void finish(float* out, int64_t ldc, int64_t m0, int64_t n0, int64_t i0, int64_t j0, int64_t rows, int64_t columns,
              bool direct) const;
};
// On the context's threads, or (NULL) on the calling one. Every element of C is summed in the same order whatever the
// number of threads and rows.
void multiply(dc_context* c, const Product& x);

// Memory that a thread keeps between calls; contents undefined.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  float* take(size_t floats);

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace dc
