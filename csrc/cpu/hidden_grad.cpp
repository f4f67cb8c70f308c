// Row statistics and sum_v exp(z_v - m) cap'_v W_v over all columns but the target, from which dL/dh follows: attention
// with the vocabulary as keys and values, the logits never held.
//
// A task is a block of rows. For each tile of the vocabulary it folds the logits and keeps their factors (L2), then adds
// factors times the tile's weights to the block's sums, whose rows are rescaled when their reference rises. Rows do not
// depend on the other rows of the batch.
#include "factors.h"
#include "isa.h"
#include "parallel.h"

namespace acqcore::ACQCORE_ISA {
namespace {

constexpr int64_t kMaxSplits = 32;               // as in row_stats.cpp: float32 suffices for a split
constexpr int64_t kBlockRows = 64 * kVectorRows;  // at most; a tile's weights are packed once for them

// Scratch of one thread.
struct Workspace {
  float* hidden;      // [block_rows / kPanelRows, units, kPanelRows]
  float* weights;     // [kTile / kPanelColumns, depth, kPanelColumns]
  float* values;      // [columns / kPanelColumns, kTile, kPanelColumns], or half of it: pairs of rows
  float* factors;     // [block_rows, kTile]
  float* split;       // [2, kTile / 2, kPanelRows], factors as pairs of bfloat16
  float* sums;        // [block_rows, columns]
  float* references;  // [block_rows]
  LaneState* lanes;   // [block_rows]
  RowState* states;   // [block_rows]
};

// Logits of a tile -> factors, folded; `whole` rows are count rounded up to panels.
void fold_tile(const HiddenGradArgs& args, const Inner& inner, const Transform& transform, const int64_t* rows,
               int64_t count, int64_t whole, int64_t columns, int64_t tile, int width, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
  float copy[kTile];  // of a row's logits, which the cap's derivative takes
  for (int64_t k0 = 0; k0 < inner.units || k0 == 0; k0 += inner.depth) {
    const int64_t k = lesser(inner.depth, inner.units - k0);
    pack_weights(head.weight, inner, tile, width, k0, k, ws.weights);
    for (int64_t row = 0; row < whole; row += kPanelRows) {
      multiply_panel(inner, ws.hidden + row * inner.units + k0 * kPanelRows, ws.weights, width, k, k0 > 0,
                     ws.factors + row * kTile);
      if (k0 + inner.depth < inner.units) continue;
      for (int64_t i = row; i < lesser(row + kPanelRows, count); ++i) {
        float* z = ws.factors + i * kTile;
        transform(z, width, tile);
        const int64_t target = head.targets[rows[i]] - head.vocab_start - tile;
        const bool here = target >= 0 && target < width;
        if (here) ws.lanes[i].target = z[target];
        const float* logits = transform.capped ? static_cast<float*>(memcpy(copy, z, 4 * n)) : z;
        const float scale =
            fold_factors(transform, logits, n, head.vocab_start + tile, ws.lanes[i], ws.references[i], z);
        if (here) z[target] = 0;
        if (scale != 1) {
          float* sums = ws.sums + i * columns;
          for (int64_t j = 0; j < columns; ++j) sums[j] *= scale;
        }
      }
    }
  }
}

// The same by tile registers: weights as they are, factors as sums of two bfloat16.
void add_values_by_tiles(const Matrix& weight, int64_t whole, int64_t columns, int64_t tile, int width,
                         const Workspace& ws) {
  constexpr int64_t kPart = kTile / 2 * kPanelRows;
  const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
  const int64_t units = ceil_div(n, 2 * kTileUnits) * kTileUnits;
  uint16_t first[kPanelColumns], second[kPanelColumns];
  for (int64_t j = 0; j < columns; j += kPanelColumns) {
    for (int64_t u = 0; u < units; ++u) {
      load_bits(weight, tile + 2 * u, 2 * u < width, j, kPanelColumns, first);
      load_bits(weight, tile + 2 * u + 1, 2 * u + 1 < width, j, kPanelColumns, second);
      float* row = ws.values + j * (kTile / 2) + u * kPanelColumns;
      for (int i = 0; i < kPanelColumns; ++i) row[i] = from_bits(first[i] | uint32_t(second[i]) << 16);
    }
  }
  for (int64_t row = 0; row < whole; row += kPanelRows) {
    split_panel(ws.factors + row * kTile, kTile, n, ws.split, ws.split + kPart);
    for (int64_t j = 0; j < columns; j += kPanelColumns) {
      for (int part = 0; part < 2; ++part) {
        tile_product(ws.split + part * kPart, ws.values + j * (kTile / 2), units, true, ws.sums + row * columns + j,
                     columns);
      }
    }
  }
}

// Adds factors [count, width] times weights [tile, tile + width) to the sums.
void add_values(const HiddenGradArgs& args, int64_t whole, int64_t columns, int64_t tile, int width,
                const Workspace& ws) {
  const Matrix& weight = args.head.weight;
  if (kHasTiles) {
    add_values_by_tiles(weight, whole, columns, tile, width, ws);
    return;
  }
  for (int64_t j = 0; j < columns; j += kPanelColumns) {
    const int64_t present = lesser(kPanelColumns, weight.columns - j);
    for (int k = 0; k < width; ++k) {
      float* row = ws.values + j * kTile + k * kPanelColumns;
      load_floats(weight, tile + k, j, present, row);
      for (int64_t i = present; i < kPanelColumns; ++i) row[i] = 0;
    }
  }
  for (int64_t row = 0; row < whole; row += kPanelRows) {
    for (int64_t j = 0; j < columns; j += kPanelColumns) {
      panel_product<false, kTile, 1>(ws.factors + row * kTile, ws.values + j * kTile, width, true,
                                     ws.sums + row * columns + j, columns);
    }
  }
}

// One task: `count` rows.
void run_block(const HiddenGradArgs& args, const Inner& inner, const Transform& transform, const int64_t* rows,
               int64_t count, int64_t columns, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const int64_t whole = ceil_div(count, kPanelRows) * kPanelRows;
  for (int64_t i = 0; i < whole; i += kPanelRows) {
    pack_rows(head.hidden, rows + i, static_cast<int>(lesser(kPanelRows, count - i)), inner.pairs, inner.units,
              ws.hidden + i * inner.units);
  }
  for (int64_t i = 0; i < count; ++i) {
    clear(ws.states[i]);
    ws.references[i] = -INFINITY;
  }
  memset(ws.sums, 0, 4 * whole * columns);
  const int64_t tiles = ceil_div(head.weight.rows, kTile);
  const int64_t split_columns = ceil_div(tiles, kMaxSplits) * kTile;
  for (int64_t first = 0; first < head.weight.rows; first += split_columns) {
    const int64_t last = lesser(first + split_columns, head.weight.rows);
    for (int64_t i = 0; i < count; ++i) clear(ws.lanes[i]);
    for (int64_t tile = first; tile < last; tile += kTile) {
      const int width = static_cast<int>(lesser(kTile, last - tile));
      fold_tile(args, inner, transform, rows, count, whole, columns, tile, width, ws);
      add_values(args, whole, columns, tile, width, ws);
    }
    for (int64_t i = 0; i < count; ++i) {
      if (first == 0) {
        ws.states[i] = reduce(ws.lanes[i]);
      } else {
        merge(ws.states[i], reduce(ws.lanes[i]));
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    write_state(ws.states + i, rows[i], head.hidden.rows, args.state, args.index);
    float* out = args.out + rows[i] * head.weight.columns;
    for (int64_t j = 0; j < head.weight.columns; ++j) out[j] = ws.sums[i * columns + j] * 0x1p-40f;
  }
}

}  // namespace

bool hidden_grad(const HiddenGradArgs& args) {
  const HeadArgs& head = args.head;
  const int64_t n = head.hidden.rows, depth = head.weight.columns;
  Scratch row_scratch(8 * n);
  if (row_scratch.missing()) return false;
  int64_t* rows = row_scratch.as<int64_t>();
  int64_t scored = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (head.targets[i] != -100) {
      rows[scored++] = i;
    } else {
      write_state(nullptr, i, n, args.state, args.index);
      memset(args.out + i * depth, 0, 4 * depth);
    }
  }
  if (scored == 0) return true;

  const Inner inner = inner_dimension(head);
  const Transform transform(head);
  const int64_t columns = ceil_div(depth, kPanelColumns) * kPanelColumns;
  const int64_t even = ceil_div(ceil_div(scored, 2 * head.threads), kPanelRows) * kPanelRows;
  const int64_t block = lesser(kBlockRows, even);
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(block * inner.units), arena.take<float>(kTile * inner.depth),
                     arena.take<float>(kTile * columns),     arena.take<float>(block * kTile),
                     arena.take<float>(kTile * kPanelRows),  arena.take<float>(block * columns),
                     arena.take<float>(block),               arena.take<LaneState>(block),
                     arena.take<RowState>(block)};
  };
  Arena layout(nullptr);
  carve(layout);
  Scratch scratch(head.threads * layout.used());
  if (scratch.missing()) return false;

#pragma omp parallel for num_threads(head.threads) schedule(dynamic, 1)
  for (int64_t begin = 0; begin < scored; begin += block) {
    const Tiles tiles;
    Arena arena(scratch.as<char>() + thread_number() * layout.used());
    run_block(args, inner, transform, rows + begin, lesser(block, scored - begin), columns, carve(arena));
  }
  return true;
}

}  // namespace acqcore::ACQCORE_ISA
