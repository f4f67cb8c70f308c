// Register-blocked tile product on packed panels: the inner loop of row_stats.
//
// Panels hold 4-byte units, k-major: a hidden panel [K, kPanelRows], a weight panel [K, kPanelColumns]. A unit is a
// float32, or a pair of bfloat16 whose product accumulates in float32. Tile registers take hidden panels of pairs as
// [K / kTileUnits, kPanelRows, kTileUnits] (tiles.h).
#pragma once
#include "load.h"
#include "tiles.h"

namespace acqcore::ACQCORE_ISA {

constexpr int kLoadUnits = 128;  // units of a row read at once while packing, on the stack; a multiple of kLanes

// Units [begin, begin + n) of a row.
inline void load_units(const Matrix& m, int64_t row, bool pairs, int64_t begin, int64_t n, float* out /* [n] */) {
  if (pairs) {
    load_pairs(m, row, begin, n, out);
  } else {
    load_floats(m, row, begin, n, out);
  }
}

// Interleaves `count` rows of a matrix into a panel of `width`, units [begin, begin + n); missing rows become 0.
// rows: [count] row numbers, or null for first, first + 1, ...
inline void pack_panel(const Matrix& m, const int64_t* rows, int64_t first, int count, int width, bool pairs,
                       int64_t begin, int64_t n, float* panel /* [n, width] */) {
  const auto number = [&](int j) { return rows ? rows[j] : first + j; };
  float units[kLanes * kLoadUnits];
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) {  // transposed in registers
    for (int64_t k0 = 0; k0 < n; k0 += kLoadUnits) {
      const int64_t part = n - k0 < kLoadUnits ? n - k0 : kLoadUnits;
      for (int i = 0; i < kLanes; ++i) load_units(m, number(j + i), pairs, begin + k0, part, units + i * kLoadUnits);
      for (int64_t k = 0; k < part; k += kLanes) {
        Vec v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = load(units + i * kLoadUnits + k);  // past `part` anything
        transpose(v);
        const int64_t present = part - k < kLanes ? part - k : kLanes;
        for (int64_t i = 0; i < present; ++i) store(panel + (k0 + k + i) * width + j, v[i]);
      }
    }
  }
  for (; j < width; ++j) {
    if (j >= count) {
      for (int64_t k = 0; k < n; ++k) panel[k * width + j] = 0;
      continue;
    }
    for (int64_t k0 = 0; k0 < n; k0 += kLoadUnits) {
      const int64_t part = n - k0 < kLoadUnits ? n - k0 : kLoadUnits;
      load_units(m, number(j), pairs, begin + k0, part, units);
      for (int64_t k = 0; k < part; ++k) panel[(k0 + k) * width + j] = units[k];
    }
  }
}

// Packs a panel of hidden states, all their units; missing rows become 0. rows: [count].
inline void pack_rows(const Matrix& hidden, const int64_t* rows, int count, bool pairs, int64_t units, float* panel) {
  if (!kHasTiles || !pairs) {
    pack_panel(hidden, rows, 0, count, kPanelRows, pairs, 0, units, panel);
    return;
  }
  for (int64_t k = 0; k < units; k += kTileUnits) {
    float* out = panel + k * kPanelRows;
    for (int i = 0; i < count; ++i) load_pairs(hidden, rows[i], k, kTileUnits, out + i * kTileUnits);
    memset(out + count * kTileUnits, 0, 4 * kTileUnits * (kPanelRows - count));
  }
}

// Where unit k of a row stands in a hidden panel.
inline int64_t panel_place(bool pairs, int64_t k, int row) {
  if (!kHasTiles || !pairs) return k * kPanelRows + row;
  return (k / kTileUnits * kPanelRows + row) * kTileUnits + k % kTileUnits;
}

// out [kVectorRows, kPanelColumns] (row stride `stride`) = a b, or += a b if `accumulate`. Entry (i, k) of a is
// a[i * kRowStride + k * kStepStride].
template <bool kPairs, int kRowStride, int kStepStride>
inline void vector_product(const float* a /* [kVectorRows, k] */, const float* b /* [k, kPanelColumns] */, int64_t k,
                           bool accumulate, float* out, int64_t stride) {
  int64_t step = 0;
  do {
    const int64_t end = step + kChain < k ? step + kChain : k;
    Vec c[kVectorRows][kPanelVectors] = {};
    for (; step < end; ++step) {
      Vec columns[kPanelVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j) columns[j] = load(b + step * kPanelColumns + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kVectorRows; ++i) {
        const Vec row = broadcast(a[i * kRowStride + step * kStepStride]);
#pragma GCC unroll 4
        for (int j = 0; j < kPanelVectors; ++j) c[i][j] = multiply_add<kPairs>(c[i][j], row, columns[j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVectorRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j) {
        float* p = out + i * stride + j * kLanes;
        store(p, accumulate ? load(p) + c[i][j] : c[i][j]);
      }
    }
    accumulate = true;
  } while (step < k);
}

// out [kPanelRows, kPanelColumns] (row stride `stride`) = a b, or += a b if `accumulate`. a is a packed panel by
// default, else rows or columns of a matrix as they lie in memory, strides as in vector_product.
template <bool kPairs, int kRowStride = 1, int kStepStride = kPanelRows>
inline void panel_product(const float* a /* [kPanelRows, k] */, const float* b /* [k, kPanelColumns] */, int64_t k,
                          bool accumulate, float* out, int64_t stride) {
  if constexpr (kHasTiles && kPairs) {
    tile_product(a, b, k, accumulate, out, stride);
  } else {
    for (int i = 0; i < kPanelRows; i += kVectorRows) {
      vector_product<kPairs, kRowStride, kStepStride>(a + i * kRowStride, b, k, accumulate, out + i * stride, stride);
    }
  }
}

}  // namespace acqcore::ACQCORE_ISA
