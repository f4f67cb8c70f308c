// Rows hashed to places, one addition per entry: given rows, or rows of delta, without materializing the logits.
#include "delta.h"
#include "isa.h"
#include "places.h"
#include "tasks.h"
#include "values.h"

namespace acqcore::ACQCORE_ISA {
namespace {

constexpr int64_t kBlockRows = 28 * kVectorRows;  // maximum: delta of 224 x 384 floats in L2

// Per-thread scratch.
struct Workspace {
  float* hidden;   // [block_rows / kPanelRows, units, kPanelRows]
  float* weights;  // [kTile, depth]
  float* delta;    // [block_rows, kTile]
  float* sums;     // [block_rows, columns]
  DeltaRow* rows;  // [block_rows]
};

// Runs one task.
void hash_block(const DeltaHashArgs& args, const Inner& inner, const Transform& transform, const int64_t* rows,
                int64_t count, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const int64_t whole = pack_block(head, inner, rows, count, ws.hidden), columns = args.columns;
  for (int64_t i = 0; i < whole; ++i) {
    ws.rows[i] = i < count ? delta_row(head, args.state, args.index, rows[i], 1.0) : padding_row();
  }
  memset(ws.sums, 0, 4 * count * columns);
  for (int64_t tile = 0; tile < head.weight.rows; tile += kTile) {
    const int width = static_cast<int>(lesser(kTile, head.weight.rows - tile));
    delta_tile(head, inner, transform, ws.rows, whole, ws.hidden, tile, width, ws.weights, ws.delta);
    for (int64_t i = 0; i < count; ++i) {
      add_rotated(args.places + tile, ws.delta + i * kTile, width, ws.sums + i * columns);
    }
  }
  for (int64_t i = 0; i < count; ++i) memcpy(args.out + rows[i] * columns, ws.sums + i * columns, 4 * columns);
}

}  // namespace

bool hash_columns(const HashColumnsArgs& args) {
#pragma omp parallel for num_threads(args.threads) schedule(static)
  for (int64_t i = 0; i < args.rows; ++i) {
    float* out = args.out + i * args.dim;
    memset(out, 0, 4 * args.dim);
    add_places(args.places, args.values + i * args.columns, args.columns, out);
  }
  return true;
}

bool delta_hash(const DeltaHashArgs& args) {
  const HeadArgs& head = args.head;
  Scratch row_scratch(8 * head.hidden.rows);
  if (row_scratch.missing()) return false;
  int64_t* rows = row_scratch.as<int64_t>();
  const int64_t scored =
      scored_rows(head, rows, [&](int64_t i) { memset(args.out + i * args.columns, 0, 4 * args.columns); });
  if (scored == 0) return true;

  const Inner inner = inner_dimension(head);
  const Transform transform(head);
  const int64_t block = rows_of_block(head, scored, kBlockRows);
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(block * inner.units), arena.take<float>(kTile * inner.depth),
                     arena.take<float>(block * kTile), arena.take<float>(block * args.columns),
                     arena.take<DeltaRow>(block)};
  };
  return run_tasks(head.threads, ceil_div(scored, block), carve, [&](int64_t task, const Workspace& ws) {
    hash_block(args, inner, transform, rows + task * block, lesser(block, scored - task * block), ws);
  });
}

}  // namespace acqcore::ACQCORE_ISA
