// delta values: attention with the vocabulary as keys and the rows of `values` as values, the logits never held; or, where
// values are unit vectors with signs, delta hashed to places, an addition for each entry instead of a product.
//
// A task is a block of rows; for each tile of the vocabulary it forms delta (L2) and adds delta times the tile's values
// to the block's output, which stays in its scratch until the end. Rows do not depend on the other rows of the batch.
#include "delta.h"
#include "isa.h"
#include "parallel.h"

namespace acqcore::ACQCORE_ISA {
namespace {

constexpr int64_t kBlockRows = 28 * kVectorRows;  // at most: delta of 392 x 256 floats in L2

// Scratch of one thread.
struct Workspace {
  float* hidden;   // [block_rows / kPanelRows, units, kPanelRows]
  float* weights;  // [kTile, depth]
  float* delta;    // [block_rows, kTile]
  float* values;   // [columns / kPanelColumns, kTile, kPanelColumns]
  float* out;      // [block_rows, columns]
  DeltaRow* rows;  // [block_rows]
};

// Adds delta [count, width] times values [tile, tile + width) to ws.out [count, columns].
void add_values(const DeltaProductArgs& args, int64_t count, int64_t tile, int width, int64_t columns,
                const Workspace& ws) {
  for (int64_t j = 0; j < columns; j += kPanelColumns) {
    const int64_t present = lesser(kPanelColumns, args.values.columns - j);
    for (int k = 0; k < width; ++k) {
      float* row = ws.values + j * kTile + k * kPanelColumns;
      load_floats(args.values, tile + k, j, present, row);
      for (int64_t i = present; i < kPanelColumns; ++i) row[i] = 0;
    }
  }
  for (int64_t row = 0; row < count; row += kPanelRows) {
    for (int64_t j = 0; j < columns; j += kPanelColumns) {
      panel_product<false, kTile, 1>(ws.delta + row * kTile, ws.values + j * kTile, width, true,
                                     ws.out + row * columns + j, columns);
    }
  }
}

// Adds each entry of delta [count, width] to its place in ws.out [count, columns], or takes it off.
void add_places(const int32_t* places, int64_t count, int width, int64_t columns, const Workspace& ws) {
  for (int64_t i = 0; i < count; ++i) {
    const float* delta = ws.delta + i * kTile;
    float* out = ws.out + i * columns;
    for (int v = 0; v < width; ++v) {
      const int32_t negative = places[v] >> 31;  // 0 or all ones
      uint32_t bits;
      memcpy(&bits, delta + v, 4);
      out[places[v] ^ negative] += from_bits(bits ^ (uint32_t(negative) & 0x80000000u));
    }
  }
}

}  // namespace

bool delta_product(const DeltaProductArgs& args) {
  const HeadArgs& head = args.head;
  const int64_t n = head.hidden.rows, columns = args.columns;
  Scratch row_scratch(8 * n);
  if (row_scratch.missing()) return false;
  int64_t* rows = row_scratch.as<int64_t>();
  int64_t scored = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (head.targets[i] != -100) {
      rows[scored++] = i;
    } else {
      for (int64_t j = 0; j < columns; ++j) args.out[i * columns + j] = 0;
    }
  }
  if (scored == 0 || columns == 0) return true;

  const Inner inner = inner_dimension(head);
  const Transform transform(head);
  const int64_t padded = ceil_div(columns, kPanelColumns) * kPanelColumns;
  const int64_t even = ceil_div(ceil_div(scored, 2 * head.threads), kPanelRows) * kPanelRows;
  const int64_t block = lesser(kBlockRows, even);
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(block * inner.units), arena.take<float>(kTile * inner.depth),
                     arena.take<float>(block * kTile),       arena.take<float>(args.places ? 0 : kTile * padded),
                     arena.take<float>(block * padded),      arena.take<DeltaRow>(block)};
  };
  Arena layout(nullptr);
  carve(layout);
  Scratch scratch(head.threads * layout.used());
  if (scratch.missing()) return false;

#pragma omp parallel for num_threads(head.threads) schedule(dynamic, 1)
  for (int64_t begin = 0; begin < scored; begin += block) {
    const Tiles tiles;
    Arena arena(scratch.as<char>() + thread_number() * layout.used());
    const Workspace ws = carve(arena);
    const int64_t count = lesser(block, scored - begin);
    for (int64_t i = 0; i < count; i += kPanelRows) {
      pack_rows(head.hidden, rows + begin + i, static_cast<int>(lesser(kPanelRows, count - i)), inner.pairs,
                inner.units, ws.hidden + i * inner.units);
    }
    const int64_t whole = ceil_div(count, kPanelRows) * kPanelRows;
    for (int64_t i = 0; i < whole; ++i) {
      ws.rows[i] = i < count ? delta_row(head, args.state, args.index, rows[begin + i], 1.0) : padding_row();
    }
    for (int64_t i = 0; i < block * padded; ++i) ws.out[i] = 0;
    for (int64_t tile = 0; tile < head.weight.rows; tile += kTile) {
      const int width = static_cast<int>(lesser(kTile, head.weight.rows - tile));
      delta_tile(head, inner, transform, ws.rows, whole, ws.hidden, tile, width, ws.weights, ws.delta);
      if (args.places) {
        add_places(args.places + tile, count, width, padded, ws);
      } else {
        add_values(args, count, tile, width, padded, ws);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      memcpy(args.out + rows[begin + i] * columns, ws.out + i * padded, 4 * columns);
    }
  }
  return true;
}

}  // namespace acqcore::ACQCORE_ISA
