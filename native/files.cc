#include "files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "backend.h"
#include "settler.h"
#include "sha256.h"

namespace {

// What is read stays in the core's cache until it has been used.
constexpr size_t kPiece = 128 << 10;

// Bytes read, fewer only at the file's end; -1 with errno.
int64_t read_at(int fd, void* into, size_t bytes, uint64_t position) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t n = pread(fd, static_cast<char*>(into) + done, bytes - done, off_t(position + done));
    if (n == 0) break;
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return -1;
    done += size_t(n);
  }
  return int64_t(done);
}

int write_at(int fd, const char* from, size_t bytes, uint64_t position) {
  while (bytes > 0) {
    const ssize_t n = pwrite(fd, from, bytes, off_t(position));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    from += n, bytes -= size_t(n), position += uint64_t(n);
  }
  return 0;
}

// All bits of the exponent set: infinite or not a number.
template <typename Bits>
uint64_t count_odd(const char* data, size_t bytes, Bits exponent) {
  const Bits* values = reinterpret_cast<const Bits*>(data);
  const size_t n = bytes / sizeof(Bits);
  uint64_t odd = 0;
  for (size_t i = 0; i < n;) {
    Bits some = 0;  // whether there is any, in a form that takes the widest vectors
    const size_t end = std::min(n, i + 4096);
    for (size_t j = i; j < end; j++) some |= Bits((values[j] & exponent) == exponent);
    if (some)
      for (size_t j = i; j < end; j++) odd += (values[j] & exponent) == exponent;
    i = end;
  }
  return odd;
}

struct File {
  int fd = -1;
  std::string path;
  int owner;
  uint64_t read = 0;      // bytes taken from the file
  uint32_t state[8];
  uint8_t tail[64];       // bytes behind the last whole block
  size_t tail_bytes = 0;
  bool busy = false, dropped = false;
  struct Request {
    uint64_t to;
    bool end;
    Settler* settler;
  };
  std::deque<Request> requests;
  ~File() {
    if (fd >= 0) close(fd);
  }
};

// Threads that hash files, two at once where two have something to hash, of different owners if possible: what is read
// and what is written then advance together.
class Engine {
 public:
  static Engine& get() {
    static Engine* engine = new Engine();  // never destroyed: its threads outlive main
    return *engine;
  }
  void add(const std::shared_ptr<File>& file, File::Request request) {
    std::lock_guard lock(mutex_);
    file->requests.push_back(request);
    if (file->requests.size() == 1 && !file->busy) ready_.push_back(file);
    wake_.notify_one();
  }
  void drop(const std::shared_ptr<File>& file) {
    std::lock_guard lock(mutex_);
    file->dropped = true;
    ready_.erase(std::remove(ready_.begin(), ready_.end(), file), ready_.end());
    if (!file->busy) give_up(*file);
  }

 private:
  struct Lane {
    std::shared_ptr<File> file;
    std::vector<uint8_t> buffer = std::vector<uint8_t>(kPiece + 64);
    size_t begin = 0, end = 0;
    uint64_t to = 0;
    size_t blocks() const { return (end - begin) / 64; }
  };

  Engine() {
    const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
    for (unsigned i = 0; i < std::clamp(cores / 4, 1u, 4u); i++) std::thread([this] { loop(); }).detach();
  }

  static void give_up(File& file) {
    for (auto& request : file.requests) request.settler->settle({"the checksum was given up", "DC_CLOSED", {}});
    file.requests.clear();
  }

  // Under the lock.
  bool take(Lane& lane, const Lane& other) {
    if (ready_.empty()) return false;
    auto it = std::find_if(ready_.begin(), ready_.end(), [&](auto& file) { return !other.file || file->owner != other.file->owner; });
    if (it == ready_.end()) it = ready_.begin();
    lane.file = *it;
    ready_.erase(it);
    File& file = *lane.file;
    file.busy = true;
    std::memcpy(lane.buffer.data(), file.tail, file.tail_bytes);
    lane.begin = 0, lane.end = file.tail_bytes;
    lane.to = file.requests.front().to;
    if (file.requests.front().end) {
      struct stat facts;
      lane.to = fstat(file.fd, &facts) == 0 ? uint64_t(facts.st_size) : file.read;
    }
    return true;
  }

  // Reads on; answers the request when it is through or fails. False: the lane is free again.
  bool fill(Lane& lane) {
    File& file = *lane.file;
    if (lane.blocks() > 0) return true;
    std::memmove(lane.buffer.data(), lane.buffer.data() + lane.begin, lane.end - lane.begin);
    lane.end -= lane.begin;
    lane.begin = 0;
    const size_t want = size_t(std::min<uint64_t>(kPiece, lane.to > file.read ? lane.to - file.read : 0));
    bool dropped;
    {
      std::lock_guard lock(mutex_);
      dropped = file.dropped;
    }
    if (want > 0 && !dropped) {
      const int64_t n = read_at(file.fd, lane.buffer.data() + lane.end, want, file.read);
      if (n != int64_t(want)) {
        const std::string what = n < 0 ? std::strerror(errno) : "the file ends at byte " + std::to_string(file.read + uint64_t(n)) + ", before byte " + std::to_string(lane.to);
        return release(lane, {what, n < 0 && errno == EIO ? "EIO" : "DC_EOF", {}});
      }
      file.read += want;
      lane.end += want;
      if (lane.blocks() > 0 || file.read < lane.to) return true;
    }
    if (dropped) return release(lane, {"the checksum was given up", "DC_CLOSED", {}});
    file.tail_bytes = lane.end;
    std::memcpy(file.tail, lane.buffer.data(), lane.end);
    Outcome outcome;
    if (file.requests.front().end) {
      const std::string hex = finish(file);
      outcome.value = [hex](Napi::Env env) -> Napi::Value { return Napi::String::New(env, hex); };
    }
    return release(lane, std::move(outcome));
  }

  bool release(Lane& lane, Outcome outcome) {
    std::shared_ptr<File> file = std::move(lane.file);
    lane.file = nullptr;
    std::lock_guard lock(mutex_);
    Settler* settler = file->requests.front().settler;
    file->requests.pop_front();
    file->busy = false;
    if (file->dropped) give_up(*file);
    else if (!file->requests.empty()) ready_.push_back(file);
    settler->settle(std::move(outcome));
    return false;
  }

  static std::string finish(File& file) {
    uint8_t end[128] = {};
    std::memcpy(end, file.tail, file.tail_bytes);
    end[file.tail_bytes] = 0x80;
    const size_t blocks = file.tail_bytes < 56 ? 1 : 2;
    for (int i = 0; i < 8; i++) end[64 * blocks - 1 - size_t(i)] = uint8_t((file.read * 8) >> (8 * i));
    uint32_t* state = file.state;
    const uint8_t* data = end;
    sha256_blocks(1, &state, &data, blocks);
    char hex[65];
    for (int i = 0; i < 8; i++) std::snprintf(hex + 8 * i, 9, "%08x", file.state[i]);
    return hex;
  }

  void loop() {
    Lane lanes[2];
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return lanes[0].file || lanes[1].file || !ready_.empty(); });
        for (int l = 0; l < 2; l++)
          if (!lanes[l].file) take(lanes[l], lanes[1 - l]);
      }
      uint32_t* state[2];
      const uint8_t* data[2];
      Lane* active[2];
      int n = 0;
      for (auto& lane : lanes) {
        if (!lane.file || !fill(lane) || lane.blocks() == 0) continue;
        active[n] = &lane;
        state[n] = lane.file->state;
        data[n++] = lane.buffer.data() + lane.begin;
      }
      if (n == 0) continue;
      const size_t blocks = n == 2 ? std::min(active[0]->blocks(), active[1]->blocks()) : active[0]->blocks();
      sha256_blocks(n, state, data, blocks);
      for (int i = 0; i < n; i++) active[i]->begin += 64 * blocks;
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<File>> ready_;
};

// The files of one owner.
class Hasher : public Napi::ObjectWrap<Hasher> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "Hasher",
                       {InstanceMethod<&Hasher::Open>("open"), InstanceMethod<&Hasher::Advance>("advance"),
                        InstanceMethod<&Hasher::Finish>("finish"), InstanceMethod<&Hasher::Drop>("drop")});
  }
  explicit Hasher(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Hasher>(info) {
    static int owners = 0;
    owner_ = owners++;
  }
  ~Hasher() override {
    for (auto& [id, file] : files_) Engine::get().drop(file);
  }

 private:
  int owner_;
  uint32_t next_ = 1;
  std::unordered_map<uint32_t, std::shared_ptr<File>> files_;

  // open(path) -> the file's number
  Napi::Value Open(const Napi::CallbackInfo& info) {
    auto file = std::make_shared<File>();
    file->path = info[0].As<Napi::String>();
    file->owner = owner_;
    file->fd = open(file->path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file->fd < 0) {
      Napi::Error error = Napi::Error::New(info.Env(), std::strerror(errno));
      error.Set("code", errno == ENOENT ? "ENOENT" : errno == EACCES ? "EACCES" : errno == EMFILE ? "EMFILE" : "EIO");
      throw error;
    }
    std::memcpy(file->state, kSha256Start, sizeof file->state);
    files_[next_] = file;
    return Napi::Number::New(info.Env(), next_++);
  }
  // advance(file, to): hashes on to byte `to`
  Napi::Value Advance(const Napi::CallbackInfo& info) {
    return ask(info, uint64_t(info[1].As<Napi::Number>().DoubleValue()), false);
  }
  // finish(file) -> SHA-256 in hex of all of the file
  Napi::Value Finish(const Napi::CallbackInfo& info) {
    auto promise = ask(info, 0, true);
    return promise;
  }
  Napi::Value ask(const Napi::CallbackInfo& info, uint64_t to, bool end) {
    auto* settler = new Settler(info.Env());
    auto promise = settler->promise();
    Engine::get().add(files_.at(info[0].As<Napi::Number>().Uint32Value()), {to, end, settler});
    return promise;
  }
  // drop(file): closes it; what it was asked fails with DC_CLOSED
  void Drop(const Napi::CallbackInfo& info) {
    auto it = files_.find(info[0].As<Napi::Number>().Uint32Value());
    if (it == files_.end()) return;
    Engine::get().drop(it->second);
    files_.erase(it);
  }
};

}  // namespace

void define_hasher(Napi::Env env, Napi::Object exports) {
  if (sha256_lanes() > 0) exports.Set("Hasher", Hasher::define(env));
}

int copy_range(int in, uint64_t from, int out, uint64_t to, uint64_t bytes, int dtype, uint64_t* odd) {
  static thread_local std::vector<char> buffer(kPiece);
  while (bytes > 0) {
    const size_t some = size_t(std::min<uint64_t>(bytes, kPiece));
    const int64_t n = read_at(in, buffer.data(), some, from);
    if (n < 0) return errno;
    if (size_t(n) < some) return -1;
    switch (dtype) {
      case DC_F32: *odd += count_odd<uint32_t>(buffer.data(), some, 0x7f800000); break;
      case DC_BF16: *odd += count_odd<uint16_t>(buffer.data(), some, 0x7f80); break;
      case DC_F16: *odd += count_odd<uint16_t>(buffer.data(), some, 0x7c00); break;
    }
    if (const int error = write_at(out, buffer.data(), some, to)) return error;
    from += some, to += some, bytes -= some;
  }
  return 0;
}
