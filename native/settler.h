// Promises that native threads settle.
#pragma once

#include <napi.h>

#include <functional>
#include <string>
#include <utility>

// What a promise is settled with, on the JS thread.
struct Outcome {
  std::string error, code;
  std::function<Napi::Value(Napi::Env)> value;  // what it is resolved with; nothing: undefined
};

// A promise that any thread may settle once.
class Settler {
 public:
  explicit Settler(Napi::Env env) : deferred_(Napi::Promise::Deferred::New(env)) {
    tsfn_ = Napi::ThreadSafeFunction::New(env, Napi::Function(), "deepseek-convert", 0, 1);
  }
  Napi::Promise promise() const { return deferred_.Promise(); }
  void keep(Napi::Object value) { kept_ = Napi::Persistent(value); }  // resolved with it; kept alive until then
  void settle(Outcome outcome) {
    auto* self = this;
    auto* result = new Outcome(std::move(outcome));
    auto tsfn = tsfn_;
    if (tsfn.BlockingCall(result, [self](Napi::Env env, Napi::Function, Outcome* r) {
          Napi::HandleScope scope(env);
          if (r->error.empty()) {
            self->deferred_.Resolve(!self->kept_.IsEmpty() ? Napi::Value(self->kept_.Value())
                                    : r->value            ? r->value(env)
                                                          : env.Undefined());
          } else {
            Napi::Error error = Napi::Error::New(env, r->error);
            error.Set("code", r->code);
            self->deferred_.Reject(error.Value());
          }
          delete r;
          delete self;
        }) != napi_ok) {
      delete result;  // the environment is going away
    }
    tsfn.Release();
  }

 private:
  Napi::Promise::Deferred deferred_;
  Napi::ThreadSafeFunction tsfn_;
  Napi::ObjectReference kept_;
};
