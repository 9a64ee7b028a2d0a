// Several GPUs of this process as one group, through NCCL.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "cuda.cuh"

struct dc_group {
  struct Rank {
    int device;
    cudaStream_t stream;
    void* comm;
  };
  std::vector<Rank> ranks;
};

extern "C" dc_group* dc_cuda_join(dc_context* const* ranks, int n, char* error, size_t error_bytes) {
  dc::Nccl* nccl = dc::find_nccl();
  if (!nccl->error.empty()) {
    snprintf(error, error_bytes, "%s", nccl->error.c_str());
    return nullptr;
  }
  // Multicast over NVLink needs rights from the fabric manager that containers often lack; NCCL then fails instead of doing
  // without. Whoever has them sets it to 1 or 2.
  setenv("NCCL_NVLS_ENABLE", "0", 0);
  std::vector<int> devices;
  for (int r = 0; r < n; r++) devices.push_back(ranks[r]->device);
  std::vector<void*> comms(size_t(n), nullptr);
  if (const int code = nccl->commInitAll(comms.data(), n, devices.data())) {
    snprintf(error, error_bytes, "NCCL (%s) does not start: %s. NCCL_DEBUG=WARN says more", nccl->path.c_str(), nccl->getErrorString(code));
    return nullptr;
  }
  auto* group = new dc_group();
  for (int r = 0; r < n; r++) group->ranks.push_back({ranks[r]->device, ranks[r]->stream, comms[size_t(r)]});
  return group;
}

extern "C" void dc_cuda_part(dc_group* group) {
  for (const dc_group::Rank& rank : group->ranks) {
    cudaSetDevice(rank.device);
    cudaStreamSynchronize(rank.stream);
  }
  for (const dc_group::Rank& rank : group->ranks) dc::find_nccl()->commDestroy(rank.comm);
  delete group;
}

// All ranks' operations are one NCCL group, launched by one thread: kernels of a collective wait for each other on the
// GPUs, so between their launches nothing may happen that waits for one of them (cudaFree does: hence `launches`).
extern "C" int dc_cuda_collective(dc_group* group, int kind, const dc_tensor* const* x, int tensors, char* error, size_t error_bytes) {
  const dc::Nccl* nccl = dc::find_nccl();
  const int n = int(group->ranks.size());
  std::lock_guard lock(dc::launches());
  int code = nccl->groupStart();
  for (int i = 0; i < tensors && !code; i++) {
    const int64_t size = x[0][i].dim[0], part = dc::ceil_div(size, n), width = int64_t(dc::dtype_size(x[0][i].dtype));
    const int type = x[0][i].dtype == DC_F32 ? dc::NCCL_FLOAT32 : dc::NCCL_BFLOAT16;
    if (size == 0) continue;
    for (int r = 0; r < n && !code; r++) {
      const dc_group::Rank& rank = group->ranks[size_t(r)];
      char* all = dc::data<char>(x[r][i]);
      char* own = all + r * part * width;
      cudaSetDevice(rank.device);
      if (kind == DC_ALL_REDUCE) {
        code = nccl->allReduce(all, all, size_t(size), type, dc::NCCL_SUM, rank.comm, rank.stream);
      } else if (size % n == 0) {
        code = kind == DC_ALL_GATHER ? nccl->allGather(own, all, size_t(part), type, rank.comm, rank.stream)
                                     : nccl->reduceScatter(all, own, size_t(part), type, dc::NCCL_SUM, rank.comm, rank.stream);
      } else {
        for (int owner = 0; owner * part < size && !code; owner++) {
          char* at = all + owner * part * width;
          const size_t count = size_t(std::min(part, size - owner * part));
          code = kind == DC_ALL_GATHER ? nccl->broadcast(at, at, count, type, owner, rank.comm, rank.stream)
                                       : nccl->reduce(at, at, count, type, dc::NCCL_SUM, owner, rank.comm, rank.stream);
        }
      }
    }
  }
  const int end = nccl->groupEnd();
  if (!code) code = end;
  if (!code) return 0;
  snprintf(error, error_bytes, "NCCL: %s", nccl->getErrorString(code));
  return 1;
}
