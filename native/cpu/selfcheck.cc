// Kernels for AVX-512 are few people's to run: before they are taken into use, they are compared once (well under a
// millisecond) with those for AVX2.
#include <vector>

#include "blas.h"
#include "kernels/decode.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "view.h"

#if defined(__x86_64__)

namespace dc {

extern const ElementKernels element_kernels_avx2, element_kernels_avx512;
extern const DecodeKernels decode_kernels_avx2, decode_kernels_avx512;
extern const GemmKernels gemm_kernels_avx2, gemm_kernels_avx512;

namespace {

using Floats = std::vector<float>;

Floats noise(size_t n, uint32_t state) {
  Floats x(n);
  for (float& v : x) {
    state = state * 1664525 + 1013904223;
    v = float(int32_t(state)) * 0x1p-30f;
  }
  return x;
}
bool same(const Floats& a, const Floats& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (a[i] != b[i] && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return true;
}
bool close(const Floats& a, const Floats& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (!(std::fabs(a[i] - b[i]) <= 1e-4f)) return false;
  return true;
}

Floats product(const GemmKernels& kernel, int64_t m, int64_t n, int64_t k, int dtype) {
  const auto& load = element_kernels_avx2;
  std::vector<uint32_t> a(size_t(m * k)), b(size_t(n * k));  // room for any dtype
  load.store(a.data(), dtype, noise(a.size(), 1).data(), m * k);
  load.store(b.data(), dtype, noise(b.size(), 2).data(), n * k);
  const int64_t mp = (m + kernel.mr - 1) / kernel.mr * kernel.mr, np = (n + kernel.nr - 1) / kernel.nr * kernel.nr;
  Floats pa(size_t(mp * k)), pb(size_t(np * k)), c(size_t(m * n + 4 * n));
  kernel.pack(pa.data(), a.data(), dtype, k, 1, m, k, kernel.mr);
  kernel.pack(pb.data(), b.data(), dtype, 1, n, n, k, kernel.nr);
  kernel.block(c.data(), n, pa.data(), pb.data(), m, n, k, false);
  kernel.block(c.data(), n, pa.data(), pb.data(), m, n, k, true);
  Floats row(size_t(4 * k));
  load.load(row.data(), a.data(), dtype, 4 * k);
  kernel.dots(c.data() + m * n, n, row.data(), 4, b.data(), dtype, k, n, k);
  return c;
}

}  // namespace

bool avx512_agrees() {
  const auto &e2 = element_kernels_avx2, &e5 = element_kernels_avx512;
  for (int kind = DC_NEG; kind <= DC_IS_NONFINITE; kind++) {
    Floats a = noise(77, 3), b = a;
    e2.unary(a.data(), 77, kind, 0.5f, 0.25f);
    e5.unary(b.data(), 77, kind, 0.5f, 0.25f);
    if (!same(a, b)) return false;
  }
  for (int dtype : {DC_F32, DC_BF16, DC_F16}) {
    const Floats x = noise(77, 4);
    std::vector<uint32_t> s2(77), s5(77);
    e2.store(s2.data(), dtype, x.data(), 77);
    e5.store(s5.data(), dtype, x.data(), 77);
    Floats a(77), b(77);
    e2.load(a.data(), s2.data(), dtype, 77);
    e5.load(b.data(), s2.data(), dtype, 77);
    if (s2 != s5 || !same(a, b)) return false;
    if (!close(product(gemm_kernels_avx2, 31, 71, 83, dtype), product(gemm_kernels_avx512, 31, 71, 83, dtype))) return false;
  }
  Floats a = noise(77, 5), b = a;
  const double sum2 = e2.exp_sum(a.data(), 2, 1, 77), sum5 = e5.exp_sum(b.data(), 2, 1, 77);
  if (!same(a, b) || std::fabs(sum2 - sum5) > 1e-3) return false;
  std::vector<uint8_t> stored(512);
  const Floats from = noise(stored.size(), 6);
  for (size_t i = 0; i < stored.size(); i++) stored[i] = uint8_t(float_bits(from[i]) >> 8 & 0x3F);  // scales stay finite
  for (int encoding = 0; encoding <= DC_ENC_MXFP4; encoding++) {
    Floats u(512), v(512);
    decode_kernels_avx2.blocks(u.data(), stored.data(), encoding, 512 / block_shape(encoding).values);
    decode_kernels_avx512.blocks(v.data(), stored.data(), encoding, 512 / block_shape(encoding).values);
    if (!same(u, v)) return false;
  }
  return true;
}

}  // namespace dc

#endif
