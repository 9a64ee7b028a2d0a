// Node's door to the backends: device buffers by number, one in-order queue thread per device, I/O threads, promises.
// Everything here is the same for CPU and CUDA; what differs stands behind dc_backend.
#include <dlfcn.h>
#include <napi.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unistd.h>
#include <vector>

#include "assign_addon.h"
#include "backend.h"
#include "bpe_addon.h"
#include "files.h"
#include "meeting.h"
#include "settler.h"

extern "C" const dc_backend* dc_cpu_backend(void);
Napi::Object define_scanner(Napi::Env env);  // scan_addon.cc

namespace {

struct OpInfo {
  const char *name, *tensors, *ints, *floats;
};
const OpInfo kOps[] = {
#define X(name, t, i, f) {#name, t, i, f},
    DC_OPS(X)
#undef X
};

const char* const kCollectives[] = {"all_reduce", "reduce_scatter", "all_gather"};
static_assert(sizeof kCollectives / sizeof *kCollectives == DC_COLLECTIVE_COUNT);

size_t dtype_size(int dtype) {
  static const uint8_t size[] = {4, 2, 2, 8, 1, 1, 2, 2, 4, 4, 8, 8, 1, 1, 1};
  return dtype >= 0 && dtype < int(sizeof(size)) ? size[dtype] : 0;
}

std::atomic<int> open_devices{0};

struct Block {
  void* data;
  size_t bytes;
  uint64_t fence;  // last task that may still use this memory
};

// Memory of one device: freed blocks are kept by size and given out again, in queue order.
class Allocator {
 public:
  Allocator(const dc_backend* backend, dc_context* context) : backend_(backend), context_(context) {}

  size_t limit = 0;  // bytes, 0 = none
  size_t used = 0, reserved = 0, peak = 0;

  static size_t rounded(size_t bytes) {
    const size_t step = bytes < (1 << 20) ? 512 : (1 << 21);
    return std::max<size_t>(step, (bytes + step - 1) / step * step);
  }
  // `drain` waits until the queue is empty, so that cached blocks can go back to the system.
  bool alloc(size_t bytes, Block* out, const std::function<void()>& drain) {
    const size_t want = rounded(bytes);
    auto it = cache_.lower_bound(want);
    if (it != cache_.end() && it->first <= want + want / 4 + 4096) {
      *out = it->second;
      cache_.erase(it);
    } else {
      if (limit && reserved + want > limit) trim(drain);
      if (limit && used + want > limit) return false;
      void* data = backend_->alloc(context_, want);
      if (!data) {
        trim(drain);
        data = backend_->alloc(context_, want);
        if (!data) return false;
      }
      *out = {data, want, 0};
      reserved += want;
    }
    used += out->bytes;
    peak = std::max(peak, used);
    return true;
  }
  void release(Block block, uint64_t fence) {
    used -= block.bytes;
    block.fence = fence;
    cache_.emplace(block.bytes, block);
  }
  void trim(const std::function<void()>& drain) {
    if (cache_.empty()) return;
    drain();
    for (auto& [bytes, block] : cache_) {
      backend_->free(context_, block.data);
      reserved -= bytes;
    }
    cache_.clear();
  }

 private:
  const dc_backend* backend_;
  dc_context* context_;
  std::multimap<size_t, Block> cache_;
};

class Device : public Napi::ObjectWrap<Device> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "Device",
                       {InstanceMethod<&Device::Alloc>("alloc"), InstanceMethod<&Device::Free>("free"),
                        InstanceMethod<&Device::Run>("run"), InstanceMethod<&Device::Upload>("upload"),
                        InstanceMethod<&Device::Download>("download"), InstanceMethod<&Device::ReadFile>("readFile"),
                        InstanceMethod<&Device::WriteFile>("writeFile"), InstanceMethod<&Device::CopyRange>("copyRange"),
                        InstanceMethod<&Device::Sync>("sync"), InstanceMethod<&Device::Stats>("stats"), InstanceMethod<&Device::ResetPeak>("resetPeak"),
                        InstanceMethod<&Device::Trim>("trim"), InstanceMethod<&Device::Info>("info"),
                        InstanceMethod<&Device::Trace>("trace"), InstanceMethod<&Device::Has>("has"),
                        InstanceMethod<&Device::Collective>("collective"),
                        InstanceMethod<&Device::Close>("close")});
  }

  // new Device(library path or "", device index, options JSON, memory limit in bytes, I/O threads, poison)
  explicit Device(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Device>(info) {
    Napi::Env env = info.Env();
    const std::string path = info[0].As<Napi::String>();
    if (path.empty()) {
      backend_ = dc_cpu_backend();
    } else {
      void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (!library) throw Napi::Error::New(env, dlerror());
      auto get = reinterpret_cast<const dc_backend* (*)()>(dlsym(library, "dc_backend_get"));
      if (!get) throw Napi::Error::New(env, path + " is not a deepseek-convert backend");
      backend_ = get();
    }
    if (backend_->abi != DC_ABI) {
      throw Napi::Error::New(env, path + ": native ABI " + std::to_string(backend_->abi) + ", this program needs " +
                                      std::to_string(DC_ABI) + ": rebuild with npm run build:cuda");
    }
    char error[4096] = "";
    const std::string options = info[2].As<Napi::String>();
    context_ = backend_->open(info[1].As<Napi::Number>().Int32Value(), options.c_str(), error, sizeof error);
    if (!context_) throw Napi::Error::New(env, error);
    memory_ = std::make_unique<Allocator>(backend_, context_);
    memory_->limit = size_t(info[3].As<Napi::Number>().DoubleValue());
    poison_ = info[5].As<Napi::Boolean>();
    queue_thread_ = std::thread([this] { queue_loop(); });
    const int io_threads = std::max(1, info[4].As<Napi::Number>().Int32Value());
    later_most_ = (io_threads + 1) / 2;
    for (int i = 0; i < io_threads; i++) io_threads_.emplace_back([this] { io_loop(); });
    napi_add_env_cleanup_hook(env, on_cleanup, this);
    Ref();  // lives until close: its threads hold `this`
    open_devices++;
  }

  // join(devices): they become ranks 0..n-1 of a group, for `collective`; a device is in one group at most.
  static void Join(const Napi::CallbackInfo& info) {
    auto list = info[0].As<Napi::Array>();
    std::vector<Device*> devices;
    std::vector<dc_context*> contexts;
    for (uint32_t i = 0; i < list.Length(); i++) {
      devices.push_back(Unwrap(list.Get(i).As<Napi::Object>()));
      contexts.push_back(devices[i]->context_);
      if (devices[i]->closed_ || devices[i]->meeting_ || devices[i]->backend_ != devices[0]->backend_)
        throw Napi::Error::New(info.Env(), "devices of one backend that are in no group yet are needed");
    }
    char error[4096] = "";
    const dc_backend* backend = devices.at(0)->backend_;
    dc_group* group = backend->join(contexts.data(), int(contexts.size()), error, sizeof error);
    if (!group) throw Napi::Error::New(info.Env(), error);
    auto meeting = std::make_shared<Meeting>(backend, group, int(devices.size()));
    for (size_t i = 0; i < devices.size(); i++) devices[i]->meeting_ = meeting, devices[i]->rank_ = int(i);
  }

 private:
  const dc_backend* backend_;
  dc_context* context_ = nullptr;
  std::shared_ptr<Meeting> meeting_;  // of the group that this device is in
  int rank_ = 0;
  std::unique_ptr<Allocator> memory_;
  std::unordered_map<uint32_t, std::shared_ptr<Block>> buffers_;
  uint32_t next_buffer_ = 1;
  bool poison_ = false, closed_ = false;

  std::mutex mutex_;
  std::condition_variable queue_wake_, io_wake_, progress_;
  std::deque<std::function<void()>> queue_;
  std::deque<std::function<void()>> io_, io_later_;
  int later_threads_ = 0, later_most_ = 1;  // so many at most work on io_later_, when nothing else waits
  uint64_t enqueued_ = 0, launched_ = 0, complete_ = 0;  // task counts
  bool stop_ = false;
  std::string failure_;  // of the first failed op; later ops are skipped until it has been reported
  std::atomic<bool> trace_{false};                  // each op is waited for and timed
  std::map<std::string, std::pair<uint64_t, double>> traced_;  // by operation and sizes: calls, seconds
  std::thread queue_thread_;
  std::vector<std::thread> io_threads_;

  void queue_loop() {
    std::unique_lock lock(mutex_);
    for (;;) {
      queue_wake_.wait(lock, [&] { return stop_ || !queue_.empty(); });
      if (stop_) return;
      auto work = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      work();
      work = nullptr;
      lock.lock();
      launched_++;
      progress_.notify_all();
    }
  }
  bool later_may_run() const { return !io_later_.empty() && later_threads_ < later_most_; }
  void io_loop() {
    std::unique_lock lock(mutex_);
    for (;;) {
      io_wake_.wait(lock, [&] { return stop_ || !io_.empty() || later_may_run(); });
      if (stop_) return;
      const bool later = io_.empty();
      auto& tasks = later ? io_later_ : io_;
      auto work = std::move(tasks.front());
      tasks.pop_front();
      later_threads_ += later;
      lock.unlock();
      work();
      lock.lock();
      if (!later) continue;
      later_threads_--;
      if (!io_later_.empty()) io_wake_.notify_one();
    }
  }
  uint64_t enqueue(std::function<void()> work) {
    std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
    queue_wake_.notify_one();
    return ++enqueued_;
  }
  // Blocks the calling I/O thread until task `ticket` and all before it are complete. False: the device is closing.
  bool wait_for(uint64_t ticket) {
    uint64_t launched;
    {
      std::unique_lock lock(mutex_);
      progress_.wait(lock, [&] { return stop_ || launched_ >= ticket; });
      if (stop_) return false;
      // A fence waits for all that was launched, also behind the ticket: nobody needs a second one.
      if (complete_ >= ticket) return true;
      launched = launched_;
    }
    const bool good = backend_->fence(context_) == 0;
    std::lock_guard lock(mutex_);
    if (good) complete_ = std::max(complete_, launched);
    return true;
  }
  void drain() {
    uint64_t ticket;
    {
      std::lock_guard lock(mutex_);
      ticket = enqueued_;
    }
    wait_for(ticket);
  }
  // Queue thread: takes the failure so that it is reported once.
  Outcome take_failure() {
    std::lock_guard lock(mutex_);
    Outcome outcome{std::move(failure_), "DC_OP_FAILED", {}};
    failure_.clear();
    return outcome;
  }
  std::string failure() {
    std::lock_guard lock(mutex_);
    return failure_;
  }
  bool failed() { return !failure().empty(); }
  void fail(const std::string& text) {
    std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = text;
  }

  std::shared_ptr<Block> buffer(Napi::Env env, uint32_t id) {
    auto it = buffers_.find(id);
    if (closed_) throw Napi::Error::New(env, "the device is closed");
    if (it == buffers_.end()) throw Napi::Error::New(env, "buffer " + std::to_string(id) + " was freed or never made");
    return it->second;
  }
  static char* span(Napi::Env env, const Block& block, double offset, double bytes) {
    if (!(offset >= 0 && bytes >= 0 && offset + bytes <= double(block.bytes)))
      throw Napi::RangeError::New(env, "access beyond the buffer: offset " + std::to_string(offset) + ", bytes " +
                                           std::to_string(bytes) + ", buffer " + std::to_string(block.bytes));
    return static_cast<char*>(block.data) + size_t(offset);
  }

  Napi::Value Alloc(const Napi::CallbackInfo& info) {
    const double bytes = info[0].As<Napi::Number>().DoubleValue();
    if (closed_) throw Napi::Error::New(info.Env(), "the device is closed");
    Block block;
    if (!memory_->alloc(size_t(bytes), &block, [this] { drain(); })) {
      Napi::Error error = Napi::Error::New(
          info.Env(), "cannot allocate " + std::to_string(size_t(bytes) >> 20) + " MB: " +
                          std::to_string(memory_->used >> 20) + " MB in use" +
                          (memory_->limit ? ", limit " + std::to_string(memory_->limit >> 20) + " MB" : ""));
      error.Set("code", "DC_NO_MEMORY");
      throw error;
    }
    const uint32_t id = next_buffer_++;
    buffers_.emplace(id, std::make_shared<Block>(block));
    if (poison_) {
      enqueue([this, block] {
        std::vector<unsigned char> poison(block.bytes, 0xFF);  // NaN as floats, -1 as integers
        backend_->upload(context_, block.data, poison.data(), block.bytes);
      });
    }
    return Napi::Number::New(info.Env(), id);
  }
  // The memory may be given out again at once: whoever gets it is behind us in the queue. File transfers into it wait
  // for its fence; a transfer that still holds the block delays the release.
  void Free(const Napi::CallbackInfo& info) {
    const uint32_t id = info[0].As<Napi::Number>().Uint32Value();
    auto it = buffers_.find(id);
    if (it == buffers_.end()) throw Napi::Error::New(info.Env(), "buffer " + std::to_string(id) + " freed twice");
    if (it->second.use_count() > 1) throw Napi::Error::New(info.Env(), "buffer freed while a file transfer uses it");
    uint64_t ticket;
    {
      std::lock_guard lock(mutex_);
      ticket = enqueued_;
    }
    memory_->release(*it->second, ticket);
    buffers_.erase(it);
  }

  // run(op, numbers, nTensors, nInts, nFloats): numbers = per tensor {buffer (0: absent), byte offset, dtype, rank,
  // dim[4], stride[4]}, then the integers, then the floats.
  void Run(const Napi::CallbackInfo& info) {
    Napi::Env env = info.Env();
    const uint32_t op = info[0].As<Napi::Number>().Uint32Value();
    auto numbers = info[1].As<Napi::Float64Array>();
    const double* n = numbers.Data();
    const int nt = info[2].As<Napi::Number>().Int32Value(), ni = info[3].As<Napi::Number>().Int32Value(),
              nf = info[4].As<Napi::Number>().Int32Value();
    if (op >= DC_OP_COUNT || !backend_->op[op])
      throw Napi::Error::New(env, std::string("op ") + (op < DC_OP_COUNT ? kOps[op].name : "?") +
                                      " does not exist on device " + backend_->name);
    struct Call {
      std::vector<dc_tensor> t;
      std::vector<int64_t> i;
      std::vector<double> f;
    };
    auto call = std::make_shared<Call>();
    call->t.resize(nt);
    for (int k = 0; k < nt; k++, n += 12) {
      dc_tensor& t = call->t[k];
      std::memset(&t, 0, sizeof t);
      for (int d = 0; d < 4; d++) t.dim[d] = 1;
      if (n[0] == 0) continue;
      auto block = buffer(env, uint32_t(n[0]));
      t.dtype = int32_t(n[2]);
      t.rank = int32_t(n[3]);
      double low = 0, high = 0, count = 1;
      for (int d = 0; d < 4; d++) {
        t.dim[d] = int64_t(n[4 + d]);
        t.stride[d] = int64_t(n[8 + d]);
        count *= double(t.dim[d]);
        const double reach = (double(t.dim[d]) - 1) * double(t.stride[d]);
        (reach < 0 ? low : high) += reach;
      }
      const double size = double(dtype_size(t.dtype));
      if (count == 0) low = high = 0;
      if (low < 0) span(env, *block, n[1] + low * size, 0);
      t.data = span(env, *block, n[1], count == 0 ? 0 : (high + 1) * size);
    }
    for (int k = 0; k < ni; k++) call->i.push_back(int64_t(*n++));
    for (int k = 0; k < nf; k++) call->f.push_back(*n++);
    enqueue([this, op, call] {
      if (failed()) return;
      const dc_call c{call->t.data(), call->i.data(), call->f.data(), int32_t(call->t.size()), int32_t(call->i.size()),
                      int32_t(call->f.size())};
      const auto start = std::chrono::steady_clock::now();
      if (backend_->op[op](context_, &c) != 0) fail(std::string(kOps[op].name) + ": " + backend_->last_error(context_));
      timed(kOps[op].name, call->t, start);
    });
  }
  // With `trace`: waits for what was enqueued at `start`, and counts its time under the sizes of the first two tensors.
  void timed(const char* op, const std::vector<dc_tensor>& tensors, std::chrono::steady_clock::time_point start) {
    if (!trace_) return;
    backend_->fence(context_);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::string key = op;
    for (size_t k = 0; k < tensors.size() && k < 2; k++) {
      for (int d = 0; d < tensors[k].rank; d++) key += (d == 0 ? " " : "x") + std::to_string(tensors[k].dim[d]);
    }
    std::lock_guard lock(mutex_);
    auto& row = traced_[key];
    row.first++, row.second += seconds.count();
  }

  // collective(kind, numbers): numbers = per tensor {buffer, byte offset, dtype, elements}. Every device of the group has
  // to be given the same collectives in the same order, and nothing that waits for one of them in between.
  void Collective(const Napi::CallbackInfo& info) {
    const int kind = info[0].As<Napi::Number>().Int32Value();
    auto numbers = info[1].As<Napi::Float64Array>();
    if (!meeting_ || kind < 0 || kind >= DC_COLLECTIVE_COUNT) throw Napi::Error::New(info.Env(), "the device is in no group");
    auto x = std::make_shared<std::vector<dc_tensor>>(numbers.ElementLength() / 4);
    for (size_t k = 0; k < x->size(); k++) {
      const double* n = numbers.Data() + 4 * k;
      auto block = buffer(info.Env(), uint32_t(n[0]));
      void* data = span(info.Env(), *block, n[1], n[3] * double(dtype_size(int(n[2]))));
      (*x)[k] = {data, int32_t(n[2]), 1, {int64_t(n[3]), 1, 1, 1}, {1, 0, 0, 0}};
    }
    enqueue([this, kind, x] {
      const auto start = std::chrono::steady_clock::now();
      const std::string outcome = meeting_->meet(rank_, kind, *x, failure());
      if (!outcome.empty()) fail(std::string(kCollectives[kind]) + ": " + outcome);
      timed(kCollectives[kind], *x, start);
    });
  }

  // upload(buffer, byte offset, bytes): copies now, so that the caller may change its array at once.
  void Upload(const Napi::CallbackInfo& info) {
    auto array = info[2].As<Napi::Uint8Array>();
    auto block = buffer(info.Env(), info[0].As<Napi::Number>().Uint32Value());
    char* dst = span(info.Env(), *block, info[1].As<Napi::Number>().DoubleValue(), double(array.ByteLength()));
    auto data = std::make_shared<std::vector<uint8_t>>(array.Data(), array.Data() + array.ByteLength());
    enqueue([this, dst, data] {
      if (!failed() && backend_->upload(context_, dst, data->data(), data->size()))
        fail(std::string("upload: ") + backend_->last_error(context_));
    });
  }
  // download(buffer, byte offset, into: Uint8Array) -> Promise<the same array>
  Napi::Value Download(const Napi::CallbackInfo& info) {
    auto array = info[2].As<Napi::Uint8Array>();
    auto block = buffer(info.Env(), info[0].As<Napi::Number>().Uint32Value());
    char* src = span(info.Env(), *block, info[1].As<Napi::Number>().DoubleValue(), double(array.ByteLength()));
    auto* settler = new Settler(info.Env());
    settler->keep(array);
    uint8_t* dst = array.Data();
    const size_t bytes = array.ByteLength();
    enqueue([this, settler, src, dst, bytes] {
      if (!failed() && backend_->download(context_, dst, src, bytes))
        fail(std::string("download: ") + backend_->last_error(context_));
      settler->settle(take_failure());
    });
    return settler->promise();
  }
  Napi::Value Sync(const Napi::CallbackInfo& info) {
    auto* settler = new Settler(info.Env());
    enqueue([this, settler] {
      if (backend_->sync(context_)) fail(std::string("sync: ") + backend_->last_error(context_));
      settler->settle(take_failure());
    });
    return settler->promise();
  }

  static const char* io_code(int error) {
    return error == ENOSPC ? "ENOSPC" : error == EIO ? "EIO" : error > 0 ? "DC_IO" : "DC_EOF";
  }
  // File transfers run on I/O threads, beside the queue. Reads wait for the memory's earlier users only; writes for
  // everything enqueued so far.
  Napi::Value transfer(const Napi::CallbackInfo& info, bool read) {
    auto block = buffer(info.Env(), info[0].As<Napi::Number>().Uint32Value());
    const double bytes = info[4].As<Napi::Number>().DoubleValue();
    char* data = span(info.Env(), *block, info[1].As<Napi::Number>().DoubleValue(), bytes);
    const int fd = info[2].As<Napi::Number>().Int32Value();
    const uint64_t position = uint64_t(info[3].As<Napi::Number>().DoubleValue());
    const bool later = !read && info[5].As<Napi::Boolean>();
    auto* settler = new Settler(info.Env());
    std::lock_guard lock(mutex_);
    const uint64_t ticket = read ? (poison_ ? enqueued_ : block->fence) : enqueued_;
    (later ? io_later_ : io_).push_back([this, read, block, data, fd, position, bytes, settler, ticket]() mutable {
      Outcome outcome;
      int system_error = 0;
      if (!wait_for(ticket)) {
        outcome = {"the device is closing", "DC_CLOSED", {}};
      } else if (!read && failed()) {
        outcome = take_failure();
      } else if (read ? backend_->read_file(context_, fd, position, data, size_t(bytes), &system_error)
                      : backend_->write_file(context_, fd, position, data, size_t(bytes), &system_error)) {
        outcome.error = system_error ? std::strerror(system_error)
                                     : std::string(read ? "the file ended early" : backend_->last_error(context_));
        outcome.code = io_code(system_error ? system_error : -1);
      }
      block.reset();  // before the promise settles: its owner may free the buffer then
      settler->settle(std::move(outcome));
    });
    io_wake_.notify_one();
    return settler->promise();
  }
  Napi::Value ReadFile(const Napi::CallbackInfo& info) { return transfer(info, true); }
  Napi::Value WriteFile(const Napi::CallbackInfo& info) { return transfer(info, false); }
  // copyRange(in, from, out, to, bytes, dtype) -> values that are infinite or not a number
  Napi::Value CopyRange(const Napi::CallbackInfo& info) {
    auto number = [&](int i) { return info[size_t(i)].As<Napi::Number>().DoubleValue(); };
    const int in = int(number(0)), out = int(number(2)), dtype = int(number(5));
    const uint64_t from = uint64_t(number(1)), to = uint64_t(number(3)), bytes = uint64_t(number(4));
    auto* settler = new Settler(info.Env());
    std::lock_guard lock(mutex_);
    io_.push_back([=] {
      uint64_t odd = 0;
      const int error = copy_range(in, from, out, to, bytes, dtype, &odd);
      Outcome outcome;
      if (error) outcome = {error < 0 ? "the file ended early" : std::strerror(error), io_code(error), {}};
      outcome.value = [odd](Napi::Env env) -> Napi::Value { return Napi::Number::New(env, double(odd)); };
      settler->settle(std::move(outcome));
    });
    io_wake_.notify_one();
    return settler->promise();
  }

  Napi::Value Stats(const Napi::CallbackInfo& info) {
    auto stats = Napi::Object::New(info.Env());
    stats.Set("used", double(memory_->used));
    stats.Set("reserved", double(memory_->reserved));
    stats.Set("peak", double(memory_->peak));
    stats.Set("limit", double(memory_->limit));
    stats.Set("buffers", double(buffers_.size()));
    return stats;
  }
  void ResetPeak(const Napi::CallbackInfo&) { memory_->peak = memory_->used; }
  void Trim(const Napi::CallbackInfo&) {
    memory_->trim([this] { drain(); });
  }
  Napi::Value Info(const Napi::CallbackInfo& info) {
    std::vector<char> json(1 << 16);
    if (backend_->info(context_, json.data(), json.size())) throw Napi::Error::New(info.Env(), "device information failed");
    return Napi::String::New(info.Env(), json.data());
  }
  Napi::Value Has(const Napi::CallbackInfo& info) {
    const uint32_t op = info[0].As<Napi::Number>().Uint32Value();
    return Napi::Boolean::New(info.Env(), op < DC_OP_COUNT && backend_->op[op]);
  }
  // trace(): calls and seconds by "op sizes" since the device was opened, each op waited for from here on.
  Napi::Value Trace(const Napi::CallbackInfo& info) {
    auto table = Napi::Object::New(info.Env());
    std::lock_guard lock(mutex_);
    trace_ = true;
    for (const auto& [key, spent] : traced_) {
      auto row = Napi::Object::New(info.Env());
      row.Set("calls", double(spent.first));
      row.Set("seconds", spent.second);
      table.Set(key, row);
    }
    return table;
  }
  static void on_cleanup(void* self) { static_cast<Device*>(self)->shut_down(); }
  void shut_down() {
    if (closed_) return;
    closed_ = true;
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      queue_.clear();
      io_.clear();
      io_later_.clear();
    }
    queue_wake_.notify_all();
    io_wake_.notify_all();
    progress_.notify_all();
    if (meeting_) meeting_->close();
    queue_thread_.join();  // the op in progress ends first
    for (auto& thread : io_threads_) thread.join();
    for (auto& [id, block] : buffers_) backend_->free(context_, block->data);
    buffers_.clear();
    memory_->trim([] {});
    backend_->close(context_);
    open_devices--;
  }
  void Close(const Napi::CallbackInfo& info) {
    if (closed_) return;
    napi_remove_env_cleanup_hook(info.Env(), on_cleanup, this);
    shut_down();
    Unref();
  }
};

// process.exit runs no cleanup hooks but the destructors of libraries (OpenBLAS unmaps its buffers), under which an op in
// progress would crash; with a device still open the process ends without them.
#ifdef __GLIBC__
void leave_at_once(int status, void*) {
  if (open_devices > 0) _exit(status);
}
#endif

Napi::Object init(Napi::Env env, Napi::Object exports) {
#ifdef __GLIBC__
  [[maybe_unused]] static const int once = ::on_exit(leave_at_once, nullptr);
#endif
  auto ops = Napi::Array::New(env);
  for (uint32_t i = 0; i < DC_OP_COUNT; i++) {
    auto op = Napi::Object::New(env);
    op.Set("name", kOps[i].name);
    op.Set("tensors", kOps[i].tensors);
    op.Set("ints", kOps[i].ints);
    op.Set("floats", kOps[i].floats);
    ops.Set(i, op);
  }
  exports.Set("ops", ops);
  exports.Set("abi", DC_ABI);
  exports.Set("Device", Device::define(env));
  exports.Set("join", Napi::Function::New<&Device::Join>(env, "join"));
  define_hasher(env, exports);
  exports.Set("assign", define_assign(env));
  exports.Set("BpeTrainer", define_bpe_trainer(env));
  exports.Set("scanner", define_scanner(env));
  return exports;
}

}  // namespace

NODE_API_MODULE(deepseek_convert, init)
