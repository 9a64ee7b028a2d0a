// Node's door to the balanced assignment.
#include "assign_addon.h"

#include <algorithm>
#include <memory>
#include <thread>
#include <vector>

#include "assign.h"
#include "settler.h"

namespace {

template <class T, class Array>
std::vector<T> copied(const Napi::Value& value) {
  auto array = value.As<Array>();
  return std::vector<T>(array.Data(), array.Data() + array.ElementLength());
}
template <class Array, class T>
Array given(Napi::Env env, const std::vector<T>& values) {
  auto array = Array::New(env, values.size());
  std::copy(values.begin(), values.end(), array.Data());
  return array;
}

struct Assignment {
  std::vector<float> scores;
  std::vector<int32_t> capacities, places;
  std::vector<double> prices;
  double epsilon;
};

Napi::Value assign(const Napi::CallbackInfo& info) {
  auto* settler = new Settler(info.Env());
  auto promise = settler->promise();
  auto work = std::make_shared<Assignment>();
  work->scores = copied<float, Napi::Float32Array>(info[0]);
  work->capacities = copied<int32_t, Napi::Int32Array>(info[1]);
  work->prices = copied<double, Napi::Float64Array>(info[2]);
  work->epsilon = info[3].As<Napi::Number>().DoubleValue();
  std::thread([settler, work] {
    const char* wrong = dc::assign_balanced(std::move(work->scores), work->capacities, work->epsilon, &work->places, &work->prices);
    settler->settle({wrong ? wrong : "", wrong ? "DC_ASSIGN" : "", [work](Napi::Env env) -> Napi::Value {
                       auto result = Napi::Object::New(env);
                       result.Set("places", given<Napi::Int32Array>(env, work->places));
                       result.Set("prices", given<Napi::Float64Array>(env, work->prices));
                       return result;
                     }});
  }).detach();
  return promise;
}

}  // namespace

Napi::Function define_assign(Napi::Env env) { return Napi::Function::New(env, assign, "assign"); }
