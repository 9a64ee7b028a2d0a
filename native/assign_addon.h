#pragma once
#include <napi.h>

// assign(scores f32 [n, E], capacities i32 [E], prices f64 [E], epsilon): a promise of { places i32 [n], prices f64 [E] }.
// See assign.h. Every call has a thread of its own.
Napi::Function define_assign(Napi::Env env);
