// Warp primitives that compile for both the device and the host.
//
// On the device a thread runs one lane and reaches the others by shuffles. Compiled without nvcc, one thread runs all
// 32 lanes in lockstep, so tests on a machine without a GPU run the same folds in the same order. Per-lane values are
// therefore arrays of kHeld elements: one on the device, 32 on the host.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define ACQCORE_DEVICE __device__ __forceinline__
#define ACQCORE_UNROLL _Pragma("unroll")
#else
#define ACQCORE_DEVICE inline
#define ACQCORE_UNROLL
#endif

namespace acqcore::cuda {

constexpr int kWarp = 32;
#if defined(__CUDACC__)
constexpr int kHeld = 1;
#else
constexpr int kHeld = kWarp;
#endif

// The lane whose value is held at `i`.
ACQCORE_DEVICE int lane_of(int i) {
#if defined(__CUDACC__)
  return threadIdx.x % kWarp + i;
#else
  return i;
#endif
}

// Makes each lane's memory writes visible to the other lanes of the warp.
ACQCORE_DEVICE void sync_warp() {
#if defined(__CUDACC__)
  __syncwarp();
#endif
}

// Reduces v with op over each run of `lanes` lanes by exchanging with lanes 16, 8, 4, 2, 1 away. op must commute, so
// that every lane gets the same bits.
template <int lanes = kWarp, typename T, typename Op>
ACQCORE_DEVICE void butterfly(T (&v)[kHeld], Op op) {
  ACQCORE_UNROLL
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
#if defined(__CUDACC__)
    v[0] = op(v[0], __shfl_xor_sync(~0u, v[0], offset));
#else
    T other[kWarp];
    for (int i = 0; i < kWarp; ++i) other[i] = v[i ^ offset];
    for (int i = 0; i < kWarp; ++i) v[i] = op(v[i], other[i]);
#endif
  }
}

// Bit i is set if lane i's value is true.
ACQCORE_DEVICE uint32_t ballot(const bool (&v)[kHeld]) {
#if defined(__CUDACC__)
  return __ballot_sync(~0u, v[0]);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWarp; ++i) bits |= uint32_t(v[i]) << i;
  return bits;
#endif
}

ACQCORE_DEVICE int lowest_bit(uint32_t bits) {
#if defined(__CUDACC__)
  return __ffs(bits) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// 2^x within 2 ulp; results below 2^-126 are flushed to 0; NaN propagates.
ACQCORE_DEVICE float exp2_flushed(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

// a / b within 2 ulp, for b from 2^-126 to 2^126.
ACQCORE_DEVICE float quotient(float a, float b) {
#if defined(__CUDACC__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// The larger of a and b, NaN if either is.
ACQCORE_DEVICE float maximum_or_nan(float a, float b) {
#if defined(__CUDACC__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}

}  // namespace acqcore::cuda
