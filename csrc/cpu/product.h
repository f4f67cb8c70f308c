// Register-blocked tile product on packed panels: the inner loop of row_stats.
//
// Panels hold 4-byte units, k-major: a hidden panel [K, kPanelRows], a weight panel [K, kPanelColumns]. A unit is a
// float32, or a pair of bfloat16 whose product accumulates in float32.
#pragma once
#include "load.h"

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

// Longest chain of float32 additions. Chains are summed in `out` (L1): at logits of +-130 this halves the error of one
// chain over D = 576, for 2 % of the time.
constexpr int64_t kChain = 128;

// out [kPanelRows, kPanelColumns] (row stride `stride`) = a b, or += a b if `accumulate`. Entry (i, k) of a is
// a[i * kRowStride + k * kStepStride]: a packed panel by default, or rows or columns of a matrix as they lie in memory.
template <bool kPairs, int kRowStride = 1, int kStepStride = kPanelRows>
inline void panel_product(const float* a /* [kPanelRows, k] */, const float* b /* [k, kPanelColumns] */, int64_t k,
                          bool accumulate, float* out, int64_t stride) {
  int64_t step = 0;
  do {
    const int64_t end = step + kChain < k ? step + kChain : k;
    Vec c[kPanelRows][kPanelVectors] = {};
    for (; step < end; ++step) {
      Vec columns[kPanelVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j) columns[j] = load(b + step * kPanelColumns + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kPanelRows; ++i) {
        const Vec row = broadcast(a[i * kRowStride + step * kStepStride]);
#pragma GCC unroll 4
        for (int j = 0; j < kPanelVectors; ++j) c[i][j] = multiply_add<kPairs>(c[i][j], row, columns[j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPanelRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j) {
        float* p = out + i * stride + j * kLanes;
        store(p, accumulate ? load(p) + c[i][j] : c[i][j]);
      }
    }
    accumulate = true;
  } while (step < k);
}

}  // namespace acqcore::ACQCORE_ISA
