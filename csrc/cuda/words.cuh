// Logits in memory layout: 4-byte words of one float32, or of two bfloat16 or float16 (the lower column in the low
// half). Maxima and minima are taken on whole words, both halves at once: 0.5 instructions per logit instead of 1.
#pragma once
#include "../cpu/matrix.h"
#include "warp.cuh"

namespace acqcore::cuda {

ACQCORE_DEVICE float from_bits(uint32_t bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  float f;
  memcpy(&f, &bits, 4);
  return f;
#endif
}

ACQCORE_DEVICE uint32_t to_bits(float f) {
#if defined(__CUDACC__)
  return __float_as_uint(f);
#else
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
#endif
}

// Per dtype: logits per word, a word of -inf, and access to a word's i-th logit.
template <DType dtype>
struct Words;

template <>
struct Words<DType::kFloat32> {
  using Element = uint32_t;
  static constexpr int kPer = 1;
  static constexpr uint32_t kAbsent = 0xff800000u;
  static ACQCORE_DEVICE float get(uint32_t word, int) { return from_bits(word); }
};

template <>
struct Words<DType::kBFloat16> {
  using Element = uint16_t;
  static constexpr int kPer = 2;
  static constexpr uint32_t kAbsent = 0xff80ff80u;
  static ACQCORE_DEVICE float get(uint32_t word, int i) { return from_bits(i == 0 ? word << 16 : word & 0xffff0000u); }
};

template <>
struct Words<DType::kFloat16> {
  using Element = uint16_t;
  static constexpr int kPer = 2;
  static constexpr uint32_t kAbsent = 0xfc00fc00u;
  static ACQCORE_DEVICE float get(uint32_t word, int i) {
    const uint16_t half = uint16_t(i == 0 ? word : word >> 16);
#if defined(__CUDACC__)
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(half));
    return f;
#else
    const uint32_t magnitude = half & 0x7fffu, sign = uint32_t(half & 0x8000u) << 16;
    if (magnitude >= 0x7c00u) return from_bits(magnitude << 13 | 0x7f800000u | sign);
    return from_bits(to_bits(from_bits(magnitude << 13) * 0x1p112f) | sign);  // 2^112 adjusts the exponent bias
#endif
  }
};

#if defined(__CUDACC__)

#define ACQCORE_PAIRED(function, instruction)                                     \
  template <DType dtype>                                                          \
  ACQCORE_DEVICE uint32_t function(uint32_t a, uint32_t b) {                      \
    uint32_t word;                                                                \
    if constexpr (dtype == DType::kFloat32) {                                     \
      asm(instruction ".f32 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));          \
    } else if constexpr (dtype == DType::kBFloat16) {                             \
      asm(instruction ".bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));       \
    } else {                                                                      \
      asm(instruction ".f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));        \
    }                                                                             \
    return word;                                                                  \
  }
ACQCORE_PAIRED(larger, "max")              // the larger of each pair; a NaN loses
ACQCORE_PAIRED(smaller_or_nan, "min.NaN")  // the smaller of each pair; a NaN wins
#undef ACQCORE_PAIRED

#else

// Selects b's half where `takes_b` returns true, else a's.
template <DType dtype, typename TakesB>
inline uint32_t choose(uint32_t a, uint32_t b, TakesB takes_b) {
  uint32_t word = 0;
  for (int i = 0; i < Words<dtype>::kPer; ++i) {
    const uint32_t half = Words<dtype>::kPer == 1 ? ~0u : 0xffffu << (16 * i);
    word |= (takes_b(Words<dtype>::get(a, i), Words<dtype>::get(b, i)) ? b : a) & half;
  }
  return word;
}

template <DType dtype>
inline uint32_t larger(uint32_t a, uint32_t b) {
  return choose<dtype>(a, b, [](float x, float y) { return y > x || x != x; });
}

template <DType dtype>
inline uint32_t smaller_or_nan(uint32_t a, uint32_t b) {
  return choose<dtype>(a, b, [](float x, float y) { return x == x && !(y >= x); });
}

#endif

}  // namespace acqcore::cuda
