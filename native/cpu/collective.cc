// Several CPU devices of one process as one group: what several GPUs do through NCCL, in shared memory.
#include <algorithm>
#include <vector>

#include "cpu.h"

struct dc_group {
  std::vector<dc_context*> ranks;
};

namespace {

float load(const dc_tensor& t, int64_t i) {
  return t.dtype == DC_F32 ? dc::data<float>(t)[i] : dc::bf16_to_float(dc::data<uint16_t>(t)[i]);
}
void store(const dc_tensor& t, int64_t i, float value) {
  if (t.dtype == DC_F32) dc::data<float>(t)[i] = value;
  else dc::data<uint16_t>(t)[i] = dc::float_to_bf16(value);
}

}  // namespace

extern "C" dc_group* dc_cpu_join(dc_context* const* ranks, int n, char*, size_t) {
  return new dc_group{std::vector<dc_context*>(ranks, ranks + n)};
}
extern "C" void dc_cpu_part(dc_group* group) { delete group; }

extern "C" int dc_cpu_collective(dc_group* group, int kind, const dc_tensor* const* x, int tensors, char*, size_t) {
  const int n = int(group->ranks.size());
  for (int k = 0; k < tensors; k++) {
    const int64_t size = dc::count(x[0][k]), part = (size + n - 1) / n;
    if (size == 0) continue;
    dc::parallel_for(group->ranks[0], size, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int owner = int(i / part);
        float value = load(x[kind == DC_ALL_GATHER ? owner : 0][k], i);
        if (kind != DC_ALL_GATHER)
          for (int r = 1; r < n; r++) value += load(x[r][k], i);
        if (kind == DC_REDUCE_SCATTER) store(x[owner][k], i, value);
        else
          for (int r = 0; r < n; r++) store(x[r][k], i, value);
      }
    });
  }
  return 0;
}
