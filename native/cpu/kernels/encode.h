// Searches on one group of a GGML block: x, w of 16 or 32 values and their weights. One table per instruction set.
#pragma once
#include <cstdint>

namespace dc {

// value = scale code - minimum, code in low..high.
struct GroupGrid {
  float scale, minimum;
};
struct GroupSums {  // of w times ...
  double one, x, xx, q, qq, xq;
};

struct EncodeKernels {
  // Codes of x on a grid; a scale of 0 gives the code nearest 0.
  void (*codes)(const float* x, int n, GroupGrid grid, float low, float high, float* codes);
  // sum w (x - value of its code)^2
  float (*error)(const float* x, const float* w, int n, GroupGrid grid, float low, float high);
  // Sums for least squares with the codes of a grid.
  void (*sums)(const float* x, const float* w, int n, GroupGrid grid, float low, float high, GroupSums* sums);
};

const EncodeKernels& encode_kernels();

}  // namespace dc
