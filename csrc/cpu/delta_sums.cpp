// Row statistics, and sums over the vocabulary of factors exp(z_v - m) cap'_v without the target's: times W_v, from which
// dL/dh follows (attention with the vocabulary as keys and values), and by hashed place, from which a sketch of delta
// follows. The logits are never materialized.
//
// For each tile of the vocabulary a block folds the logits and adds their factors to its sums (values.h, places.h); a
// row's sums are rescaled when its reference rises.
#include "delta.h"
#include "factors.h"
#include "isa.h"
#include "places.h"
#include "tasks.h"
#include "values.h"

namespace acqcore::ACQCORE_ISA {
namespace {

constexpr int64_t kBlockRows = (kHasTiles ? 128 : 64) * kVectorRows;  // at most; a tile is packed once per block

// Per-thread scratch.
struct Workspace {
  float* hidden;      // [block_rows / kPanelRows, units, kPanelRows]
  float* weights;     // [kTile / kPanelColumns, depth, kPanelColumns]
  float* values;      // [columns / kPanelColumns, kTile, kPanelColumns]
  float* factors;     // [block_rows, kTile]
  float* split;       // [2, kTile / 2, kPanelRows]
  FoldedRows folded;  // of block_rows
};

// Adds a tile of the vocabulary to the sums of a block; `whole` is count rounded up to whole panels. In bfloat16 the
// packed weights and values of a tile fit into L2 together, so a panel's factors are used while they are in L1: 8 %
// faster on a Xeon.
void add_tile(const DeltaSumsArgs& args, const Inner& inner, const Transform& transform, int64_t whole, int64_t tile,
              int width, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const FoldedRows& folded = ws.folded;
  const RowSums& values = folded.values;
  const bool by_panels = kHasTiles && inner.pairs && args.values;
  const int64_t stride = (by_panels || !args.values) && inner.depth >= inner.units ? 0 : kTile;
  if (by_panels) pack_values(head.weight, tile, width, ws.values);
  for (int64_t k0 = 0; k0 < inner.units || k0 == 0; k0 += inner.depth) {
    const int64_t k = lesser(inner.depth, inner.units - k0);
    pack_weights(head.weight, inner, tile, width, k0, k, ws.weights);
    for (int64_t row = 0; row < whole; row += kPanelRows) {
      float* factors = ws.factors + row * stride;
      multiply_panel(inner, ws.hidden + row * inner.units + k0 * kPanelRows, ws.weights, width, k, k0 > 0, factors);
      if (k0 + inner.depth < inner.units) continue;
      for (int64_t i = row; i < lesser(row + kPanelRows, folded.count); ++i) {
        for (int64_t j = 0; by_panels && j < values.columns; j += 16) fetch(values.of(i) + j);
        float* z = factors + (i - row) * kTile;
        fold_row(head, transform, folded, i, tile, width, z);
        if (args.hashed) add_rotated(args.places + tile, z, width, folded.hashed.of(i));
      }
      if (by_panels) add_values(head.weight, factors, kPanelRows, width, ws.values, ws.split, values.of(row));
    }
  }
  if (by_panels || !args.values) return;
  pack_values(head.weight, tile, width, ws.values);
  add_values(head.weight, ws.factors, whole, width, ws.values, ws.split, values.sums);
}

// Normalizes a row's hashed factors and adds the target's entry: hashed delta.
void finish_hash(const DeltaSumsArgs& args, const Transform& transform, const FoldedRows& folded, int64_t i) {
  const DeltaRow row = delta_row(args.head, args.state, args.index, folded.rows[i], 1.0);
  float* out = args.hashed + folded.rows[i] * args.columns;
  for (int64_t j = 0; j < args.columns; ++j) out[j] = folded.hashed.of(i)[j] * row.term;
  if (row.target < 0 || row.target >= args.head.weight.rows) return;
  const float t = transform.capped ? folded.states[i].target / transform.after : 0;
  const float at_target = row.at_target * row.slope * (1 - t * t);
  add_places(args.places + row.target, &at_target, 1, out);
}

// Runs one task.
void run_block(const DeltaSumsArgs& args, const Inner& inner, const Transform& transform, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const FoldedRows& folded = ws.folded;
  const int64_t whole = pack_block(head, inner, folded.rows, folded.count, ws.hidden);
  memset(folded.values.sums, 0, 4 * whole * folded.values.columns);
  memset(folded.hashed.sums, 0, 4 * folded.count * folded.hashed.columns);
  fold_block(head, folded, args.state, args.index, [&](int64_t tile, int width) {
    add_tile(args, inner, transform, whole, tile, width, ws);
  });
  for (int64_t i = 0; i < folded.count; ++i) {
    for (int64_t j = 0; args.values && j < head.weight.columns; ++j) {
      args.values[folded.rows[i] * head.weight.columns + j] = folded.values.of(i)[j] * 0x1p-40f;
    }
    if (args.hashed) finish_hash(args, transform, folded, i);
  }
}

}  // namespace

bool delta_sums(const DeltaSumsArgs& args) {
  const HeadArgs& head = args.head;
  const int64_t n = head.hidden.rows, depth = head.weight.columns;
  Scratch row_scratch(8 * n);
  if (row_scratch.missing()) return false;
  int64_t* rows = row_scratch.as<int64_t>();
  const int64_t scored = scored_rows(head, rows, [&](int64_t i) {
    write_state(nullptr, i, n, args.state, args.index);
    if (args.values) memset(args.values + i * depth, 0, 4 * depth);
    if (args.hashed) memset(args.hashed + i * args.columns, 0, 4 * args.columns);
  });
  if (scored == 0) return true;

  const Inner inner = inner_dimension(head);
  const Transform transform(head);
  const int64_t block = rows_of_block(head, scored, kBlockRows);
  const int64_t columns = args.values ? value_columns(depth) : 0, places = args.hashed ? args.columns : 0;
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(block * inner.units),
                     arena.take<float>(kTile * inner.depth),
                     arena.take<float>(kTile * columns),
                     arena.take<float>(block * kTile),
                     arena.take<float>(kTile * kPanelRows),
                     {nullptr,
                      0,
                      {columns, arena.take<float>(block * columns)},
                      {places, arena.take<float>(block * places)},
                      arena.take<float>(block),
                      arena.take<LaneState>(block),
                      arena.take<RowState>(block)}};
  };
  return run_tasks(head.threads, ceil_div(scored, block), carve, [&](int64_t task, Workspace ws) {
    ws.folded.rows = rows + task * block;
    ws.folded.count = lesser(block, scored - task * block);
    run_block(args, inner, transform, ws);
  });
}

}  // namespace acqcore::ACQCORE_ISA
