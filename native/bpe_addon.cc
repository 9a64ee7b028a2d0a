// Node's door to the BPE trainer: work runs off the event loop, one piece at a time.
#include "bpe_addon.h"

#include <algorithm>
#include <functional>
#include <thread>

#include "bpe.h"

namespace {

// Runs `work` on a thread of Node's pool and settles a promise with what `result` makes of it.
class Task : public Napi::AsyncWorker {
 public:
  Task(Napi::Env env, Napi::Object keep, std::function<void()> work, std::function<Napi::Value(Napi::Env)> result)
      : Napi::AsyncWorker(env, "deepseek-convert.bpe"),
        deferred_(Napi::Promise::Deferred::New(env)),
        keep_(Napi::Persistent(keep)),
        work_(std::move(work)),
        result_(std::move(result)) {}
  Napi::Promise promise() const { return deferred_.Promise(); }
  void Execute() override { work_(); }
  void OnOK() override { deferred_.Resolve(result_(Env())); }
  void OnError(const Napi::Error& error) override { deferred_.Reject(error.Value()); }

 private:
  Napi::Promise::Deferred deferred_;
  Napi::ObjectReference keep_;  // what the work reads stays alive
  std::function<void()> work_;
  std::function<Napi::Value(Napi::Env)> result_;
};

class BpeTrainer : public Napi::ObjectWrap<BpeTrainer> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "BpeTrainer",
                       {InstanceMethod<&BpeTrainer::Count>("count"), InstanceMethod<&BpeTrainer::Merge>("merge"),
                        InstanceMethod<&BpeTrainer::Made>("made"), InstanceMethod<&BpeTrainer::Stop>("stop")});
  }

  // new BpeTrainer(names of splits)
  explicit BpeTrainer(const Napi::CallbackInfo& info) : Napi::ObjectWrap<BpeTrainer>(info) {
    auto names = info[0].As<Napi::Array>();
    std::vector<bpe::Split> splits(names.Length());
    for (uint32_t i = 0; i < names.Length(); i++) {
      const std::string name = names.Get(i).As<Napi::String>();
      if (!bpe::split_by_name(name, &splits[i])) throw Napi::Error::New(info.Env(), "no split named " + name);
    }
    trainer_ = std::make_unique<bpe::Trainer>(std::move(splits));
  }

 private:
  std::unique_ptr<bpe::Trainer> trainer_;

  Napi::Value run(Napi::Env env, Napi::Object also, std::function<void()> work,
                  std::function<Napi::Value(Napi::Env)> result) {
    auto keep = Napi::Array::New(env);
    keep.Set(0u, Value());
    keep.Set(1u, also);
    auto* task = new Task(env, keep, std::move(work), std::move(result));
    task->Queue();
    return task->promise();
  }

  // count(bytes): -1, or the first byte that is not UTF-8
  Napi::Value Count(const Napi::CallbackInfo& info) {
    auto text = info[0].As<Napi::Uint8Array>();
    auto bad = std::make_shared<int64_t>(-1);
    const int threads = std::max(1u, std::thread::hardware_concurrency());
    return run(
        info.Env(), text,
        [=, data = text.Data(), bytes = text.ByteLength()] { *bad = trainer_->count(data, bytes, threads); },
        [=](Napi::Env env) { return Napi::Number::New(env, double(*bad)); });
  }

  // merge(first tokens, ids of the 256 bytes, vocabulary, least frequency): [left, right, merged] of each merge
  Napi::Value Merge(const Napi::CallbackInfo& info) {
    auto first = info[0].As<Napi::Array>();
    std::vector<std::string> tokens(first.Length());
    for (uint32_t i = 0; i < first.Length(); i++) tokens[i] = first.Get(i).As<Napi::String>();
    auto bytes = info[1].As<Napi::Int32Array>();
    const size_t vocabulary = info[2].As<Napi::Number>().Uint32Value();
    const int64_t least = info[3].As<Napi::Number>().Int64Value();
    auto merges = std::make_shared<std::vector<bpe::Merge>>();
    return run(
        info.Env(), bytes,
        [=, tokens = std::move(tokens), ids = bytes.Data()]() mutable {
          *merges = trainer_->merge(std::move(tokens), ids, vocabulary, least);
        },
        [=](Napi::Env env) {
          auto flat = Napi::Int32Array::New(env, 3 * merges->size());
          static_assert(sizeof(bpe::Merge) == 3 * sizeof(int32_t));
          std::copy_n(reinterpret_cast<const int32_t*>(merges->data()), flat.ElementLength(), flat.Data());
          return flat;
        });
  }

  Napi::Value Made(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), trainer_->made); }
  void Stop(const Napi::CallbackInfo&) { trainer_->stop = true; }
};

}  // namespace

Napi::Function define_bpe_trainer(Napi::Env env) { return BpeTrainer::define(env); }
