// The tile instructions of AMX in plain loops (palette 1, all tiles 16 x 64 bytes), for tests: what kernels/gemm_amx.cc
// does with them is then tested on any processor. Included where the compiler's own are switched off.
#pragma once
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace dc {
namespace {

struct SoftTile {
  alignas(64) unsigned char row[16][64];
};
static thread_local SoftTile soft_tile[8];
static thread_local bool soft_configured = false;

inline void soft_loadconfig(const void* config) {
  unsigned char bytes[64];
  memcpy(bytes, config, sizeof bytes);
  soft_configured = bytes[0] == 1;
  for (int t = 0; t < 8; t++) soft_configured = soft_configured && bytes[16 + 2 * t] == 64 && bytes[17 + 2 * t] == 0 && bytes[48 + t] == 16;
}
inline void soft_release() { soft_configured = false; }
inline SoftTile& soft_use(int t) {
  if (!soft_configured) __builtin_trap();  // as the processor does
  return soft_tile[t];
}
inline void soft_zero(int t) { memset(&soft_use(t), 0, sizeof(SoftTile)); }
inline void soft_load(int t, const void* from, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy(soft_use(t).row[r], static_cast<const char*>(from) + r * stride, 64);
}
inline void soft_store(int t, void* to, int64_t stride) {
  for (int r = 0; r < 16; r++) memcpy(static_cast<char*>(to) + r * stride, soft_use(t).row[r], 64);
}
// Intel's manual, TDPBF16PS: the even and the odd positions of 32 are summed apart, then added to c.
inline void soft_dpbf16ps(int c, int a, int b) {
  for (int m = 0; m < 16; m++) {
    float* sum = reinterpret_cast<float*>(soft_use(c).row[m]);
    vf even[16 / W] = {}, odd[16 / W] = {};
    for (int p = 0; p < 16; p++) {
      uint32_t pair;
      memcpy(&pair, soft_use(a).row[m] + 4 * p, 4);
      const vf low = (vf)(vu{} + (pair << 16)), high = (vf)(vu{} + (pair & 0xFFFF0000));
      for (int v = 0; v < 16 / W; v++) {
        const vu x = vload<vu>(soft_use(b).row[p] + 4 * W * v);
        even[v] = madd(low, (vf)(x << 16), even[v]);
        odd[v] = madd(high, (vf)(x & 0xFFFF0000), odd[v]);
      }
    }
    for (int v = 0; v < 16 / W; v++) storef(sum + W * v, loadf(sum + W * v) + (even[v] + odd[v]));
  }
}

}  // namespace
}  // namespace dc

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig soft_loadconfig
#define _tile_release soft_release
#define _tile_zero soft_zero
#define _tile_loadd soft_load
#define _tile_stored soft_store
#define _tile_dpbf16ps soft_dpbf16ps
