// The CUDA backend: device, memory, files through pinned memory, the op table.
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>

#include "cuda.cuh"

namespace dc {

int fail(dc_context* c, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  c->error = text;
  return 1;
}

int launched(dc_context* c, const char* what) {
  const cudaError_t code = cudaGetLastError();
  return code == cudaSuccess ? 0 : fail(c, "%s: %s", what, cudaGetErrorString(code));
}

std::mutex& launches() {
  static std::mutex mutex;
  return mutex;
}

void* scratch(dc_context* c, int slot, size_t bytes) {
  if (c->scratch_bytes[slot] < bytes) {
    if (c->scratch[slot]) {
      cudaStreamSynchronize(c->stream);
      std::lock_guard lock(launches());
      cudaFree(c->scratch[slot]);
      c->scratch[slot] = nullptr;
      c->scratch_bytes[slot] = 0;
    }
    std::lock_guard lock(launches());
    const cudaError_t code = cudaMalloc(&c->scratch[slot], bytes);
    if (code != cudaSuccess) {
      cudaGetLastError();
      fail(c, "out of GPU memory for %zu MB of work space", bytes >> 20);
      return c->scratch[slot] = nullptr;
    }
    c->scratch_bytes[slot] = bytes;
  }
  return c->scratch[slot];
}

}  // namespace dc

namespace {

using dc::fail;

// A thread's own pinned memory and stream for file transfers: two halves, one filling while the other is copied.
struct Staging {
  static constexpr size_t half = 8 << 20;
  char* memory = nullptr;
  cudaStream_t stream = nullptr;
  cudaEvent_t done[2] = {};
  bool pending[2] = {};
  cudaError_t open() {
    if (memory) return cudaSuccess;
    std::lock_guard lock(dc::launches());
    cudaError_t code = cudaHostAlloc(reinterpret_cast<void**>(&memory), 2 * half, cudaHostAllocDefault);
    if (code == cudaSuccess) code = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    for (cudaEvent_t& event : done)
      if (code == cudaSuccess) code = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (code != cudaSuccess) memory = nullptr;
    return code;
  }
  // Not freed: threads end with the process, and the driver may be gone by then.
};
thread_local Staging staging;

dc_context* open_cuda(int device, const char*, char* error, size_t error_bytes) {
  auto* c = new dc_context();
  auto check = [&](cudaError_t code, const char* what) {
    if (code == cudaSuccess) return true;
    snprintf(error, error_bytes, "%s: %s", what, cudaGetErrorString(code));
    return false;
  };
  int devices = 0;
  cudaDeviceProp properties;
  if (!check(cudaGetDeviceCount(&devices), "no usable NVIDIA driver")) return nullptr;
  if (device < 0 || device >= devices) {
    snprintf(error, error_bytes, "GPU %d was asked for; this machine shows %d", device, devices);
    return nullptr;
  }
  if (!check(cudaSetDevice(device), "cudaSetDevice") ||
      !check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties") ||
      !check(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking), "cudaStreamCreate"))
    return nullptr;
  c->device = device;
  c->multiprocessors = properties.multiProcessorCount;
  c->shared_limit = properties.sharedMemPerBlockOptin;
  c->capability = properties.major * 10 + properties.minor;
  if (c->capability < 80) {
    snprintf(error, error_bytes, "%s has compute capability %d.%d; 8.0 (A100) or newer is needed", properties.name,
             properties.major, properties.minor);
    return nullptr;
  }
  c->libraries = dc::find_libraries();
  if (!c->libraries->error.empty()) {
    snprintf(error, error_bytes, "%s", c->libraries->error.c_str());
    return nullptr;
  }
  const size_t workspace = 64 << 20;  // cuBLAS's advice for Hopper is 32 MB
  if (c->libraries->cublasCreate(&c->blas) != 0 || c->libraries->cublasSetStream(c->blas, c->stream) != 0) {
    snprintf(error, error_bytes, "cuBLAS (%s) could not be started", c->libraries->cublas_path.c_str());
    return nullptr;
  }
  void* memory = dc::scratch(c, 3, workspace);
  if (!memory) {
    snprintf(error, error_bytes, "%s", c->error.c_str());
    return nullptr;
  }
  c->libraries->cublasSetWorkspace(c->blas, memory, workspace);
  return c;
}

void close_cuda(dc_context* c) {
  cudaSetDevice(c->device);
  cudaStreamSynchronize(c->stream);
  c->libraries->cublasDestroy(c->blas);
  for (void* memory : c->scratch) cudaFree(memory);
  cudaStreamDestroy(c->stream);
  delete c;
}

int info_cuda(dc_context* c, char* json, size_t bytes) {
  cudaSetDevice(c->device);
  cudaDeviceProp p;
  size_t free_bytes = 0, total = 0;
  int driver = 0, runtime = 0;
  DC_CUDA(cudaGetDeviceProperties(&p, c->device));
  DC_CUDA(cudaMemGetInfo(&free_bytes, &total));
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const std::string nccl = dc::nccl_path().empty() ? "" : ",\"NCCL\":\"" + dc::nccl_path() + "\"";
  snprintf(json, bytes,
           "{\"name\":\"%s\",\"capability\":\"%d.%d\",\"multiprocessors\":%d,\"memory\":{\"total\":%zu,\"free\":%zu},"
           "\"driver\":%d,\"runtime\":%d,\"libraries\":{\"cuBLAS\":\"%s\"%s}}",
           p.name, p.major, p.minor, p.multiProcessorCount, total, free_bytes, driver, runtime, c->libraries->cublas_path.c_str(),
           nccl.c_str());
  return 0;
}

const char* last_error(dc_context* c) { return c->error.c_str(); }

void* alloc_cuda(dc_context* c, size_t bytes) {
  cudaSetDevice(c->device);
  void* data = nullptr;
  std::lock_guard lock(dc::launches());
  if (cudaMalloc(&data, bytes) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return data;
}
void free_cuda(dc_context* c, void* data) {
  cudaSetDevice(c->device);
  std::lock_guard lock(dc::launches());
  cudaFree(data);
}

// Through this thread's pinned memory, so that the stream need not be empty.
int upload_cuda(dc_context* c, void* dst, const void* src, size_t bytes) {
  DC_CUDA(cudaSetDevice(c->device));
  DC_CUDA(staging.open());
  for (size_t done = 0, turn = 0; done < bytes; turn ^= 1) {
    const size_t n = std::min(bytes - done, Staging::half);
    char* memory = staging.memory + turn * Staging::half;
    if (staging.pending[turn]) DC_CUDA(cudaEventSynchronize(staging.done[turn]));
    memcpy(memory, static_cast<const char*>(src) + done, n);
    DC_CUDA(cudaMemcpyAsync(static_cast<char*>(dst) + done, memory, n, cudaMemcpyHostToDevice, c->stream));
    DC_CUDA(cudaEventRecord(staging.done[turn], c->stream));
    staging.pending[turn] = true;
    done += n;
  }
  return 0;
}
int download_cuda(dc_context* c, void* dst, const void* src, size_t bytes) {
  DC_CUDA(cudaSetDevice(c->device));
  DC_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, c->stream));
  DC_CUDA(cudaStreamSynchronize(c->stream));
  return 0;
}
int sync_cuda(dc_context* c) {
  DC_CUDA(cudaSetDevice(c->device));
  DC_CUDA(cudaStreamSynchronize(c->stream));
  return 0;
}

// From I/O threads: no use of c->error, which belongs to the queue thread.
int fence_cuda(dc_context* c) {
  cudaSetDevice(c->device);
  cudaEvent_t event;
  if (cudaEventCreateWithFlags(&event, cudaEventDisableTiming) != cudaSuccess) return 1;
  const bool good = cudaEventRecord(event, c->stream) == cudaSuccess && cudaEventSynchronize(event) == cudaSuccess;
  cudaEventDestroy(event);
  return good ? 0 : 1;
}

int read_cuda(dc_context* c, int fd, uint64_t offset, void* dst, size_t bytes, int* system_error) {
  *system_error = EIO;
  if (cudaSetDevice(c->device) != cudaSuccess || staging.open() != cudaSuccess) return 1;
  for (size_t done = 0, turn = 0; done < bytes; turn ^= 1) {
    const size_t n = std::min(bytes - done, Staging::half);
    char* memory = staging.memory + turn * Staging::half;
    if (staging.pending[turn] && cudaEventSynchronize(staging.done[turn]) != cudaSuccess) return 1;
    for (size_t got = 0; got < n;) {
      const ssize_t r = pread(fd, memory + got, n - got, off_t(offset + done + got));
      if (r < 0 && errno == EINTR) continue;
      if (r <= 0) {
        *system_error = r < 0 ? errno : 0;
        return 1;
      }
      got += size_t(r);
    }
    if (cudaMemcpyAsync(static_cast<char*>(dst) + done, memory, n, cudaMemcpyHostToDevice, staging.stream) != cudaSuccess ||
        cudaEventRecord(staging.done[turn], staging.stream) != cudaSuccess)
      return 1;
    staging.pending[turn] = true;
    done += n;
  }
  return cudaStreamSynchronize(staging.stream) == cudaSuccess ? 0 : 1;
}

int write_cuda(dc_context* c, int fd, uint64_t offset, const void* src, size_t bytes, int* system_error) {
  *system_error = EIO;
  if (cudaSetDevice(c->device) != cudaSuccess || staging.open() != cudaSuccess) return 1;
  const char* from = static_cast<const char*>(src);
  auto fetch = [&](size_t at, size_t turn) {
    if (at >= bytes) return true;
    return cudaMemcpyAsync(staging.memory + turn * Staging::half, from + at, std::min(bytes - at, Staging::half),
                           cudaMemcpyDeviceToHost, staging.stream) == cudaSuccess &&
           cudaEventRecord(staging.done[turn], staging.stream) == cudaSuccess;
  };
  for (bool& pending : staging.pending) pending = false;
  if (cudaStreamSynchronize(staging.stream) != cudaSuccess || !fetch(0, 0)) return 1;
  for (size_t done = 0, turn = 0; done < bytes; turn ^= 1) {
    const size_t n = std::min(bytes - done, Staging::half);
    if (!fetch(done + n, turn ^ 1) || cudaEventSynchronize(staging.done[turn]) != cudaSuccess) return 1;
    for (size_t put = 0; put < n;) {
      const ssize_t r = pwrite(fd, staging.memory + turn * Staging::half + put, n - put, off_t(offset + done + put));
      if (r < 0 && errno == EINTR) continue;
      if (r <= 0) {
        *system_error = r < 0 ? errno : ENOSPC;
        return 1;
      }
      put += size_t(r);
    }
    done += n;
  }
  return 0;
}

}  // namespace

// Every op is a function dc_cuda_NAME in one of the files beside this one; a missing one leaves its slot NULL.
#define X(name, t, i, f) extern "C" int dc_cuda_##name(dc_context*, const dc_call*) __attribute__((weak));
DC_OPS(X)
#undef X

namespace {
// Ops run on the addon's queue thread, whose current device is nobody's business but ours.
template <dc_op Op>
int on_device(dc_context* c, const dc_call* call) {
  DC_CUDA(cudaSetDevice(c->device));
  return Op(c, call);
}
}  // namespace

extern "C" __attribute__((visibility("default"))) const dc_backend* dc_backend_get(void) {
  static const dc_backend backend = {
      DC_ABI,       "cuda",        open_cuda, close_cuda, info_cuda, last_error, alloc_cuda, free_cuda,
      upload_cuda,  download_cuda, sync_cuda, fence_cuda, read_cuda, write_cuda, dc_cuda_join, dc_cuda_part, dc_cuda_collective,
      {
#define X(name, t, i, f) dc_cuda_##name ? on_device<dc_cuda_##name> : nullptr,
          DC_OPS(X)
#undef X
      },
  };
  return &backend;
}
