// What the attention ops share: which keys a query sees, and heads as matrices.
#pragma once
#include <algorithm>

#include "view.h"

namespace dc {

// Query s stands at key position s + offset and sees the keys [first, last).
struct Mask {
  bool causal;
  int64_t window, offset;
  void keys(int64_t s, int64_t length, int64_t* first, int64_t* last) const {
    *last = causal ? std::min(length, s + offset + 1) : length;
    *first = window > 0 ? s + offset - window + 1 : 0;
    *last = std::max<int64_t>(*last, 0);
    *first = std::min(std::max<int64_t>(*first, 0), *last);
  }
};

// Number of keys of sequence b: lengths[b], at most `most`.
static inline int64_t key_count(const dc_tensor& lengths, int64_t b, int64_t most) {
  return present(lengths) ? std::min<int64_t>(most, std::max(0, data<int32_t>(lengths)[b * lengths.stride[0]])) : most;
}

// Rows [first, first + n) of one head of x [B,S,H,D], as a matrix [n, D].
static inline dc_tensor head_rows(const dc_tensor& x, int64_t b, int64_t h, int64_t first, int64_t n) {
  dc_tensor m{};
  m.data = element(x, b * x.stride[0] + h * x.stride[2] + first * x.stride[1]);
  m.dtype = x.dtype;
  m.rank = 2;
  m.dim[0] = n, m.dim[1] = x.dim[3], m.dim[2] = m.dim[3] = 1;
  m.stride[0] = x.stride[1], m.stride[1] = x.stride[3];
  return m;
}

}  // namespace dc
