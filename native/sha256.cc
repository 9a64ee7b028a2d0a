#include "sha256.h"

const uint32_t kSha256Start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

namespace {

alignas(16) const uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// The instructions keep the state as the words ABEF and CDGH.
template <int kLanes>
__attribute__((target("sha,sse4.1"))) void run(uint32_t* const* state, const uint8_t* const* data, size_t blocks) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i abef[kLanes], cdgh[kLanes];
  for (int l = 0; l < kLanes; l++) {
    const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(state[l])), 0xb1);
    const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(state[l] + 4)), 0x1b);
    abef[l] = _mm_alignr_epi8(cdab, efgh, 8);
    cdgh[l] = _mm_blend_epi16(efgh, cdab, 0xf0);
  }
  for (size_t b = 0; b < blocks; b++) {
    __m128i a[kLanes], c[kLanes], words[kLanes][4];
    for (int l = 0; l < kLanes; l++) a[l] = abef[l], c[l] = cdgh[l];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {  // four rounds each
#pragma GCC unroll 2
      for (int l = 0; l < kLanes; l++) {
        __m128i* w = words[l];
        if (r < 4) {
          w[r] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data[l] + 64 * b + 16 * r)), big_endian);
        } else {  // the schedule's next four words, in place of the oldest
          const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[r % 4], w[(r + 1) % 4]), _mm_alignr_epi8(w[(r + 3) % 4], w[(r + 2) % 4], 4));
          w[r % 4] = _mm_sha256msg2_epu32(sum, w[(r + 3) % 4]);
        }
        const __m128i k = _mm_add_epi32(w[r % 4], _mm_load_si128(reinterpret_cast<const __m128i*>(kRound + 4 * r)));
        c[l] = _mm_sha256rnds2_epu32(c[l], a[l], k);
        a[l] = _mm_sha256rnds2_epu32(a[l], c[l], _mm_shuffle_epi32(k, 0x0e));
      }
    }
    for (int l = 0; l < kLanes; l++) {
      abef[l] = _mm_add_epi32(abef[l], a[l]);
      cdgh[l] = _mm_add_epi32(cdgh[l], c[l]);
    }
  }
  for (int l = 0; l < kLanes; l++) {
    const __m128i feba = _mm_shuffle_epi32(abef[l], 0x1b), dchg = _mm_shuffle_epi32(cdgh[l], 0xb1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state[l]), _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state[l] + 4), _mm_alignr_epi8(dchg, feba, 8));
  }
}

}  // namespace

int sha256_lanes() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 29)) && __builtin_cpu_supports("sse4.1") ? 2 : 0;
}

void sha256_blocks(int lanes, uint32_t* const* state, const uint8_t* const* data, size_t blocks) {
  if (lanes == 2) run<2>(state, data, blocks);
  else run<1>(state, data, blocks);
}

#else

int sha256_lanes() { return 0; }
void sha256_blocks(int, uint32_t* const*, const uint8_t* const*, size_t) {}

#endif
