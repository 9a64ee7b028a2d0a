// The CPU backend: memory, files, threads and the op table.
#include <dirent.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "blas.h"
#include "cpu.h"
#include "kernels/gemm.h"

namespace dc {

// A fixed set of threads; the caller is one of them.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this] { loop(); });
  }
  ~ThreadPool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
  void run(int64_t pieces, const std::function<void(int64_t)>& body) {
    {
      std::lock_guard lock(mutex_);
      body_ = &body;
      next_ = 0;
      pieces_ = pieces;
      active_ = 0;
      round_++;
    }
    wake_.notify_all();
    std::unique_lock lock(mutex_);
    work(lock);
    lock.unlock();
    linger([&] { return active_ == 0; });
    lock.lock();
    done_.wait(lock, [&] { return active_ == 0; });
    body_ = nullptr;
  }

 private:
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* body_ = nullptr;
  int64_t next_ = 0, pieces_ = 0;
  std::atomic<int64_t> active_ = 0;
  std::atomic<uint64_t> round_ = 0;
  std::atomic<bool> stop_ = false;

  // A thread that sleeps takes tens of microseconds to wake, and one parallel loop often follows another.
  template <class Done>
  static void linger(const Done& done) {
    using clock = std::chrono::steady_clock;
    for (const auto until = clock::now() + std::chrono::microseconds(20); !done() && clock::now() < until;) {
#if defined(__x86_64__)
      for (int i = 0; i < 8; i++) __builtin_ia32_pause();
#endif
    }
  }

  void work(std::unique_lock<std::mutex>& lock) {
    while (body_ && next_ < pieces_) {
      const int64_t piece = next_++;
      active_++;
      const auto* body = body_;
      lock.unlock();
      (*body)(piece);
      lock.lock();
      if (--active_ == 0 && next_ >= pieces_) done_.notify_all();
    }
  }
  void loop() {
    std::unique_lock lock(mutex_);
    uint64_t seen = 0;
    for (;;) {
      lock.unlock();
      linger([&] { return stop_ || round_ != seen; });
      lock.lock();
      wake_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      work(lock);
    }
  }
};

void parallel_for(dc_context* c, int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  if (!c) return body(0, n);
  const int64_t most = std::max<int64_t>(1, n / std::max<int64_t>(1, grain));
  const int64_t pieces = std::min<int64_t>(most, c->threads == 1 ? 1 : int64_t(c->threads) * 4);
  if (pieces == 1) return body(0, n);
  c->pool->run(pieces, [&](int64_t p) {
    const int64_t begin = n * p / pieces, end = n * (p + 1) / pieces;
    if (begin < end) body(begin, end);
  });
}

int fail(dc_context* c, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  c->error = text;
  return 1;
}

}  // namespace dc

namespace {

int option_int(const char* json, const char* key, int otherwise) {
  const std::string quoted = std::string("\"") + key + "\":";
  const char* at = json ? strstr(json, quoted.c_str()) : nullptr;
  return at ? atoi(at + quoted.size()) : otherwise;
}

dc_context* open_cpu(int, const char* options, char*, size_t) {
  auto* c = new dc_context();
  const int cores = int(std::max(1u, std::thread::hardware_concurrency()));
  c->threads = std::max(1, option_int(options, "threads", cores));
  c->pool = new dc::ThreadPool(c->threads);
  c->blas = option_int(options, "blas", 1) ? dc_blas_find(c->threads) : nullptr;
  return c;
}
void close_cpu(dc_context* c) {
  delete c->pool;
  delete c;
}
int info_cpu(dc_context* c, char* json, size_t bytes) {
  const long page = sysconf(_SC_PAGESIZE);
  snprintf(json, bytes,
           "{\"name\":\"CPU\",\"threads\":%d,\"isa\":\"%s%s\",\"memory\":{\"total\":%.0f,\"free\":%.0f},\"blas\":%s}",
           c->threads, dc_isa(), !dc::bf16_panels() ? "" : (std::string("+") + dc::bf16_panels()->name).c_str(),
           double(sysconf(_SC_PHYS_PAGES)) * page, double(sysconf(_SC_AVPHYS_PAGES)) * page, dc_blas_describe(c->blas).c_str());
  return 0;
}
const char* last_error(dc_context* c) { return c->error.c_str(); }

void* alloc_cpu(dc_context*, size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, bytes >= (1 << 21) ? (1 << 21) : 64, bytes) != 0) return nullptr;
  if (bytes >= (1 << 21)) madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}
void free_cpu(dc_context*, void* data) { free(data); }
int copy_cpu(dc_context*, void* dst, const void* src, size_t bytes) {
  memcpy(dst, src, bytes);
  return 0;
}
int nothing(dc_context*) { return 0; }

template <class Call>
int transfer(Call call, size_t bytes, size_t piece, int* system_error) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = call(done, std::min(piece, bytes - done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      *system_error = n < 0 ? errno : 0;
      return 1;
    }
    done += size_t(n);
  }
  return 0;
}
int read_cpu(dc_context*, int fd, uint64_t offset, void* dst, size_t bytes, int* system_error) {
  return transfer([&](size_t done, size_t n) { return pread(fd, static_cast<char*>(dst) + done, n, off_t(offset + done)); },
                  bytes, 1 << 24, system_error);
}
// Small pieces: for a large one Linux takes large pages, which a virtual machine may have to fetch from its host first
// (335 MB of new pages: 0.14 s of system time by pieces of 64 to 512 KB, 0.13 to 0.91 s by 1 MB and more).
int write_cpu(dc_context*, int fd, uint64_t offset, const void* src, size_t bytes, int* system_error) {
  return transfer(
      [&](size_t done, size_t n) { return pwrite(fd, static_cast<const char*>(src) + done, n, off_t(offset + done)); },
      bytes, 1 << 18, system_error);
}

}  // namespace

// Every op is a function dc_cpu_NAME in one of the files beside this one; a missing one leaves its slot NULL.
#define X(name, t, i, f) extern "C" int dc_cpu_##name(dc_context*, const dc_call*) __attribute__((weak));
DC_OPS(X)
#undef X

extern "C" const dc_backend* dc_cpu_backend(void) {
  static const dc_backend backend = {
      DC_ABI,    "cpu",    open_cpu, close_cpu, info_cpu, last_error, alloc_cpu,
      free_cpu,  copy_cpu, copy_cpu, nothing,   nothing,  read_cpu,   write_cpu,
      dc_cpu_join, dc_cpu_part, dc_cpu_collective,
      {
#define X(name, t, i, f) dc_cpu_##name,
          DC_OPS(X)
#undef X
      },
  };
  return &backend;
}
