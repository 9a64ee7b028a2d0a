// Movement: copy, fill, random, gather, scatter_add. (decode stands in decode.cc.)
#include <algorithm>
#include <atomic>

#include "view.h"

using namespace dc;

namespace {

// --- copy ---
struct Counts {
  int64_t saturated = 0, nonfinite = 0;
};

bool integral(int dtype) { return dtype >= DC_I8 && dtype <= DC_BOOL; }

// A 64-bit integer keeps all its bits on the way to another integer; towards a float its lowest bits are folded into
// one sticky bit, so that the one rounding is right.
struct Integer {
  bool negative;
  uint64_t magnitude;
};
Integer read_integer(const void* p, int dtype) {
  if (dtype == DC_U64) return {false, *static_cast<const uint64_t*>(p)};
  const int64_t v = dtype == DC_I64 ? *static_cast<const int64_t*>(p) : int64_t(read_number(p, dtype));
  return {v < 0, v < 0 ? ~uint64_t(v) + 1 : uint64_t(v)};
}
// Whether the value had to be saturated.
bool write_integer(void* p, int dtype, Integer x) {
  if (dtype == DC_BOOL) {
    *static_cast<uint8_t*>(p) = x.magnitude != 0;
    return false;
  }
  const int bits = int(dtype_size(dtype)) * 8;
  const bool is_signed = dtype == DC_I8 || dtype == DC_I16 || dtype == DC_I32 || dtype == DC_I64;
  const uint64_t high = is_signed ? (uint64_t(1) << (bits - 1)) - 1 : bits == 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1;
  const uint64_t most = x.negative ? (is_signed ? high + 1 : 0) : high;
  const bool saturated = x.magnitude > most;
  const uint64_t magnitude = saturated ? most : x.magnitude;
  const uint64_t value = x.negative ? ~magnitude + 1 : magnitude;
  memcpy(p, &value, size_t(bits / 8));  // little endian
  return saturated;
}
double sticky_double(Integer x) {
  uint64_t m = x.magnitude;
  if (m >> 54) m = (m & ~uint64_t(0x3FF)) | ((m & 0x3FF) ? 0x400 : 0);
  return x.negative ? -double(m) : double(m);
}

void convert_number(void* dst, int to, const void* src, int from, Counts* counts) {
  if (integral(from)) {
    const Integer x = read_integer(src, from);
    if (integral(to)) {
      counts->saturated += write_integer(dst, to, x);
      return;
    }
    if (to == DC_F64) {
      *static_cast<double*>(dst) = x.negative ? -double(x.magnitude) : double(x.magnitude);
      return;
    }
    const double v = sticky_double(x);
    write_number(dst, to, v);
    const double r = read_number(dst, to);
    counts->saturated += std::isinf(r) || (to == DC_F8_E4M3 && std::fabs(v) > 464);
    return;
  }
  const double v = read_number(src, from);
  write_number(dst, to, v);
  if (!std::isfinite(v)) {
    counts->nonfinite++;
  } else if (to == DC_F8_E4M3) {
    counts->saturated += std::fabs(v) > 464;  // halfway to the next step beyond 448
  } else if (to == DC_BOOL) {
    // any number is true or false
  } else if (integral(to)) {
    const Integer x = read_integer(dst, to);
    const double r = std::nearbyint(v);
    counts->saturated += std::fabs(r) != double(x.magnitude) || (r < 0 && !x.negative);
  } else {
    counts->saturated += !std::isfinite(read_number(dst, to));
  }
}

int64_t count_nonfinite(const float* x, int64_t n) {
  int64_t bad = 0;
  for (int64_t i = 0; i < n; i++) bad += (float_bits(x[i]) & 0x7F800000) == 0x7F800000;
  return bad;
}

constexpr int64_t kChunk = 1024;

// Contiguous to contiguous.
void convert(void* dst, int to, const void* src, int from, int64_t n, Counts* counts) {
  const auto& kernels = element_kernels();
  const int64_t from_size = int64_t(dtype_size(from)), to_size = int64_t(dtype_size(to));
  if (to == from && !counts) {
    memcpy(dst, src, size_t(n * to_size));
    return;
  }
  Counts ignored;
  float buffer[kChunk], back[kChunk];
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t m = std::min(kChunk, n - i);
    const char* s = static_cast<const char*>(src) + i * from_size;
    char* d = static_cast<char*>(dst) + i * to_size;
    if (is_float(from) && is_float(to)) {
      kernels.load(buffer, s, from, m);
      if (to == from)
        memcpy(d, s, size_t(m * to_size));
      else
        kernels.store(d, to, buffer, m);
      if (counts) {
        const int64_t before = count_nonfinite(buffer, m);
        kernels.load(back, d, to, m);
        counts->nonfinite += before;
        counts->saturated += count_nonfinite(back, m) - before;
      }
    } else {
      Counts* c = counts ? counts : &ignored;
      for (int64_t j = 0; j < m; j++) convert_number(d + j * to_size, to, s + j * from_size, from, c);
    }
  }
}

template <class T>
void strided_move(void* dst, int64_t dst_stride, const void* src, int64_t src_stride, int64_t n) {
  for (int64_t i = 0; i < n; i++) static_cast<T*>(dst)[i * dst_stride] = static_cast<const T*>(src)[i * src_stride];
}
void move_elements(void* dst, int64_t dst_stride, const void* src, int64_t src_stride, int64_t n, size_t size) {
  switch (size) {
    case 1: return strided_move<uint8_t>(dst, dst_stride, src, src_stride, n);
    case 2: return strided_move<uint16_t>(dst, dst_stride, src, src_stride, n);
    case 4: return strided_move<uint32_t>(dst, dst_stride, src, src_stride, n);
    default: return strided_move<uint64_t>(dst, dst_stride, src, src_stride, n);
  }
}

// One row between any strides.
void convert_strided(char* dst, int to, int64_t dst_stride, const char* src, int from, int64_t src_stride, int64_t n,
                     Counts* counts) {
  if (dst_stride == 1 && src_stride == 1) return convert(dst, to, src, from, n, counts);
  const int64_t from_size = int64_t(dtype_size(from)), to_size = int64_t(dtype_size(to));
  uint64_t in[kChunk], out[kChunk];  // room for the widest elements
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t m = std::min(kChunk, n - i);
    const char* s = src + i * src_stride * from_size;
    char* d = dst + i * dst_stride * to_size;
    if (src_stride != 1) {
      move_elements(in, 1, s, src_stride, m, size_t(from_size));
      s = reinterpret_cast<char*>(in);
    }
    if (dst_stride == 1) {
      convert(d, to, s, from, m, counts);
    } else {
      convert(out, to, s, from, m, counts);
      move_elements(d, dst_stride, out, 1, m, size_t(to_size));
    }
  }
}

// The loops of a copy: dimensions of one removed, the fastest of dst last, neighbours merged where both allow it.
struct Loops {
  int n = 0;
  int64_t dim[4], dst[4], src[4];
  Loops(const dc_tensor& a, const dc_tensor& b) {
    struct Dim {
      int64_t n, dst, src;
    } dims[4];
    int m = 0;
    for (int d = 0; d < 4; d++)
      if (a.dim[d] != 1) dims[m++] = {a.dim[d], a.stride[d], b.stride[d]};
    std::stable_sort(dims, dims + m, [](const Dim& x, const Dim& y) { return std::abs(x.dst) > std::abs(y.dst); });
    for (int d = 0; d < m; d++) {
      if (n > 0 && dst[n - 1] == dims[d].dst * dims[d].n && src[n - 1] == dims[d].src * dims[d].n) {
        dim[n - 1] *= dims[d].n;
        dst[n - 1] = dims[d].dst;
        src[n - 1] = dims[d].src;
      } else {
        dim[n] = dims[d].n, dst[n] = dims[d].dst, src[n] = dims[d].src;
        n++;
      }
    }
    if (n == 0) dim[n] = 1, dst[n] = 1, src[n] = 1, n = 1;
  }
};

void copy_loops(dc_context* c, const dc_tensor& dst, const dc_tensor& src, Counts* total) {
  const Loops l(dst, src);
  const int inner = l.n - 1;
  const int64_t from_size = int64_t(dtype_size(src.dtype)), to_size = int64_t(dtype_size(dst.dtype));
  std::atomic<int64_t> saturated{0}, nonfinite{0};
  auto locate = [&](int64_t r, int skip, int64_t* d, int64_t* s) {  // outer index r, without dimensions inner and skip
    *d = *s = 0;
    for (int k = inner - 1; k >= 0; k--) {
      if (k == skip) continue;
      const int64_t i = r % l.dim[k];
      r /= l.dim[k];
      *d += i * l.dst[k];
      *s += i * l.src[k];
    }
  };
  // A transpose: the source runs along another dimension than the destination. Square tiles keep both in cache.
  int cross = -1;
  if (l.src[inner] != 1)
    for (int k = 0; k < inner; k++)
      if (l.src[k] == 1) cross = k;
  int64_t outer = 1;
  for (int k = 0; k < inner; k++)
    if (k != cross) outer *= l.dim[k];
  constexpr int64_t kTile = 64;
  if (cross >= 0) {
    const int64_t bands = (l.dim[cross] + kTile - 1) / kTile;
    parallel_for(c, outer * bands, std::max<int64_t>(1, 16384 / (l.dim[inner] * kTile)), [&](int64_t begin, int64_t end) {
      Counts counts;
      uint64_t tile[kTile * kTile];
      for (int64_t w = begin; w < end; w++) {
        int64_t d0, s0;
        locate(w / bands, cross, &d0, &s0);
        const int64_t j0 = w % bands * kTile, rows = std::min(kTile, l.dim[cross] - j0);
        for (int64_t i0 = 0; i0 < l.dim[inner]; i0 += kTile) {
          const int64_t columns = std::min(kTile, l.dim[inner] - i0);
          for (int64_t i = 0; i < columns; i++)
            move_elements(reinterpret_cast<char*>(tile) + i * from_size, kTile,
                          element(src, s0 + j0 + (i0 + i) * l.src[inner]), 1, rows, size_t(from_size));
          for (int64_t j = 0; j < rows; j++)
            convert_strided(element(dst, d0 + (j0 + j) * l.dst[cross] + i0 * l.dst[inner]), dst.dtype, l.dst[inner],
                            reinterpret_cast<char*>(tile) + j * kTile * from_size, src.dtype, 1, columns,
                            total ? &counts : nullptr);
        }
      }
      saturated += counts.saturated;
      nonfinite += counts.nonfinite;
    });
  } else if (outer == 1) {  // one long row: split it
    parallel_for(c, l.dim[inner], 65536, [&](int64_t begin, int64_t end) {
      Counts counts;
      convert_strided(element(dst, begin * l.dst[inner]), dst.dtype, l.dst[inner], element(src, begin * l.src[inner]),
                      src.dtype, l.src[inner], end - begin, total ? &counts : nullptr);
      saturated += counts.saturated;
      nonfinite += counts.nonfinite;
    });
  } else {
    parallel_for(c, outer, std::max<int64_t>(1, 65536 / l.dim[inner]), [&](int64_t begin, int64_t end) {
      Counts counts;
      for (int64_t r = begin; r < end; r++) {
        int64_t d, s;
        locate(r, -1, &d, &s);
        convert_strided(element(dst, d), dst.dtype, l.dst[inner], element(src, s), src.dtype, l.src[inner],
                        l.dim[inner], total ? &counts : nullptr);
      }
      saturated += counts.saturated;
      nonfinite += counts.nonfinite;
    });
  }
  (void)to_size;
  if (total) {
    total->saturated = saturated;
    total->nonfinite = nonfinite;
  }
}

// Philox4x32-10 (Salmon et al. 2011).
void philox(uint32_t key0, uint32_t key1, uint64_t block, uint32_t out[4]) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t(0xD2511F53) * c0, p1 = uint64_t(0xCD9E8D57) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ key0, n2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
    c0 = n0, c1 = uint32_t(p1), c2 = n2, c3 = uint32_t(p0);
    key0 += 0x9E3779B9, key1 += 0xBB67AE85;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

int check_indices(dc_context* c, const int32_t* idx, int64_t stride, int64_t n, int64_t limit) {
  for (int64_t j = 0; j < n; j++) {
    const int32_t i = idx[j * stride];
    if (i < -1 || i >= limit) return fail(c, "idx[%ld] = %d, but there are %ld", long(j), i, long(limit));
  }
  return 0;
}

}  // namespace

extern "C" int dc_cpu_copy(dc_context* c, const dc_call* call) {
  const dc_tensor &dst = call->t[0], &src = call->t[1], &counts = call->t[2];
  if (count(dst) == 0) return 0;
  Counts total;
  copy_loops(c, dst, src, present(counts) ? &total : nullptr);
  if (present(counts)) {
    data<int64_t>(counts)[0] += total.saturated;
    data<int64_t>(counts)[counts.stride[0]] += total.nonfinite;
  }
  return 0;
}

extern "C" int dc_cpu_fill(dc_context* c, const dc_call* call) {
  const dc_tensor& dst = call->t[0];
  if (count(dst) == 0) return 0;
  uint64_t value = 0;
  write_number(&value, dst.dtype, call->f[0]);
  dc_tensor src{};
  src.data = &value;
  src.dtype = dst.dtype;
  src.rank = dst.rank;
  for (int d = 0; d < 4; d++) src.dim[d] = dst.dim[d];
  copy_loops(c, dst, src, nullptr);
  return 0;
}

extern "C" int dc_cpu_random(dc_context* c, const dc_call* call) {
  const dc_tensor dst = aligned(call->t[0]);
  const int64_t n = dst.dim[3];
  if (count(dst) == 0) return 0;
  const bool normal = call->i[0] == 1;
  const uint32_t key0 = uint32_t(call->i[1]), key1 = uint32_t(call->i[2]);
  const float a = float(call->f[0]), b = float(call->f[1]);
  auto part = [&](int64_t row, int64_t begin, int64_t end) {
    float buffer[1024];
    for (int64_t at = begin; at < end; at += 1024) {
      const int64_t m = std::min<int64_t>(1024, end - at);
      uint64_t held = ~uint64_t(0);
      float four[4] = {};
      for (int64_t i = 0; i < m; i++) {
        const uint64_t e = uint64_t(row * n + at + i);
        if (e / 4 != held) {
          held = e / 4;
          uint32_t r[4];
          philox(key0, key1, held, r);
          for (int k = 0; k < 4; k++) four[k] = float(r[k] >> 8) * 0x1p-24f;
          if (normal)
            for (int k = 0; k < 4; k += 2) {
              const float radius = std::sqrt(-2.0f * std::log(four[k] + 0x1p-24f)), angle = 6.28318530717958648f * four[k + 1];
              four[k] = radius * std::cos(angle);
              four[k + 1] = radius * std::sin(angle);
            }
        }
        buffer[i] = normal ? a + b * four[e % 4] : a + (b - a) * four[e % 4];
      }
      store_strided(dst, row_at(dst, row) + at * dst.stride[3], dst.stride[3], buffer, m);
    }
  };
  const int64_t rows = row_count(dst);
  if (rows == 1)
    parallel_for(c, n, 4096, [&](int64_t begin, int64_t end) { part(0, begin, end); });
  else
    parallel_for(c, rows, row_grain(n * 4), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) part(r, 0, n);
    });
  return 0;
}

extern "C" int dc_cpu_gather(dc_context* c, const dc_call* call) {
  const dc_tensor &dst = call->t[0], &src = call->t[1], &idx = call->t[2];
  const int axis = int(call->i[0]);
  if (count(dst) == 0) return 0;
  const int32_t* index = data<int32_t>(idx);
  const int64_t step = idx.stride[0];
  if (check_indices(c, index, step, idx.dim[0], src.dim[axis])) return 1;
  const uint64_t zero = 0;
  const int64_t rows = dst.dim[0], columns = dst.dim[1];
  parallel_for(c, rows, row_grain(columns), [&](int64_t begin, int64_t end) {
    uint64_t picked[kChunk];
    const size_t size = dtype_size(src.dtype);
    for (int64_t r = begin; r < end; r++) {
      if (axis == 0) {
        const int32_t i = index[r * step];
        const char* from = i < 0 ? reinterpret_cast<const char*>(&zero) : element(src, i * src.stride[0]);
        convert_strided(element(dst, r * dst.stride[0]), dst.dtype, dst.stride[1], from, src.dtype,
                        i < 0 ? 0 : src.stride[1], columns, nullptr);
      } else {
        for (int64_t j = 0; j < columns; j += kChunk) {
          const int64_t m = std::min(kChunk, columns - j);
          for (int64_t k = 0; k < m; k++) {
            const int32_t i = index[(j + k) * step];
            memcpy(reinterpret_cast<char*>(picked) + size_t(k) * size,
                   i < 0 ? reinterpret_cast<const char*>(&zero) : element(src, r * src.stride[0] + i * src.stride[1]), size);
          }
          convert_strided(element(dst, r * dst.stride[0] + j * dst.stride[1]), dst.dtype, dst.stride[1],
                          reinterpret_cast<char*>(picked), src.dtype, 1, m, nullptr);
        }
      }
    }
  });
  return 0;
}

extern "C" int dc_cpu_scatter_add(dc_context* c, const dc_call* call) {
  const dc_tensor &dst = call->t[0], &src = call->t[1], &idx = call->t[2], &w = call->t[3];
  const int64_t rows = dst.dim[0], columns = dst.dim[1], n = idx.dim[0];
  if (count(dst) == 0 || n == 0) return 0;
  const int32_t* index = data<int32_t>(idx);
  if (check_indices(c, index, idx.stride[0], n, rows)) return 1;
  // Which j go to each row, in order: every row is summed in fp32 and rounded once, whatever the thread count.
  std::vector<int64_t> first(size_t(rows) + 1, 0), order(static_cast<size_t>(n));
  for (int64_t j = 0; j < n; j++)
    if (index[j * idx.stride[0]] >= 0) first[size_t(index[j * idx.stride[0]]) + 1]++;
  for (int64_t r = 0; r < rows; r++) first[size_t(r) + 1] += first[size_t(r)];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t j = 0; j < n; j++)
    if (index[j * idx.stride[0]] >= 0) order[size_t(next[size_t(index[j * idx.stride[0]])]++)] = j;
  parallel_for(c, rows, row_grain(columns), [&](int64_t begin, int64_t end) {
    std::vector<float> sum(static_cast<size_t>(columns));
    RowReader reader;
    for (int64_t r = begin; r < end; r++) {
      if (first[size_t(r)] == first[size_t(r) + 1]) continue;
      load_strided(sum.data(), dst, r * dst.stride[0], dst.stride[1], columns);
      for (int64_t k = first[size_t(r)]; k < first[size_t(r) + 1]; k++) {
        const int64_t j = order[size_t(k)];
        float weight = 1;
        if (present(w)) load_strided(&weight, w, j * w.stride[0], 1, 1);
        element_kernels().axpy(sum.data(), weight, reader.row(src, j * src.stride[0], src.stride[1], columns), columns);
      }
      store_strided(dst, r * dst.stride[0], dst.stride[1], sum.data(), columns);
    }
  });
  return 0;
}
