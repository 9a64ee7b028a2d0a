// Kernels for AVX-512 and AMX are few people's to run: before they are taken into use, they are compared once (well
// under a millisecond) with those for AVX2.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
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
bool close(const Floats& a, const Floats& b, float bound = 1e-4f) {
  for (size_t i = 0; i < a.size(); i++)
    if (!(std::fabs(a[i] - b[i]) <= bound)) return false;
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
  // Rounded to bf16, from other last bits: a step apart at most.
  std::vector<uint16_t> gate(77), h2(128), h5(128);
  e2.store(gate.data(), DC_BF16, noise(77, 7).data(), 77);
  e2.silu_bf16(h2.data(), gate.data(), gate.data(), 77);
  e5.silu_bf16(h5.data(), gate.data(), gate.data(), 77);
  double most2 = -INFINITY, most5 = -INFINITY, total2 = 0, total5 = 0;
  Floats x2 = noise(96, 8), x5 = x2;
  e2.weigh(h2.data() + 77, 0, x2.data(), 32, 3, 30, 2, &most2, &total2);
  e5.weigh(h5.data() + 77, 0, x5.data(), 32, 3, 30, 2, &most5, &total5);
  for (size_t i = 0; i < h2.size(); i++) {
    const float u = bf16_to_float(h2[i]), v = bf16_to_float(h5[i]);
    if (!(std::fabs(u - v) <= 0.01f * std::fabs(u))) return false;
  }
  if (most2 != most5 || !(std::fabs(total2 - total5) <= 1e-4)) return false;
  std::vector<uint8_t> stored(1024);  // 512 values of any encoding: up to 34 bytes for 32
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

namespace {

// AMX is the processor's and the kernel's to allow: 8 KB more of registers a thread.
bool amx_allowed() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d & (1u << 24), bf16 = d & (1u << 22);
  return tile && bf16 && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

enum Output { kSums, kRounded, kTransposed };  // fp32; bf16, as it is or transposed

// Twice a product of operands lying along their lines or across, with edges in every dimension.
Floats packed_product(const Panels& kernel, int dtype, int64_t m, int64_t n, int64_t k, bool across, Output output) {
  std::vector<uint32_t> a(size_t(m * k)), b(size_t(n * k));  // room for any dtype
  element_kernels_avx2.store(a.data(), dtype, noise(a.size(), 7).data(), m * k);
  element_kernels_avx2.store(b.data(), dtype, noise(b.size(), 8).data(), n * k);
  auto up = [](int64_t x, int64_t step) { return (x + step - 1) / step * step; };
  const int64_t line = up(k, kernel.step);
  std::vector<float> pa(size_t(up(m, kernel.mr) * line)), pb(size_t(up(n, kernel.nr) * line));  // more than enough
  kernel.pack_a(pa.data(), a.data(), dtype, across ? 1 : k, across ? m : 1, m, k);
  kernel.pack_b(pb.data(), b.data(), dtype, across ? 1 : k, across ? n : 1, n, k);
  Floats c(static_cast<size_t>(m * n));
  kernel.block(c.data(), n, pa.data(), pb.data(), m, n, line, false);
  if (output == kSums) {
    kernel.block(c.data(), n, pa.data(), pb.data(), m, n, line, true);
    return c;
  }
  const int64_t wide = up(n, kernel.nr), ld = output == kTransposed ? m : n;
  std::vector<uint16_t> half(c.size());
  for (int64_t i = 0; i < m; i += kernel.mr) {
    const char* panel = reinterpret_cast<const char*>(pa.data()) + i * line * kernel.bytes;
    Floats before(static_cast<size_t>(kernel.mr * wide));
    for (int64_t r = i; r < std::min(m, i + kernel.mr); r++) memcpy(&before[size_t((r - i) * wide)], &c[size_t(r * n)], size_t(n) * 4);
    kernel.block_bf16(half.data() + (output == kTransposed ? i : i * n), ld, output == kTransposed, before.data(), wide, panel, pb.data(),
                      std::min<int64_t>(m - i, kernel.mr), n, line);
  }
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) c[size_t(i * n + j)] = bf16_to_float(half[size_t(output == kTransposed ? j * m + i : i * n + j)]);
  return c;
}

}  // namespace

extern const Panels panels_amx, split_panels_amx, pair_panels_amx, panels_tiles, split_panels_tiles, pair_panels_tiles;

namespace {

// The panels of a unit that agree with the plain ones, else NULL.
const Panels* checked(const Panels& panels, int dtype, float bound) {
  for (bool across : {false, true}) {
    const Floats expected = packed_product(float_panels(), dtype, 71, 83, 77, across, kSums);
    for (Output output : {kSums, kRounded, kTransposed}) {
      if (output != kSums && !panels.block_bf16) continue;
      if (!close(packed_product(panels, dtype, 71, 83, 77, across, output), expected, output == kSums ? bound : 0.25f)) return nullptr;
    }
  }
  return &panels;
}

}  // namespace

const Panels* bf16_panels() {
  static const Panels* const panels = [] {
    const char* wish = getenv("DEEPSEEK_CONVERT_ISA");  // for tests
    const auto wished = [&](const char* name) { return wish && !strcmp(wish, name); };
    if (!strcmp(dc_isa(), "avx512")) {
      const Panels* found = amx_allowed() && !wished("avx512") ? checked(panels_amx, DC_BF16, 1e-4f) : nullptr;
      if (!found && __builtin_cpu_supports("avx512bf16") && !wished("avx512")) found = checked(pair_panels_amx, DC_BF16, 1e-4f);
      return found;
    }
    if (strcmp(dc_isa(), "avx2")) return static_cast<const Panels*>(nullptr);
    return wished("tiles")   ? checked(panels_tiles, DC_BF16, 1e-4f)
           : wished("pairs") ? checked(pair_panels_tiles, DC_BF16, 1e-4f)
                             : nullptr;
  }();
  return panels;
}

const Panels* split_panels() {
  static const Panels* const panels =
      bf16_panels() == &panels_amx     ? checked(split_panels_amx, DC_F32, 1e-3f)
      : bf16_panels() == &panels_tiles ? checked(split_panels_tiles, DC_F32, 1e-3f)
                                       : nullptr;
  return panels;
}

}  // namespace dc

#else

const dc::Panels* dc::bf16_panels() { return nullptr; }
const dc::Panels* dc::split_panels() { return nullptr; }

#endif
