// Blocks of rows, and sums of their factors times the rows of a matrix: what delta values, dL/dh and random cotangents
// have in common. A task is a block; tile by tile of the vocabulary it forms factors (L2) and adds them times the tile's
// values to its sums, which stay in its scratch. Rows do not depend on the other rows of the batch.
#pragma once
#include "load.h"
#include "parallel.h"
#include "tile.h"

namespace acqcore::ACQCORE_ISA {

// Numbers of the rows whose target is not -100, in order; calls ignored(row) for the others. Returns how many.
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

// Rows of a block: at most `most`, and two blocks for each thread.
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

// Tile registers multiply bfloat16 values as they are, factors as sums of two bfloat16.
inline bool in_tiles(const Matrix& values) { return kHasTiles && values.dtype == DType::kBFloat16; }

inline int64_t value_columns(int64_t columns) { return ceil_div(columns, kPanelColumns) * kPanelColumns; }

// Values [tile, tile + width) as panels [columns / kPanelColumns, kTile, kPanelColumns], or half of it: pairs of rows.
inline void pack_values(const Matrix& values, int64_t tile, int width, float* out) {
  const int64_t columns = value_columns(values.columns);
  if (in_tiles(values)) {
    const int64_t units = ceil_div(width, 2 * kTileUnits) * kTileUnits;
    uint16_t first[kPanelColumns], second[kPanelColumns];
    for (int64_t j = 0; j < columns; j += kPanelColumns) {
      for (int64_t u = 0; u < units; ++u) {
        load_bits(values, tile + 2 * u, 2 * u < width, j, kPanelColumns, first);
        load_bits(values, tile + 2 * u + 1, 2 * u + 1 < width, j, kPanelColumns, second);
        float* row = out + j * (kTile / 2) + u * kPanelColumns;
        for (int i = 0; i < kPanelColumns; ++i) row[i] = from_bits(first[i] | uint32_t(second[i]) << 16);
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
// panels. `split` has room for [2, kTile / 2, kPanelRows]. Tile registers round factors to one bfloat16 if `rounded`.
inline void add_values(const Matrix& values, const float* factors /* [rows, kTile] */, int64_t rows, int width,
                       const float* packed, float* split, float* sums, bool rounded = false) {
  const int64_t columns = value_columns(values.columns);
  constexpr int64_t kPart = kTile / 2 * kPanelRows;
  const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
  const int64_t units = ceil_div(n, 2 * kTileUnits) * kTileUnits;
  for (int64_t row = 0; row < rows; row += kPanelRows) {
    const float* of_rows = factors + row * kTile;
    float* out = sums + row * columns;
    if (in_tiles(values) && rounded) {
      round_panel(of_rows, kTile, n, split);
      for (int64_t j = 0; j < columns; j += kPanelColumns) {
        tile_product(split, packed + j * (kTile / 2), units, true, out + j, columns);
      }
    } else if (in_tiles(values)) {
      split_panel(of_rows, kTile, n, split, split + kPart);
      for (int64_t j = 0; j < columns; j += kPanelColumns) {
        tile_product<2>(split, packed + j * (kTile / 2), units, true, out + j, columns, kPart);
      }
    } else {
      for (int64_t j = 0; j < columns; j += kPanelColumns) {
        panel_product<false, ByRows<kTile>>(of_rows, packed + j * kTile, width, true, out + j, columns);
      }
    }
  }
}

}  // namespace acqcore::ACQCORE_ISA
