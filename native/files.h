// Whole files beside the devices: checksums that follow a file while it grows, copies from file to file.
#pragma once

#include <napi.h>

#include <cstdint>
#include <string>

// exports.Hasher, where the machine hashes faster than Node does.
void define_hasher(Napi::Env env, Napi::Object exports);

// Copies bytes between files; where `dtype` is f32, bf16 or f16, `*odd` counts the values that are infinite or
// not a number. Returns 0, or an errno, or -1 where the input ends early.
int copy_range(int in, uint64_t from, int out, uint64_t to, uint64_t bytes, int dtype, uint64_t* odd);
