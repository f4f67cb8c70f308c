// Philox 4x32-10: random words from a counter and a key, the same on every processor.
//
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Nothing is stored between draws: a
// mask is recomputed from its position. Plain C++17 on the CPU, host and device code under nvcc. Internal linkage and
// no std:: templates, since the cpu backend compiles it once per instruction set (isa.h).
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define ACQCORE_PHILOX __host__ __device__ inline
#else
#define ACQCORE_PHILOX static inline
#endif

namespace acqcore {

// Writes four random words for `counter` under `key`.
ACQCORE_PHILOX void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t(0xD2511F53u) * c0;
    const uint64_t odd = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(odd >> 32) ^ c1 ^ k0;
    c1 = uint32_t(odd);
    c2 = uint32_t(even >> 32) ^ c3 ^ k1;
    c3 = uint32_t(even);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// Words for columns [4 group, 4 group + 4) of a position, sample, draw and site; dropout with probability p keeps a
// column if its word >= floor(p 2^32). draw and site < 2^16.
ACQCORE_PHILOX void mask_words(uint64_t seed, uint32_t group, uint32_t position, uint32_t sample, uint32_t draw,
                               uint32_t site, uint32_t out[4]) {
  const uint32_t counter[4] = {group, position, sample, draw | site << 16};
  const uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  philox4x32(counter, key, out);
}

// The site of signs in a counter: column v uses bit v % 32 of word v / 32 % 4 of group v / 128, where 1 means +1, and
// the probe replaces the draw. Mask sites count a model's layers from 0.
constexpr uint32_t kSignSite = 0xFFFF;

}  // namespace acqcore
