#pragma once
#include <napi.h>

Napi::Function define_bpe_trainer(Napi::Env env);
