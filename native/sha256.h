// SHA-256 (FIPS 180-4) by the SHA extensions of x86, one or two messages at once: a message alone waits for the latency
// of its own rounds, two side by side take little longer than one.
#pragma once

#include <cstddef>
#include <cstdint>

// Messages that go together; 0: this machine has no such instructions.
int sha256_lanes();

extern const uint32_t kSha256Start[8];

// state[l] [8] goes over blocks x 64 bytes at data[l]; lanes: 1 or 2.
void sha256_blocks(int lanes, uint32_t* const* state, const uint8_t* const* data, size_t blocks);
