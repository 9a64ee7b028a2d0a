// Movement: copy, fill, gather, scatter_add.
#include "numbers.cuh"

namespace dc {
namespace {

// --- copy ---------------------------------------------------------------------------------------------------------

__global__ void copy_any(dc_tensor dst, dc_tensor src, int64_t n, unsigned long long* counts) {
  unsigned long long saturated = 0, bad = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t from = offset_of(src, i), to = offset_of(dst, i);
    if (is_integer(src.dtype)) {
      const Integer x = read_integer(src.data, src.dtype, from);
      if (is_integer(dst.dtype)) saturated += write_integer(dst.data, dst.dtype, to, x);
      else if (dst.dtype == DC_F64) static_cast<double*>(dst.data)[to] = x.negative ? -double(x.magnitude) : double(x.magnitude);
      else saturated += write_number(dst.data, dst.dtype, to, sticky_double(x));
    } else {
      const double v = read_number(src.data, src.dtype, from);
      saturated += write_number(dst.data, dst.dtype, to, v);
      bad += !isfinite(v);
    }
  }
  if (counts) {
    if (saturated) atomicAdd(counts, saturated);
    if (bad) atomicAdd(counts + 1, bad);
  }
}

// Contiguous float types, eight values a thread in 16-byte steps where both sides allow it.
template <class D, class S>
__global__ void copy_floats(D* __restrict__ dst, const S* __restrict__ src, int64_t n) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  for (int64_t i = first; i < n / 8; i += step) {
    alignas(16) S in[8];
    alignas(16) D out[8];
#pragma unroll
    for (unsigned k = 0; k < sizeof in / 16; k++) reinterpret_cast<uint4*>(in)[k] = reinterpret_cast<const uint4*>(src + i * 8)[k];
#pragma unroll
    for (int k = 0; k < 8; k++) out[k] = from_float<D>(to_float(in[k]));
#pragma unroll
    for (unsigned k = 0; k < sizeof out / 16; k++) reinterpret_cast<uint4*>(dst + i * 8)[k] = reinterpret_cast<uint4*>(out)[k];
  }
  for (int64_t i = n / 8 * 8 + first; i < n; i += step) dst[i] = from_float<D>(to_float(src[i]));
}

// A transposed float matrix through shared memory: dst[r, c] (row-major) = src stored column by column.
template <class D, class S>
__global__ void copy_transposed(D* dst, int64_t dst_row, const S* src, int64_t src_column, int64_t rows, int64_t columns) {
  __shared__ float tile[32][33];
  const int64_t r0 = blockIdx.y * 32ll, c0 = blockIdx.x * 32ll;
  for (int k = threadIdx.y; k < 32; k += 8)
    if (c0 + k < columns && r0 + threadIdx.x < rows) tile[k][threadIdx.x] = to_float(src[(c0 + k) * src_column + r0 + threadIdx.x]);
  __syncthreads();
  for (int k = threadIdx.y; k < 32; k += 8)
    if (r0 + k < rows && c0 + threadIdx.x < columns) dst[(r0 + k) * dst_row + c0 + threadIdx.x] = from_float<D>(tile[threadIdx.x][k]);
}

bool is_float(int dtype) { return dtype == DC_F32 || dtype == DC_BF16 || dtype == DC_F16; }
bool aligned(const dc_tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; }

int copy_counted(dc_context* c, const dc_tensor& dst, const dc_tensor& src, void* counts) {
  const int64_t n = count(dst);
  if (n == 0) return 0;
  const bool dense = contiguous(dst) && contiguous(src);
  if (dense && dst.dtype == src.dtype && !counts) {
    DC_CUDA(cudaMemcpyAsync(dst.data, src.data, size_t(n) * dtype_size(dst.dtype), cudaMemcpyDeviceToDevice, c->stream));
    return 0;
  }
  if (is_float(dst.dtype) && is_float(src.dtype) && !counts) {
    if (dense && aligned(dst) && aligned(src)) {
      DC_FLOAT(dst.dtype, D, DC_FLOAT(src.dtype, S, copy_floats<D, S><<<grid_for(c, n / 8 + 1, 256), 256, 0, c->stream>>>(data<D>(dst), data<S>(src), n)));
      return launched(c, "copy");
    }
    if (dst.rank == 2 && dst.stride[1] == 1 && src.stride[0] == 1 && src.dim[0] > 1 && src.dim[1] > 1 && ceil_div(dst.dim[0], 32) < 65536) {
      const dim3 grid(unsigned(ceil_div(dst.dim[1], 32)), unsigned(ceil_div(dst.dim[0], 32)));
      DC_FLOAT(dst.dtype, D, DC_FLOAT(src.dtype, S, copy_transposed<D, S><<<grid, dim3(32, 8), 0, c->stream>>>(data<D>(dst), dst.stride[0], data<S>(src), src.stride[1], dst.dim[0], dst.dim[1])));
      return launched(c, "copy");
    }
  }
  copy_any<<<grid_for(c, n, 256), 256, 0, c->stream>>>(dst, src, n, static_cast<unsigned long long*>(counts));
  return launched(c, "copy");
}

__global__ void fill_any(dc_tensor dst, int64_t n, double value) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    write_number(dst.data, dst.dtype, offset_of(dst, i), value);
}

// --- gather, scatter ----------------------------------------------------------------------------------------------

// One block per output row (or a piece of it).
__global__ void gather_rows(dc_tensor dst, dc_tensor src, const int32_t* idx, int64_t idx_stride) {
  const int64_t r = blockIdx.x;
  const int64_t from = idx[r * idx_stride];
  const int64_t columns = dst.dim[1];
  const bool same = dst.dtype == src.dtype && dst.stride[1] == 1 && src.stride[1] == 1;
  const int size = dst.dtype == DC_F32 || dst.dtype == DC_I32 || dst.dtype == DC_U32 ? 4 : dst.dtype == DC_I8 || dst.dtype == DC_U8 ? 1 : 2;
  if (same && from >= 0) {
    const char* in = static_cast<const char*>(src.data) + from * src.stride[0] * size;
    char* out = static_cast<char*>(dst.data) + r * dst.stride[0] * size;
    const int64_t bytes = columns * size;
    if ((reinterpret_cast<uintptr_t>(in) | reinterpret_cast<uintptr_t>(out) | bytes) % 16 == 0) {
      for (int64_t i = threadIdx.x; i < bytes / 16; i += blockDim.x) reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(in)[i];
      return;
    }
  }
  for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
    const int64_t to = r * dst.stride[0] + j * dst.stride[1];
    write_number(dst.data, dst.dtype, to, from < 0 ? 0 : read_number(src.data, src.dtype, from * src.stride[0] + j * src.stride[1]));
  }
}
__global__ void gather_columns(dc_tensor dst, dc_tensor src, const int32_t* idx, int64_t idx_stride) {
  for (int64_t r = blockIdx.x; r < dst.dim[0]; r += gridDim.x)
    for (int64_t j = threadIdx.x; j < dst.dim[1]; j += blockDim.x) {
      const int64_t from = idx[j * idx_stride], to = r * dst.stride[0] + j * dst.stride[1];
      write_number(dst.data, dst.dtype, to, from < 0 ? 0 : read_number(src.data, src.dtype, r * src.stride[0] + from * src.stride[1]));
    }
}

// The same between equal types: a thread has a column of some rows.
constexpr int GATHER_ROWS = 8;
template <class T>
__global__ void __launch_bounds__(256) gather_columns_alike(T* dst, int64_t dst_row, const T* src, int64_t src_row, const int32_t* idx, int64_t idx_stride, int64_t rows, int64_t columns) {
  const int64_t j = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (j >= columns) return;
  const int64_t from = idx[j * idx_stride];
  for (int64_t r0 = blockIdx.y * int64_t(GATHER_ROWS); r0 < rows; r0 += gridDim.y * int64_t(GATHER_ROWS)) {
    T values[GATHER_ROWS];
#pragma unroll
    for (int i = 0; i < GATHER_ROWS; i++) values[i] = from >= 0 && r0 + i < rows ? src[(r0 + i) * src_row + from] : T(0);
#pragma unroll
    for (int i = 0; i < GATHER_ROWS; i++)
      if (r0 + i < rows) dst[(r0 + i) * dst_row + j] = values[i];
  }
}

// One thread per column of dst walks the rows in order: deterministic.
__global__ void scatter_rows(dc_tensor dst, dc_tensor src, const int32_t* idx, const float* w, int64_t n) {
  for (int64_t j = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; j < dst.dim[1]; j += int64_t(gridDim.x) * blockDim.x)
    for (int64_t r = 0; r < n; r++) {
      const int64_t to = idx[r];
      if (to < 0) continue;
      const int64_t at = to * dst.stride[0] + j * dst.stride[1];
      const float x = load(src.data, src.dtype, r * src.stride[0] + j * src.stride[1]);
      store(dst.data, dst.dtype, at, load(dst.data, dst.dtype, at) + (w ? w[r] : 1.f) * x);
    }
}

}  // namespace

int copy(dc_context* c, const dc_tensor& dst, const dc_tensor& src) { return copy_counted(c, dst, src, nullptr); }

int zero(dc_context* c, const dc_tensor& dst) {
  fill_any<<<grid_for(c, count(dst), 256), 256, 0, c->stream>>>(dst, count(dst), 0);
  return launched(c, "fill");
}

}  // namespace dc

using namespace dc;

extern "C" int dc_cuda_copy(dc_context* c, const dc_call* call) {
  return copy_counted(c, call->t[0], call->t[1], call->t[2].data);
}

extern "C" int dc_cuda_fill(dc_context* c, const dc_call* call) {
  const dc_tensor& dst = call->t[0];
  const int64_t n = count(dst);
  if (n == 0) return 0;
  if (call->f[0] == 0 && contiguous(dst)) {
    DC_CUDA(cudaMemsetAsync(dst.data, 0, size_t(n) * dtype_size(dst.dtype), c->stream));
    return 0;
  }
  fill_any<<<grid_for(c, n, 256), 256, 0, c->stream>>>(dst, n, call->f[0]);
  return launched(c, "fill");
}

extern "C" int dc_cuda_gather(dc_context* c, const dc_call* call) {
  const dc_tensor &dst = call->t[0], &src = call->t[1], &idx = call->t[2];
  if (count(dst) == 0) return 0;
  if (call->i[0] == 0) {
    gather_rows<<<unsigned(dst.dim[0]), 128, 0, c->stream>>>(dst, src, data<int32_t>(idx), idx.stride[0]);
  } else {
    const int64_t rows = dst.dim[0], columns = dst.dim[1], tiles = ceil_div(rows, GATHER_ROWS);
    const dim3 grid(unsigned(ceil_div(columns, 256)), unsigned(tiles < 65535 ? tiles : 65535));
    auto alike = [&](auto zero) {
      using T = decltype(zero);
      gather_columns_alike<T><<<grid, 256, 0, c->stream>>>(data<T>(dst), dst.stride[0], data<T>(src), src.stride[0], data<int32_t>(idx), idx.stride[0], rows, columns);
    };
    const size_t size = dst.dtype == src.dtype && dst.stride[1] == 1 && src.stride[1] == 1 ? dtype_size(dst.dtype) : 0;
    if (size == 4) alike(uint32_t(0));
    else if (size == 2) alike(uint16_t(0));
    else if (size == 1) alike(uint8_t(0));
    else gather_columns<<<grid_for(c, rows, 1), 256, 0, c->stream>>>(dst, src, data<int32_t>(idx), idx.stride[0]);
  }
  return launched(c, "gather");
}

extern "C" int dc_cuda_scatter_add(dc_context* c, const dc_call* call) {
  const dc_tensor &dst = call->t[0], &src = call->t[1], &idx = call->t[2], &w = call->t[3];
  if (count(src) == 0) return 0;
  // A 16-bit dst is summed in fp32 and rounded once.
  dc_tensor sums = dst;
  if (dst.dtype != DC_F32) {
    sums = matrix(scratch(c, 2, size_t(count(dst)) * 4), DC_F32, dst.dim[0], dst.dim[1], dst.dim[1]);
    if (!sums.data || copy(c, sums, dst)) return 1;
  }
  scatter_rows<<<grid_for(c, dst.dim[1], 64), 64, 0, c->stream>>>(sums, src, data<int32_t>(idx), data<float>(w), src.dim[0]);
  if (dst.dtype != DC_F32 && copy(c, dst, sums)) return 1;
  return launched(c, "scatter_add");
}

namespace dc {
namespace {

// Philox4x32-10 (Salmon et al. 2011): four words for counter `at`.
__device__ void philox(uint32_t key0, uint32_t key1, uint64_t at, uint32_t r[4]) {
  uint32_t x0 = uint32_t(at), x1 = uint32_t(at >> 32), x2 = 0, x3 = 0;
  for (int round = 0; round < 10; round++) {
    const uint64_t p = uint64_t(0xD2511F53u) * x0, q = uint64_t(0xCD9E8D57u) * x2;
    const uint32_t y0 = uint32_t(q >> 32) ^ x1 ^ key0, y2 = uint32_t(p >> 32) ^ x3 ^ key1;
    x0 = y0, x1 = uint32_t(q), x2 = y2, x3 = uint32_t(p);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  r[0] = x0, r[1] = x1, r[2] = x2, r[3] = x3;
}

__global__ void random_fill(dc_tensor dst, int64_t n, bool normal, uint32_t key0, uint32_t key1, float a, float b) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < (n + 3) / 4; i += int64_t(gridDim.x) * blockDim.x) {
    uint32_t r[4];
    philox(key0, key1, uint64_t(i), r);
    float x[4];
    for (int k = 0; k < 4; k++) x[k] = float(r[k] >> 8) * 0x1p-24f;
    if (normal)
      for (int k = 0; k < 4; k += 2) {
        const float radius = sqrtf(-2.0f * logf(x[k] + 0x1p-24f)), angle = 6.28318530717958648f * x[k + 1];
        x[k] = radius * cosf(angle), x[k + 1] = radius * sinf(angle);
      }
    for (int k = 0; k < 4 && i * 4 + k < n; k++)  // rounded after each step, as on the CPU
      store(dst.data, dst.dtype, offset_of(dst, i * 4 + k), __fadd_rn(a, __fmul_rn(normal ? b : b - a, x[k])));
  }
}

}  // namespace
}  // namespace dc

extern "C" int dc_cuda_random(dc_context* c, const dc_call* call) {
  const dc_tensor& dst = call->t[0];
  const int64_t n = count(dst);
  if (n == 0) return 0;
  random_fill<<<grid_for(c, n / 4 + 1, 256), 256, 0, c->stream>>>(dst, n, call->i[0] == 1, uint32_t(call->i[1]), uint32_t(call->i[2]), float(call->f[0]), float(call->f[1]));
  return launched(c, "random");
}
