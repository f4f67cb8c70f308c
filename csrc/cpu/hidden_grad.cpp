// Row statistics and sum_v exp(z_v - m) cap'_v W_v over all columns except the target, from which dL/dh follows:
// attention with the vocabulary as keys and values, without materializing the logits.
//
// For each tile of the vocabulary a block folds the logits and adds their factors times the weights to its sums
// (values.h); a row's sums are rescaled when its reference rises.
#include "factors.h"
#include "isa.h"
#include "tasks.h"
#include "values.h"

namespace acqcore::ACQCORE_ISA {
namespace {

constexpr int64_t kMaxSplits = 32;               // as in row_stats.cpp: float32 suffices for a split
constexpr int64_t kBlockRows = (kHasTiles ? 128 : 64) * kVectorRows;  // at most; a tile is packed once per block

// Per-thread scratch.
struct Workspace {
  float* hidden;      // [block_rows / kPanelRows, units, kPanelRows]
  float* weights;     // [kTile / kPanelColumns, depth, kPanelColumns]
  float* values;      // [columns / kPanelColumns, kTile, kPanelColumns]
  float* factors;     // [block_rows, kTile]
  float* split;       // [2, kTile / 2, kPanelRows]
  float* sums;        // [block_rows, columns]
  float* references;  // [block_rows]
  LaneState* lanes;   // [block_rows]
  RowState* states;   // [block_rows]
};

// Folds the logits z [kTile] of row i of a block and turns them into factors, in place; rescales the row's sums.
void fold_row(const HiddenGradArgs& args, const Transform& transform, const int64_t* rows, int64_t i, int64_t columns,
              int64_t tile, int width, float* z, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
  float copy[kTile];  // the logits, needed for the cap's derivative
  transform(z, width, tile);
  const int64_t target = head.targets[rows[i]] - head.vocab_start - tile;
  const bool here = target >= 0 && target < width;
  if (here) ws.lanes[i].target = z[target];
  const float* logits = transform.capped ? static_cast<float*>(memcpy(copy, z, 4 * n)) : z;
  const float scale = fold_factors(transform, logits, n, head.vocab_start + tile, ws.lanes[i], ws.references[i], z);
  if (here) z[target] = 0;
  if (scale != 1) {
    float* sums = ws.sums + i * columns;
    for (int64_t j = 0; j < columns; ++j) sums[j] *= scale;
  }
}

// Adds a tile of the vocabulary to the sums of a block; `whole` is count rounded up to whole panels. In bfloat16 the
// packed weights and values of a tile fit into L2 together, so a panel's factors are used while they are in L1: 8 %
// faster on a Xeon.
void add_tile(const HiddenGradArgs& args, const Inner& inner, const Transform& transform, const int64_t* rows,
              int64_t count, int64_t whole, int64_t columns, int64_t tile, int width, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const bool by_panels = kHasTiles && inner.pairs;
  const int64_t stride = by_panels && inner.depth >= inner.units ? 0 : kTile;
  if (by_panels) pack_values(head.weight, tile, width, ws.values);
  for (int64_t k0 = 0; k0 < inner.units || k0 == 0; k0 += inner.depth) {
    const int64_t k = lesser(inner.depth, inner.units - k0);
    pack_weights(head.weight, inner, tile, width, k0, k, ws.weights);
    for (int64_t row = 0; row < whole; row += kPanelRows) {
      float* factors = ws.factors + row * stride;
      multiply_panel(inner, ws.hidden + row * inner.units + k0 * kPanelRows, ws.weights, width, k, k0 > 0, factors);
      if (k0 + inner.depth < inner.units) continue;
      float* sums = ws.sums + row * columns;
      for (int64_t i = row; i < lesser(row + kPanelRows, count); ++i) {
        for (int64_t j = 0; by_panels && j < columns; j += 16) fetch(sums + (i - row) * columns + j);
        fold_row(args, transform, rows, i, columns, tile, width, factors + (i - row) * kTile, ws);
      }
      if (by_panels) add_values(head.weight, factors, kPanelRows, width, ws.values, ws.split, sums);
    }
  }
  if (by_panels) return;
  pack_values(head.weight, tile, width, ws.values);
  add_values(head.weight, ws.factors, whole, width, ws.values, ws.split, ws.sums);
}

// Runs one task of `count` rows.
void run_block(const HiddenGradArgs& args, const Inner& inner, const Transform& transform, const int64_t* rows,
               int64_t count, int64_t columns, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const int64_t whole = pack_block(head, inner, rows, count, ws.hidden);
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
      add_tile(args, inner, transform, rows, count, whole, columns, tile, width, ws);
    }
    for (int64_t i = 0; i < count; ++i) merge(ws.states[i], reduce(ws.lanes[i]));
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
  const int64_t scored = scored_rows(head, rows, [&](int64_t i) {
    write_state(nullptr, i, n, args.state, args.index);
    memset(args.out + i * depth, 0, 4 * depth);
  });
  if (scored == 0) return true;

  const Inner inner = inner_dimension(head);
  const Transform transform(head);
  const int64_t columns = value_columns(depth), block = rows_of_block(head, scored, kBlockRows);
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(block * inner.units), arena.take<float>(kTile * inner.depth),
                     arena.take<float>(kTile * columns),     arena.take<float>(block * kTile),
                     arena.take<float>(kTile * kPanelRows),  arena.take<float>(block * columns),
                     arena.take<float>(block),               arena.take<LaneState>(block),
                     arena.take<RowState>(block)};
  };
  return run_tasks(head.threads, ceil_div(scored, block), carve, [&](int64_t task, const Workspace& ws) {
    const int64_t begin = task * block, count = lesser(block, scored - begin);
    run_block(args, inner, transform, rows + begin, count, columns, ws);
  });
}

}  // namespace acqcore::ACQCORE_ISA
