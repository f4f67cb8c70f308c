// Panels of bfloat16 pairs, and their products in AMX tile registers: 16 rows of 64 bytes, 16 x 16 x 32 multiply-adds
// per instruction.
#pragma once
#include "simd.h"

namespace acqcore::ACQCORE_ISA {

// Longest chains of units whose products are added in float32; chains are summed in memory (L1). In vectors, chains of
// 128 halve the error of a single chain over D = 576 at logits of +-130 and cost 2 % of the time. In tile registers they
// would cost 30 %.
constexpr int64_t kChain = 128, kTileChain = 640;

constexpr int kTileUnits = 16;  // units per tile row

// Fetches a line of rows to be read soon into L2, where the rows of a block do not fit: the product is 5 % faster (Xeon,
// N = 4096, D = 576).
inline void fetch(const float* line) { __builtin_prefetch(line, 0, 2); }

#if defined(__AVX512BF16__)

// x rounded to bfloat16. The remainder is at most 2^-8 of x and of either sign; with truncation all remainders would
// have the sign of their factor, which made squared norms 1e-5 too small.
inline Vec high_part(Vec x) { return (Vec)(((UintVec)x + 0x8000u) & 0xffff0000u); }

// Splits x into panels [n / 32, kPanelRows, kTileUnits] of bfloat16 pairs, x = high + low to 2^-16. kLanes divides n.
inline void split_panel(const float* x /* [kPanelRows, n] */, int64_t stride, int n, float* high, float* low) {
  for (int k = 0; k < n; k += 2 * kLanes) {
    for (int i = 0; i < kPanelRows; ++i) {
      const Vec a = load(x + i * stride + k), b = k + kLanes < n ? load(x + i * stride + k + kLanes) : Vec{};
      const Vec a_high = high_part(a), b_high = high_part(b);
      const int64_t place = (k / 2 / kTileUnits * kPanelRows + i) * kTileUnits;
      store(high + place, (Vec)_mm512_cvtne2ps_pbh((__m512)b_high, (__m512)a_high));
      store(low + place, (Vec)_mm512_cvtne2ps_pbh((__m512)(b - b_high), (__m512)(a - a_high)));
    }
  }
}

// Packs x rounded to bfloat16 in the same layout.
inline void round_panel(const float* x /* [kPanelRows, n] */, int64_t stride, int n, float* rounded) {
  for (int k = 0; k < n; k += 2 * kLanes) {
    for (int i = 0; i < kPanelRows; ++i) {
      const Vec a = load(x + i * stride + k), b = k + kLanes < n ? load(x + i * stride + k + kLanes) : Vec{};
      const int64_t place = (k / 2 / kTileUnits * kPanelRows + i) * kTileUnits;
      store(rounded + place, (Vec)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    }
  }
}

#else

// Stubs without bfloat16 products. The functions are never called.
inline Vec high_part(Vec x) { return x; }
inline void split_panel(const float*, int64_t, int, float*, float*) {}
inline void round_panel(const float*, int64_t, int, float*) {}

#endif

#if defined(__AMX_BF16__)

constexpr int kTileRows = 16;

// Configures this thread's eight tile registers, 16 rows of 64 bytes each, for the lifetime of the object.
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 4 * kTileUnits;
      config.rows[i] = kTileRows;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Multiplies two tiles of rows by three of columns and adds to the first six registers. Reloads tiles rather than
// keeping them: 9 loads of 8 cycles hide behind 6 products of 16.
inline void tile_step(const float* rows /* [32, kTileUnits] */, const float* columns /* [kTileUnits, 48] */) {
  constexpr int kColumns = 48, kBelow = kTileRows * kTileUnits;
  _tile_loadd(7, columns, 4 * kColumns);
  _tile_loadd(6, rows, 4 * kTileUnits);
  _tile_dpbf16ps(0, 6, 7);
  _tile_loadd(6, rows + kBelow, 4 * kTileUnits);
  _tile_dpbf16ps(3, 6, 7);
  _tile_loadd(7, columns + kTileUnits, 4 * kColumns);
  _tile_dpbf16ps(4, 6, 7);
  _tile_loadd(6, rows, 4 * kTileUnits);
  _tile_dpbf16ps(1, 6, 7);
  _tile_loadd(7, columns + 2 * kTileUnits, 4 * kColumns);
  _tile_dpbf16ps(2, 6, 7);
  _tile_loadd(6, rows + kBelow, 4 * kTileUnits);
  _tile_dpbf16ps(5, 6, 7);
}

// out [32, 48] (row stride `stride`) = a b, one chain of sums. a is the sum of kParts panels, `part` floats apart, and b
// the sum of `b` and `low`, if given; the product of the low parts, at most 2^-16, is omitted. k is a multiple of
// kTileUnits. Meanwhile fetches [4, k] floats at `next`, if given.
template <int kParts = 1>
inline void tile_product(const float* a /* [kParts, k / kTileUnits, 32, kTileUnits] */, const float* b /* [k, 48] */,
                         int64_t k, float* out, int64_t stride, const float* next = nullptr, int64_t part = 0,
                         const float* low = nullptr /* [k, 48] */) {
  constexpr int kColumns = 48, kRows = 32;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t step = 0; step < k; step += kTileUnits) {
    for (int i = 0; next && i < 4; ++i) fetch(next + step * 4 + i * kTileUnits);
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) tile_step(a + i * part + step * kRows, b + step * kColumns);
    if (low) tile_step(a + step * kRows, low + step * kColumns);
  }
  float* below = out + kTileRows * stride;
  _tile_stored(0, out, 4 * stride);
  _tile_stored(1, out + kTileUnits, 4 * stride);
  _tile_stored(2, out + 2 * kTileUnits, 4 * stride);
  _tile_stored(3, below, 4 * stride);
  _tile_stored(4, below + kTileUnits, 4 * stride);
  _tile_stored(5, below + 2 * kTileUnits, 4 * stride);
}

// out [32, 48] (row stride `stride`) += part [32, 48].
inline void add_part(const float* part, float* out, int64_t stride) {
  constexpr int kColumns = 48, kRows = 32;
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; j += kLanes) {
      float* sum = out + i * stride + j;
      store(sum, load(sum) + load(part + i * kColumns + j));
    }
  }
}

// Transposes a panel [k / kTileUnits, kPanelRows, kTileUnits] to columns [k, kPanelRows].
inline void transpose_panel(const float* panel, int64_t k, float* columns) {
  for (int64_t u = 0; u < k; u += kTileUnits) {
    for (int half = 0; half < kPanelRows; half += kTileRows) {
      Vec v[kLanes];
      for (int i = 0; i < kTileRows; ++i) v[i] = load(panel + (u / kTileUnits * kPanelRows + half + i) * kTileUnits);
      transpose(v);
      for (int i = 0; i < kTileUnits; ++i) store(columns + (u + i) * kPanelRows + half, v[i]);
    }
  }
}

// out [32, 32] (row stride `stride`) += left right^T of split factors; the product of the low parts, at most 2^-16, is
// omitted.
inline void tile_gram(const float* left_high, const float* left_low /* [k / kTileUnits, 32, kTileUnits] */,
                      const float* right_high, const float* right_low /* [k, 32] */, int64_t k, float* out,
                      int64_t stride) {
  constexpr int kSide = 32, kBelow = kTileRows * kTileUnits;
  const float* lefts[] = {left_high, left_high, left_low};
  const float* rights[] = {right_high, right_low, right_high};
  float* below = out + kTileRows * stride;
  _tile_loadd(0, out, 4 * stride);
  _tile_loadd(1, out + kTileUnits, 4 * stride);
  _tile_loadd(2, below, 4 * stride);
  _tile_loadd(3, below + kTileUnits, 4 * stride);
  for (int part = 0; part < 3; ++part) {
    for (int64_t step = 0; step < k; step += kTileUnits) {
      const float* a = lefts[part] + step * kSide;
      const float* b = rights[part] + step * kSide;
      _tile_loadd(4, a, 4 * kTileUnits);
      _tile_loadd(6, b, 4 * kSide);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kTileUnits, 4 * kSide);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + kBelow, 4 * kTileUnits);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, 4 * stride);
  _tile_stored(1, out + kTileUnits, 4 * stride);
  _tile_stored(2, below, 4 * stride);
  _tile_stored(3, below + kTileUnits, 4 * stride);
}

#else

// Stubs without tile registers. The functions are never called.
struct Tiles {
  Tiles() {}
};

template <int kParts = 1>
inline void tile_product(const float*, const float*, int64_t, float*, int64_t, const float* = nullptr, int64_t = 0,
                         const float* = nullptr) {}
inline void add_part(const float*, float*, int64_t) {}
inline void transpose_panel(const float*, int64_t, float*) {}
inline void tile_gram(const float*, const float*, const float*, const float*, int64_t, float*, int64_t) {}

#endif

}  // namespace acqcore::ACQCORE_ISA
