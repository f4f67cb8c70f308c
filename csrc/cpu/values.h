// Blocks of rows, and sums of their factors times the rows of a matrix, shared by delta products, dL/dh and random
// cotangents. A task is a block: for each tile of the vocabulary it forms factors (L2) and adds their product with the
// tile's values to sums in its scratch. Rows do not depend on the other rows of the batch.
#pragma once
#include "load.h"
#include "parallel.h"
#include "tile.h"

namespace acqcore::ACQCORE_ISA {

// Lists the rows whose target is not -100 and returns their number; calls ignored(row) for the others.
template <typename Ignored>
inline int64_t scored_rows(const HeadArgs& head, int64_t* rows /* [N] */, const Ignored& ignored) {
  int64_t scored = 0;
  for (int64_t i = 0; i < head.hidden.rows; ++i) {
    if (head.targets[i] != -100) {
      rows[scored++] = i;
    } else {
      ignored(i);
    }
  }
  return scored;
}

// Rows per block: two blocks per thread, but at most `most` rows.
inline int64_t rows_of_block(const HeadArgs& head, int64_t scored, int64_t most) {
  return lesser(most, ceil_div(ceil_div(scored, 2 * head.threads), kPanelRows) * kPanelRows);
}

// Packs `count` rows of hidden states; returns count rounded up to whole panels.
inline int64_t pack_block(const HeadArgs& head, const Inner& inner, const int64_t* rows, int64_t count,
                          float* hidden /* [panels, units, kPanelRows] */) {
  for (int64_t i = 0; i < count; i += kPanelRows) {
    pack_rows(head.hidden, rows + i, static_cast<int>(lesser(kPanelRows, count - i)), inner.pairs, inner.units,
              hidden + i * inner.units);
  }
  return ceil_div(count, kPanelRows) * kPanelRows;
}

inline bool is_bfloat16(const Matrix& values) { return values.dtype == DType::kBFloat16; }

// Whether products with these values take bfloat16 pairs: tile registers always do, float32 values and factors as sums
// of two bfloat16; dot products of vectors only with bfloat16 values, as such sums cost them more than float32.
inline bool in_pairs(const Matrix& values) { return kHasTiles || (kHasBf16Product && is_bfloat16(values)); }

inline int64_t value_columns(int64_t columns) { return ceil_div(columns, kPanelColumns) * kPanelColumns; }

// Packs columns [j, j + kPanelColumns) of rows [row, row + 2) of values as pairs; rows from `last` on are 0.
inline void pack_pair(const Matrix& values, int64_t row, int64_t last, int64_t j, float* pairs /* [kPanelColumns] */) {
  uint16_t first[kPanelColumns], second[kPanelColumns];
  load_bits(values, row, row < last, j, kPanelColumns, first);
  load_bits(values, row + 1, row + 1 < last, j, kPanelColumns, second);
  for (int i = 0; i < kPanelColumns; ++i) pairs[i] = from_bits(first[i] | uint32_t(second[i]) << 16);
}

// The same, with values split into two bfloat16.
inline void pack_split_pair(const Matrix& values, int64_t row, int64_t last, int64_t j,
                            float* high /* [kPanelColumns] */, float* low /* [kPanelColumns] */) {
  float rows[2][kPanelColumns] = {};
  const int64_t present = lesser(kPanelColumns, values.columns - j);
  for (int64_t r = 0; r < lesser(2, last - row); ++r) load_floats(values, row + r, j, present, rows[r]);
  for (int i = 0; i < kPanelColumns; i += kLanes) {
    const Vec a = load(rows[0] + i), b = load(rows[1] + i), a_high = high_part(a), b_high = high_part(b);
    store(high + i, (Vec)((UintVec)a_high >> 16 | (UintVec)b_high));
    store(low + i, (Vec)((UintVec)high_part(a - a_high) >> 16 | (UintVec)high_part(b - b_high)));
  }
}

// Packs values [tile, tile + width) as panels [columns / kPanelColumns, kTile, kPanelColumns], or as pairs of rows in
// panels [columns / kPanelColumns, kTile / 2, kPanelColumns], high parts first, then low parts.
inline void pack_values(const Matrix& values, int64_t tile, int width, float* out) {
  const int64_t columns = value_columns(values.columns);
  if (in_pairs(values)) {
    const int64_t units = ceil_div(width, 2 * kTileUnits) * kTileUnits, last = tile + width;
    float* low = out + columns * (kTile / 2);
    for (int64_t u = 0; u < units; ++u) {  // reads along the rows
      for (int64_t j = 0; j < columns; j += kPanelColumns) {
        const int64_t place = j * (kTile / 2) + u * kPanelColumns;
        if (is_bfloat16(values)) {
          pack_pair(values, tile + 2 * u, last, j, out + place);
        } else {
          pack_split_pair(values, tile + 2 * u, last, j, out + place, low + place);
        }
      }
    }
    return;
  }
  for (int64_t j = 0; j < columns; j += kPanelColumns) {
    const int64_t present = lesser(kPanelColumns, values.columns - j);
    for (int k = 0; k < width; ++k) {
      float* row = out + j * kTile + k * kPanelColumns;
      load_floats(values, tile + k, j, present, row);
      for (int64_t i = present; i < kPanelColumns; ++i) row[i] = 0;
    }
  }
}

// sums [rows, columns] += factors times packed values. Factors are 0 from width up to a whole vector; rows are whole
// panels. `split` is scratch of [2, kTile / 2, kPanelRows]. With `rounded`, factors of pairs are rounded to bfloat16.
inline void add_values(const Matrix& values, const float* factors /* [rows, kTile] */, int64_t rows, int width,
                       const float* packed, float* split, float* sums, bool rounded = false) {
  const int64_t columns = value_columns(values.columns);
  constexpr int64_t kPart = kTile / 2 * kPanelRows;
  const float* low = packed + columns * (kTile / 2);
  const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
  const int64_t units = ceil_div(n, 2 * kTileUnits) * kTileUnits;
  alignas(64) float sum[kPanelRows * kPanelColumns];
  for (int64_t row = 0; row < rows; row += kPanelRows) {
    const float* of_rows = factors + row * kTile;
    float* out = sums + row * columns;
    if (!in_pairs(values)) {
      for (int64_t j = 0; j < columns; j += kPanelColumns) {
        panel_product<false, ByRows<kTile>>(of_rows, packed + j * kTile, width, true, out + j, columns);
      }
      continue;
    }
    if (rounded) {
      round_panel(of_rows, kTile, n, split);
    } else {
      split_panel(of_rows, kTile, n, split, split + kPart);
    }
    for (int64_t j = 0; j < columns; j += kPanelColumns) {
      const float* panel = packed + j * (kTile / 2);
      if (!kHasTiles) {
        panel_product<true, Runs>(split, panel, units, true, out + j, columns);
        if (!rounded) panel_product<true, Runs>(split + kPart, panel, units, true, out + j, columns);
        continue;
      }
      const float* rest = is_bfloat16(values) ? nullptr : low + j * (kTile / 2);
      if (rounded) {
        tile_product(split, panel, units, sum, kPanelColumns, nullptr, 0, rest);
      } else {
        tile_product<2>(split, panel, units, sum, kPanelColumns, nullptr, kPart, rest);
      }
      add_part(sum, out + j, columns);
    }
  }
}

}  // namespace acqcore::ACQCORE_ISA
