// Vectors of the target instruction set, built on the GCC and Clang vector extensions.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace acqcore::ACQCORE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kVectorRows = 8;  // 8 x 3 accumulators + 3 columns + 1 broadcast in 32 registers; 5 % faster than 14 x 2
constexpr int kPanelVectors = 3;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kVectorRows = 6;  // 6 x 2 accumulators + 2 + 1 in 16 registers
constexpr int kPanelVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kVectorRows = 8;  // 8 x 3 accumulators + 3 + 1 in 32 registers
constexpr int kPanelVectors = 3;
#else
constexpr int kLanes = 4;
constexpr int kVectorRows = 6;
constexpr int kPanelVectors = 2;
#endif

#if defined(__AMX_BF16__)
constexpr bool kHasTiles = true;
constexpr int kPanelRows = 32;  // eight tile registers: 2 x 3 accumulators, 1 for rows, 1 for columns
#else
constexpr bool kHasTiles = false;
constexpr int kPanelRows = kVectorRows;
#endif

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
constexpr bool kHasBf16Product = true;
#else
constexpr bool kHasBf16Product = false;
#endif

constexpr int kPanelColumns = kLanes * kPanelVectors;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));  // bit arithmetic wraps, even on a NaN's bits

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);  // unaligned
  return v;
}

inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// v with lane i replaced by -inf.
inline Vec without(Vec v, int i) {
  v[i] = -__builtin_inff();
  return v;
}

// Index of the first element equal to x; there is one.
inline int first_equal(const float* z, float x) {
  int i = 0;
#if defined(__AVX512F__)
  for (;; i += kLanes) {
    const unsigned equal = _mm512_cmpeq_ps_mask((__m512)load(z + i), _mm512_set1_ps(x));
    if (equal) return i + __builtin_ctz(equal);
  }
#else
  while (z[i] != x) ++i;
  return i;
#endif
}

inline double horizontal_sum(Vec v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// Lane i is lane from[i] of the concatenation of a and b. `from` is constant once inlined.
inline Vec shuffle(Vec a, Vec b, IntVec from) {
#if defined(__clang__)
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = from[i] < kLanes ? a[from[i]] : b[from[i] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Lane i is lane i ^ kDistance of v.
template <int kDistance>
inline Vec exchanged(Vec v) {
  IntVec from;
  for (int i = 0; i < kLanes; ++i) from[i] = i ^ kDistance;
  return shuffle(v, v, from);
}

inline float horizontal_max(Vec v) {
  if constexpr (kLanes > 8) v = maximum(v, exchanged<8>(v));
  if constexpr (kLanes > 4) v = maximum(v, exchanged<4>(v));
  v = maximum(v, exchanged<2>(v));
  return maximum(v, exchanged<1>(v))[0];
}

// In each group of 2 kHalf lanes: the sum of a's lower and upper half, then the sum of b's.
template <int kHalf>
inline Vec add_halves(Vec a, Vec b) {
  IntVec low, high;
  for (int i = 0; i < kLanes; ++i) {
    const int group = i / (2 * kHalf) * (2 * kHalf), lane = i % kHalf;
    low[i] = group + lane + (i / kHalf % 2 ? kLanes : 0);
    high[i] = low[i] + kHalf;
  }
  return shuffle(a, b, low) + shuffle(a, b, high);
}

// One step of a transposition: swaps off-diagonal blocks of kHalf lanes.
template <int kHalf>
inline void exchange(Vec* v /* [kLanes] */) {
  IntVec low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & kHalf ? kLanes + i - kHalf : i;
    high[i] = i & kHalf ? kLanes + i : i + kHalf;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & kHalf) continue;
    const Vec a = v[i], b = v[i + kHalf];
    v[i] = shuffle(a, b, low);
    v[i + kHalf] = shuffle(a, b, high);
  }
}

// Lane j of v[i] <-> lane i of v[j].
inline void transpose(Vec* v /* [kLanes] */) {
  if constexpr (kLanes > 8) exchange<8>(v);
  if constexpr (kLanes > 4) exchange<4>(v);
  exchange<2>(v);
  exchange<1>(v);
}

// Lane i is the sum of the lanes of v[i]. v is overwritten.
inline Vec horizontal_sums(Vec* v /* [kLanes] */) {
  if constexpr (kLanes > 8) {
    for (int i = 0; i < 8; ++i) v[i] = add_halves<8>(v[i], v[i + 8]);
  }
  if constexpr (kLanes > 4) {
    for (int i = 0; i < 4; ++i) v[i] = add_halves<4>(v[i], v[i + 4]);
  }
  for (int i = 0; i < 2; ++i) v[i] = add_halves<2>(v[i], v[i + 2]);
  return add_halves<1>(v[0], v[1]);
}

// exp(x) = 2^n p with integer n and p in [1 / sqrt(2), sqrt(2)]. Returns p, times 2^shift with AVX-512, and `rounded`
// = n + 1.5 * 2^23, whose low bits hold n. Polynomial of degree 6 with error 4e-9.
template <int shift>
inline Vec exp_parts(Vec x, Vec& rounded) {
  const Vec magic = broadcast(12582912.0f);
  rounded = x * 1.44269504088896341f + magic;
  const Vec n = rounded - magic;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const Vec r = x - n * 0.69314718055994531f;  // the product is not rounded; the constant is within 2e-9 of log 2
#else
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
#endif
#if defined(__AVX512F__)
  constexpr float kUnit = shift == 0 ? 1.0f : float(uint64_t(1) << shift);
#else
  constexpr float kUnit = 1.0f;
#endif
  Vec p = r * (kUnit * 1.3814576501e-3f) + kUnit * 8.3687247361e-3f;
  p = p * r + kUnit * 4.1668388890e-2f;
  p = p * r + kUnit * 1.6666520565e-1f;
  p = p * r + kUnit * 4.9999993443e-1f;
  p = p * r + kUnit;
  return p * r + kUnit;
}

// exp(x) * 2^shift for -110 <= x <= 0, within 1.5 ulp.
template <int shift>
inline Vec exp_scaled(Vec x) {
  Vec rounded;
  const Vec p = exp_parts<shift>(x, rounded);
#if defined(__AVX512F__)
  // An all-ones mask, since GCC 12 warns about the undefined operand of the unmasked form.
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)(rounded - 12582912.0f));
#else
  return (Vec)((UintVec)p + (((UintVec)rounded + shift) << 23));
#endif
}

// The same, but 0 where x is less than `lowest`; clamps x to `lowest`.
template <int shift>
inline Vec exp_above(Vec& x, float lowest) {
#if defined(__AVX512F__)
  const __mmask16 present = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(lowest), _CMP_NLT_UQ);
  x = maximum(broadcast(lowest), x);
  Vec rounded;
  const Vec p = exp_parts<shift>(x, rounded);
  return (Vec)_mm512_maskz_scalef_ps(present, (__m512)p, (__m512)(rounded - 12582912.0f));
#else
  const IntVec absent = x < lowest;
  x = maximum(broadcast(lowest), x);
  const Vec e = exp_scaled<shift>(x);
  return absent ? Vec{} : e;
#endif
}

// log(x) for normal x > 0, within 2 ulp, exactly 0 at 1. Polynomial of Cephes logf on [sqrt(1/2), sqrt(2)).
inline Vec log(Vec x) {
  IntVec bits = (IntVec)((UintVec)x - 0x3f3504f3);  // bits of sqrt(1/2)
  const IntVec exponent = bits >> 23;
  bits = (bits & 0x007fffff) + 0x3f3504f3;
  const Vec f = (Vec)bits - 1.0f;
  const Vec n = __builtin_convertvector(exponent, Vec);
  Vec p = f * 7.0376836292e-2f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec s = f * f;
  Vec y = p * f * s + n * -2.12194440e-4f;
  y = y - s * 0.5f;
  return f + y + n * 0.693359375f;
}

// tanh(x), within 2 ulp: an odd polynomial near 0 (Cephes tanhf), else (1 - t) / (1 + t) with t = exp(-2 |x|).
inline Vec tanh(Vec x) {
  const Vec a = x < 0 ? -x : x;
  const Vec clamped = a > 40.0f ? broadcast(40.0f) : a;
  const Vec t = exp_scaled<0>(clamped * -2.0f);
  const Vec far = (1.0f - t) / (1.0f + t);
  const Vec s = x * x;
  Vec p = s * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * s + -5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s + -3.33332819422e-1f;
  const Vec near = p * s * x + x;
  const Vec signed_far = x < 0 ? -far : far;
  return a < 0.625f ? near : (x == x ? signed_far : x);
}

// c + a * b, where the 4-byte units of a and b are floats or, with kPairs, pairs of bfloat16.
template <bool kPairs>
inline Vec multiply_add(Vec c, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
#endif
  return c + a * b;
}

}  // namespace acqcore::ACQCORE_ISA
