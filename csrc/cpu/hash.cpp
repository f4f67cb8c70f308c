// Rows hashed to places, one addition per entry: given rows, or rows of delta, without materializing the logits.
#include "delta.h"
#include "factors.h"
#include "isa.h"
#include "tasks.h"
#include "values.h"

namespace acqcore::ACQCORE_ISA {
namespace {

constexpr int64_t kBlockRows = 28 * kVectorRows;  // maximum: delta of 224 x 384 floats in L2

// Per-thread scratch.
struct Workspace {
  float* hidden;      // [block_rows / kPanelRows, units, kPanelRows]
  float* weights;     // [kTile, depth]
  float* delta;       // [block_rows, kTile]
  FoldedRows folded;  // of block_rows
  DeltaRow* rows;     // [block_rows]
};

// Adds each value of a row to its place in `out`, or subtracts it.
void add_places(const int32_t* places /* [width] */, const float* values /* [width] */, int64_t width, float* out) {
  for (int64_t v = 0; v < width; ++v) {
    const int32_t negative = places[v] >> 31;  // 0 or all ones
    uint32_t bits;
    memcpy(&bits, values + v, 4);
    out[places[v] ^ negative] += from_bits(bits ^ (uint32_t(negative) & 0x80000000u));
  }
}

// The same for places of which most follow each other, as those of rotated_places do.
void add_rotated(const int32_t* places /* [width] */, const float* values /* [width] */, int64_t width, float* out) {
  int64_t v = 0;
  for (; v + kLanes <= width; v += kLanes) {
    const int32_t first = places[v] ^ (places[v] >> 31), last = places[v + kLanes - 1] ^ (places[v + kLanes - 1] >> 31);
    if (last - first != kLanes - 1) {  // places start over in between
      add_places(places + v, values + v, kLanes, out);
      continue;
    }
    UintVec signs;
    memcpy(&signs, places + v, sizeof signs);
    const Vec signed_values = (Vec)((UintVec)load(values + v) ^ (signs & 0x80000000u));
    store(out + first, load(out + first) + signed_values);
  }
  add_places(places + v, values + v, width - v, out);
}

// One task: delta of rows whose state is known.
void hash_block(const DeltaHashArgs& args, const Inner& inner, const Transform& transform, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const FoldedRows& block = ws.folded;
  const int64_t whole = pack_block(head, inner, block.rows, block.count, ws.hidden);
  for (int64_t i = 0; i < whole; ++i) {
    ws.rows[i] = i < block.count ? delta_row(head, args.state, args.index, block.rows[i], 1.0) : padding_row();
  }
  for (int64_t tile = 0; tile < head.weight.rows; tile += kTile) {
    const int width = static_cast<int>(lesser(kTile, head.weight.rows - tile));
    delta_tile(head, inner, transform, ws.rows, whole, ws.hidden, tile, width, ws.weights, ws.delta);
    for (int64_t i = 0; i < block.count; ++i) {
      add_rotated(args.places + tile, ws.delta + i * kTile, width, block.sums + i * args.columns);
    }
  }
}

// One task: the state of rows, and their delta in the same visit of the weights, normalised at its end.
void fold_and_hash_block(const DeltaHashArgs& args, const Inner& inner, const Transform& transform,
                         const Workspace& ws) {
  const HeadArgs& head = args.head;
  const FoldedRows& block = ws.folded;
  const int64_t whole = pack_block(head, inner, block.rows, block.count, ws.hidden);
  fold_block(head, block, args.state, args.index, [&](int64_t tile, int width) {
    multiply_tile(head, inner, ws.hidden, whole, tile, width, ws.weights, ws.delta);
    for (int64_t i = 0; i < block.count; ++i) {
      float* z = ws.delta + i * kTile;
      fold_row(head, transform, block, i, tile, width, z);
      add_rotated(args.places + tile, z, width, block.sums + i * args.columns);
    }
  });
  for (int64_t i = 0; i < block.count; ++i) {
    const DeltaRow row = delta_row(head, args.state, args.index, block.rows[i], 1.0);
    float* sums = block.sums + i * args.columns;
    for (int64_t j = 0; j < args.columns; ++j) sums[j] *= row.term;
    if (row.target < 0 || row.target >= head.weight.rows) continue;
    const float t = transform.capped ? block.states[i].target / transform.after : 0;
    const float at_target = row.at_target * row.slope * (1 - t * t);
    add_places(args.places + row.target, &at_target, 1, sums);
  }
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
  const int64_t n = head.hidden.rows, columns = args.columns;
  Scratch row_scratch(8 * n);
  if (row_scratch.missing()) return false;
  int64_t* rows = row_scratch.as<int64_t>();
  const int64_t scored = scored_rows(head, rows, [&](int64_t i) {
    if (args.fill) write_state(nullptr, i, n, args.state, args.index);
    memset(args.out + i * columns, 0, 4 * columns);
  });
  if (scored == 0) return true;

  const Inner inner = inner_dimension(head);
  const Transform transform(head);
  const int64_t block = rows_of_block(head, scored, kBlockRows);
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(block * inner.units), arena.take<float>(kTile * inner.depth),
                     arena.take<float>(block * kTile), take_folded_rows(arena, block, columns),
                     arena.take<DeltaRow>(block)};
  };
  return run_tasks(head.threads, ceil_div(scored, block), carve, [&](int64_t task, Workspace ws) {
    FoldedRows& folded = ws.folded;
    folded.rows = rows + task * block;
    folded.count = lesser(block, scored - task * block);
    memset(folded.sums, 0, 4 * folded.count * columns);
    (args.fill ? fold_and_hash_block : hash_block)(args, inner, transform, ws);
    for (int64_t i = 0; i < folded.count; ++i) {
      memcpy(args.out + folded.rows[i] * columns, folded.sums + i * columns, 4 * columns);
    }
  });
}

}  // namespace acqcore::ACQCORE_ISA
