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
void add_tile(const HeadArgs& head, const Inner& inner, const Transform& transform, int64_t whole, int64_t tile,
              int width, const Workspace& ws) {
  const FoldedRows& folded = ws.folded;
  const int64_t columns = folded.columns;
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
      float* sums = folded.sums + row * columns;
      for (int64_t i = row; i < lesser(row + kPanelRows, folded.count); ++i) {
        for (int64_t j = 0; by_panels && j < columns; j += 16) fetch(sums + (i - row) * columns + j);
        fold_row(head, transform, folded, i, tile, width, factors + (i - row) * kTile);
      }
      if (by_panels) add_values(head.weight, factors, kPanelRows, width, ws.values, ws.split, sums);
    }
  }
  if (by_panels) return;
  pack_values(head.weight, tile, width, ws.values);
  add_values(head.weight, ws.factors, whole, width, ws.values, ws.split, folded.sums);
}

// Runs one task.
void run_block(const HiddenGradArgs& args, const Inner& inner, const Transform& transform, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const FoldedRows& folded = ws.folded;
  const int64_t whole = pack_block(head, inner, folded.rows, folded.count, ws.hidden);
  memset(folded.sums, 0, 4 * whole * folded.columns);
  fold_block(head, folded, args.state, args.index, [&](int64_t tile, int width) {
    add_tile(head, inner, transform, whole, tile, width, ws);
  });
  for (int64_t i = 0; i < folded.count; ++i) {
    float* out = args.out + folded.rows[i] * head.weight.columns;
    for (int64_t j = 0; j < head.weight.columns; ++j) out[j] = folded.sums[i * folded.columns + j] * 0x1p-40f;
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
                     arena.take<float>(kTile * kPanelRows),  take_folded_rows(arena, block, columns)};
  };
  return run_tasks(head.threads, ceil_div(scored, block), carve, [&](int64_t task, Workspace ws) {
    ws.folded.rows = rows + task * block;
    ws.folded.count = lesser(block, scored - task * block);
    run_block(args, inner, transform, ws);
  });
}

}  // namespace acqcore::ACQCORE_ISA
