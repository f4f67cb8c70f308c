// Register-blocked tile product on packed panels: the inner loop of row_stats.
//
// Panels hold 4-byte units, k-major: a hidden panel is [K, kPanelRows], a weight panel [K, kPanelColumns]. A unit is a
// float32, or a pair of bfloat16 whose product accumulates in float32. On processors with tile registers, hidden panels
// are [K / kTileUnits, kPanelRows, kTileUnits] (tiles.h) for both tile and vector products.
#pragma once
#include "load.h"
#include "tiles.h"

namespace acqcore::ACQCORE_ISA {

constexpr int kLoadUnits = 128;  // units of a row buffered on the stack while packing; a multiple of kLanes

// Loads units [begin, begin + n) of a row; units past its end are 0.
inline void load_units(const Matrix& m, int64_t row, bool pairs, int64_t begin, int64_t n, float* out /* [n] */) {
  if (pairs) {
    load_pairs(m, row, begin, n, out);
    return;
  }
  const int64_t there = m.columns - begin < n ? m.columns - begin : n;
  load_floats(m, row, begin, there, out);
  for (int64_t i = there; i < n; ++i) out[i] = 0;
}

// Interleaves units [begin, begin + n) of `count` rows into a panel of width `width`; missing rows become 0.
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
        for (int i = 0; i < kLanes; ++i) v[i] = load(units + i * kLoadUnits + k);  // arbitrary past `part`
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

// Layout of a packed panel of hidden states: a run of consecutive units of one row is contiguous, followed by the same
// run of the other rows. Without tile registers a run is one unit.
constexpr int kRun = kHasTiles ? kTileUnits : 1;

inline int64_t panel_place(int64_t unit, int row) { return (unit / kRun * kPanelRows + row) * kRun + unit % kRun; }

// Packs all units of a panel of hidden states, in whole runs; missing rows become 0. rows: [count].
inline void pack_rows(const Matrix& hidden, const int64_t* rows, int count, bool pairs, int64_t units, float* panel) {
  if (!kHasTiles) {
    pack_panel(hidden, rows, 0, count, kPanelRows, pairs, 0, units, panel);
    return;
  }
  for (int64_t k = 0; k < units; k += kRun) {
    float* out = panel + k * kPanelRows;
    for (int i = 0; i < count; ++i) load_units(hidden, rows[i], pairs, k, kRun, out + i * kRun);
    memset(out + count * kRun, 0, 4 * kRun * (kPanelRows - count));
  }
}

// Memory layout of the left factor of a product: runs of kTileUnits units of a row, a packed panel, a matrix read by
// rows, or a matrix read by columns. Strides locate entry (row, k).
struct Runs {
  static constexpr int kRowStride = kTileUnits, kStepStride = 1, kSteps = kTileUnits;
};
struct Packed {
  static constexpr int kRowStride = kRun, kStepStride = kRun == 1 ? kPanelRows : 1, kSteps = kRun;
};
template <int kStride>
struct ByRows {
  static constexpr int kRowStride = kStride, kStepStride = 1, kSteps = 1;
};
template <int kStride>
struct ByColumns {
  static constexpr int kRowStride = 1, kStepStride = kStride, kSteps = 1;
};

// out [kVectorRows, kPanelColumns] (row stride `stride`) = a b, or += a b if `accumulate`. Meanwhile fetches
// [kVectorRows / 8, k] floats at `next`, if given.
template <bool kPairs, typename Left>
inline void vector_product(const float* a /* [kVectorRows, k], layout Left */, const float* b /* [k, kPanelColumns] */,
                           int64_t k, bool accumulate, float* out, int64_t stride, const float* next) {
  int64_t step = 0;
  do {
    const int64_t end = step + kChain < k ? step + kChain : k;
    for (int64_t i = step; next && i < end; i += 16) fetch(next + i * kVectorRows / 8);
    Vec c[kVectorRows][kPanelVectors] = {};
    for (; step < end; step += Left::kSteps) {
      const float* run = a + step * (Left::kSteps == 1 ? Left::kStepStride : kPanelRows);
      for (int s = 0; s < Left::kSteps; ++s) {
        Vec columns[kPanelVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kPanelVectors; ++j) columns[j] = load(b + (step + s) * kPanelColumns + j * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kVectorRows; ++i) {
          const Vec row = broadcast(run[i * Left::kRowStride + s * Left::kStepStride]);
#pragma GCC unroll 4
          for (int j = 0; j < kPanelVectors; ++j) c[i][j] = multiply_add<kPairs>(c[i][j], row, columns[j]);
        }
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

// out [kPanelRows, kPanelColumns] (row stride `stride`) = a b, or += a b if `accumulate`. Meanwhile fetches
// [kPanelRows / 8, k] floats at `next`, if given.
template <bool kPairs, typename Left = Packed>
inline void panel_product(const float* a /* [kPanelRows, k], layout Left */, const float* b /* [k, kPanelColumns] */,
                          int64_t k, bool accumulate, float* out, int64_t stride, const float* next = nullptr) {
  if constexpr (kHasTiles && kPairs) {
    for (int64_t k0 = 0; k0 < k || k0 == 0; k0 += kTileChain) {
      const int64_t n = k - k0 < kTileChain ? k - k0 : kTileChain;
      if (accumulate || k0 > 0) {
        alignas(64) float part[kPanelRows * kPanelColumns];
        tile_product(a + k0 * kPanelRows, b + k0 * kPanelColumns, n, part, kPanelColumns, next);
        add_part(part, out, stride);
      } else {
        tile_product(a, b, n, out, stride, next);
      }
    }
  } else {
    for (int i = 0; i < kPanelRows; i += kVectorRows) {
      vector_product<kPairs, Left>(a + i * Left::kRowStride, b, k, accumulate, out + i * stride, stride,
                                   next ? next + i / 8 * k : nullptr);
    }
  }
}

}  // namespace acqcore::ACQCORE_ISA
