// Reads part of a matrix row as 4-byte units: float32, converted from any dtype, or pairs of bfloat16.
#pragma once
#include "matrix.h"
#include "simd.h"

namespace acqcore::ACQCORE_ISA {

inline float from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline float from_bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

// Multiplying by 2^112 adjusts the exponent bias and normalizes subnormals; infinities and NaN are handled separately.
inline float from_fp16(uint16_t x) {
  const uint32_t magnitude = x & 0x7fffu;
  const float scaled = from_bits(magnitude << 13) * 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &scaled, 4);
  bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits;
  return from_bits(bits | (uint32_t(x & 0x8000u) << 16));
}

template <typename T, typename Convert>
inline void load_as_float(const T* source, int64_t stride, int64_t n, float* out, Convert convert) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = convert(source[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = convert(source[i * stride]);
  }
}

// Loads columns [begin, begin + n) of a row as float32.
inline void load_floats(const Matrix& m, int64_t row, int64_t begin, int64_t n, float* out /* [n] */) {
  const int64_t offset = row * m.row_stride + begin * m.column_stride;
  const int64_t stride = m.column_stride;
  const uint16_t* half = static_cast<const uint16_t*>(m.data) + offset;
  switch (m.dtype) {
    case DType::kFloat32:
      load_as_float(static_cast<const float*>(m.data) + offset, stride, n, out, [](float x) { return x; });
      break;
    case DType::kBFloat16:
      load_as_float(half, stride, n, out, from_bf16);
      break;
    case DType::kFloat16:
      load_as_float(half, stride, n, out, from_fp16);
      break;
  }
}

// Loads columns [begin, begin + n) of a 16-bit row unconverted; columns past its end, or of an absent row, are 0.
inline void load_bits(const Matrix& m, int64_t row, bool present, int64_t begin, int64_t n, uint16_t* out /* [n] */) {
  const uint16_t* source = static_cast<const uint16_t*>(m.data) + row * m.row_stride + begin * m.column_stride;
  int64_t there = present ? m.columns - begin : 0;
  there = there < n ? there : n;
  if (m.column_stride == 1) {
    memcpy(out, source, 2 * there);
  } else {
    for (int64_t i = 0; i < there; ++i) out[i] = source[i * m.column_stride];
  }
  for (int64_t i = there; i < n; ++i) out[i] = 0;
}

// Loads pairs [begin, begin + n) of a bfloat16 row, two adjacent columns each; columns past its end are 0.
inline void load_pairs(const Matrix& m, int64_t row, int64_t begin, int64_t n, float* out /* [n] */) {
  const uint16_t* source = static_cast<const uint16_t*>(m.data) + row * m.row_stride;
  int64_t whole = m.columns / 2 - begin;
  whole = whole < 0 ? 0 : whole < n ? whole : n;
  if (m.column_stride == 1) {
    memcpy(out, source + 2 * begin, 4 * whole);
  } else {
    for (int64_t i = 0; i < whole; ++i) {
      const uint16_t* p = source + 2 * (begin + i) * m.column_stride;
      const uint32_t pair = p[0] | uint32_t(p[m.column_stride]) << 16;
      memcpy(out + i, &pair, 4);
    }
  }
  if (whole < n && m.columns % 2 != 0 && begin + whole == m.columns / 2) {
    const uint32_t pair = source[(m.columns - 1) * m.column_stride];
    memcpy(out + whole, &pair, 4);
    ++whole;
  }
  for (; whole < n; ++whole) out[whole] = 0;
}

}  // namespace acqcore::ACQCORE_ISA
