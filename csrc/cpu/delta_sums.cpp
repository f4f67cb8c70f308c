// Row statistics, and sums over the vocabulary of factors exp(z_v - m) cap'_v without the target's: times W_v, from which
// dL/dh follows (attention with the vocabulary as keys and values), and by hashed place, from which a sketch of delta
// follows; and Gram matrices of the factors of samples (gram.h). The logits are never materialized.
//
// For each tile of the vocabulary a block folds the logits and adds their factors to its sums (values.h, places.h) and
// to the Grams of its samples, which are rescaled when a row's reference rises. No other block has rows of its samples.
#include "delta.h"
#include "factors.h"
#include "isa.h"
#include "places.h"
#include "samples.h"
#include "tasks.h"
#include "values.h"

namespace acqcore::ACQCORE_ISA {
namespace {

constexpr int64_t kBlockRows = (kHasTiles ? 128 : 64) * kVectorRows;  // maximum; a tile is packed once per block

// Per-thread scratch.
struct Workspace {
  float* hidden;      // [block_rows / kPanelRows, units, kPanelRows]
  float* weights;     // [kTile / kPanelColumns, depth, kPanelColumns]
  float* values;      // [columns / kPanelColumns, kTile, kPanelColumns]
  float* factors;     // [block_rows + kPackedSide, kTile]
  float* scale;       // [block_rows + kPackedSide], by which rows were rescaled
  float* split;       // [2, kTile / 2, kPanelRows], or GramLayout::scratch
  float* grams;       // of the block's samples
  double* unscale;    // [block_rows], of the Grams' factors: 2^-40
  FoldedRows folded;  // of block_rows
};

// A task: rows [begin, end) of the scored ones.
struct Block {
  int64_t begin, end;
  int64_t sample_begin, sample_end;
};

// Sizes of a workspace.
struct Limits {
  int64_t rows = 0, grams = 0, scratch = 0;
};

// Divides the scored rows into blocks of whole samples and, unless a sample is longer, at most `most` rows.
Limits cut(int64_t scored, int64_t most, Sample* samples, int64_t sample_count, bool pairs, Block* blocks,
           int64_t* block_count) {
  Limits limits;
  Block block{};
  int64_t next = 0, grams = 0;  // sample; elements of the block's Grams
  *block_count = 0;
  const auto close = [&]() {
    if (block.end == block.begin) return;
    blocks[(*block_count)++] = block;
    limits.rows = greater(limits.rows, ceil_div(block.end - block.begin, kPanelRows) * kPanelRows);
    limits.grams = greater(limits.grams, grams);
    block = {block.end, block.end, next, next};
    grams = 0;
  };
  for (int64_t row = 0; row < scored;) {
    const bool of_sample = next < sample_count && samples[next].begin == row;
    const int64_t bound = next < sample_count ? samples[next].begin : scored;
    const int64_t end = of_sample ? samples[next].end : lesser(row + kPanelRows, bound);
    if (end - block.begin > most) close();
    if (of_sample) {
      const GramLayout layout(end - row, pairs);
      samples[next].gram = grams;
      grams += layout.elements();
      limits.scratch = greater(limits.scratch, layout.scratch());
      block.sample_end = ++next;
    }
    block.end = row = end;
  }
  close();
  return limits;
}

// Adds a tile of the vocabulary to the sums of a block; `whole` is count rounded up to whole panels. In bfloat16 the
// packed weights and values of a tile fit into L2 together, so a panel's factors are used while they are in L1: 8 %
// faster on a Xeon.
void add_tile(const DeltaSumsArgs& args, const Inner& inner, const Transform& transform, const Sample* samples,
              const Block& block, int64_t whole, int64_t tile, int width, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const FoldedRows& folded = ws.folded;
  const RowSums& values = folded.values;
  const bool by_panels = kHasTiles && inner.pairs && args.values, has_grams = block.sample_end > block.sample_begin;
  const bool kept = (args.values && !by_panels) || has_grams || inner.depth < inner.units;
  const int64_t stride = kept ? kTile : 0;
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
        ws.scale[i] = fold_row(head, transform, folded, i, tile, width, z);
        if (args.hashed) add_rotated(args.places + tile, z, width, folded.hashed.of(i));
      }
      if (by_panels) add_values(head.weight, factors, kPanelRows, width, ws.values, ws.split, values.of(row));
    }
  }
  if (args.values && !by_panels) {
    pack_values(head.weight, tile, width, ws.values);
    add_values(head.weight, ws.factors, whole, width, ws.values, ws.split, values.sums);
  }
  for (int64_t s = block.sample_begin; s < block.sample_end; ++s) {
    const GramLayout layout(samples[s].end - samples[s].begin, inner.pairs);
    const int64_t first = samples[s].begin - block.begin;
    add_tile_to_gram(samples[s], layout, ws.factors + first * kTile, ws.scale + first, tile, width,
                     ws.grams + samples[s].gram, ws.split);
  }
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
void run_block(const DeltaSumsArgs& args, const Inner& inner, const Transform& transform, const Sample* samples,
               const Block& block, const int64_t* scored, const Limits& limits, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const FoldedRows& folded = ws.folded;
  const int64_t whole = pack_block(head, inner, folded.rows, folded.count, ws.hidden);
  memset(folded.values.sums, 0, 4 * whole * folded.values.columns);
  memset(folded.hashed.sums, 0, 4 * folded.count * folded.hashed.columns);
  memset(ws.grams, 0, 4 * limits.grams);
  fold_block(head, folded, args.state, args.index, [&](int64_t tile, int width) {
    add_tile(args, inner, transform, samples, block, whole, tile, width, ws);
  });
  for (int64_t i = 0; i < folded.count; ++i) {
    for (int64_t j = 0; args.values && j < head.weight.columns; ++j) {
      args.values[folded.rows[i] * head.weight.columns + j] = folded.values.of(i)[j] * 0x1p-40f;
    }
    if (args.hashed) finish_hash(args, transform, folded, i);
  }
  for (int64_t s = block.sample_begin; s < block.sample_end; ++s) {
    const GramLayout layout(samples[s].end - samples[s].begin, inner.pairs);
    for (int64_t i = 0; i < layout.rows; ++i) ws.unscale[i] = 0x1p-40;
    write_products(args.gram, samples[s], layout, scored, 1, ws.grams, 0, ws.unscale);
  }
}

}  // namespace

bool delta_sums(const DeltaSumsArgs& args) {
  const HeadArgs& head = args.head;
  const int64_t n = head.hidden.rows, depth = head.weight.columns;
  Scratch row_scratch(8 * n), special_scratch(8 * n), sample_scratch(args.gram.samples * int64_t(sizeof(Sample)));
  Scratch block_scratch(n * int64_t(sizeof(Block)));
  if (row_scratch.missing() || special_scratch.missing() || sample_scratch.missing() || block_scratch.missing()) {
    return false;
  }
  int64_t* rows = row_scratch.as<int64_t>();
  Sample* samples = sample_scratch.as<Sample>();
  Block* blocks = block_scratch.as<Block>();
  const auto ignored = [&](int64_t i) {
    write_state(nullptr, i, n, args.state, args.index);
    if (args.values) memset(args.values + i * depth, 0, 4 * depth);
    if (args.hashed) memset(args.hashed + i * args.columns, 0, 4 * args.columns);
  };
  const Listed listed = list_samples(head, args.gram, rows, special_scratch.as<int64_t>(), samples, ignored);
  if (listed.rows == 0) return true;

  const Inner inner = inner_dimension(head);
  const Transform transform(head);
  const int64_t most = rows_of_block(head, listed.rows, kBlockRows);
  int64_t count;
  const Limits limits = cut(listed.rows, most, samples, listed.samples, inner.pairs, blocks, &count);
  const int64_t columns = args.values ? value_columns(depth) : 0, places = args.hashed ? args.columns : 0;
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(limits.rows * inner.units),
                     arena.take<float>(kTile * inner.depth),
                     arena.take<float>(kTile * columns),
                     arena.take<float>((limits.rows + kPackedSide) * kTile),
                     arena.take<float>(limits.rows + kPackedSide),
                     arena.take<float>(greater(kTile * kPanelRows, limits.scratch)),
                     arena.take<float>(limits.grams),
                     arena.take<double>(limits.rows),
                     {nullptr,
                      0,
                      {columns, arena.take<float>(limits.rows * columns)},
                      {places, arena.take<float>(limits.rows * places)},
                      arena.take<float>(limits.rows),
                      arena.take<LaneState>(limits.rows),
                      arena.take<RowState>(limits.rows)}};
  };
  return run_tasks(head.threads, count, carve, [&](int64_t task, Workspace ws) {
    const Block& block = blocks[task];
    ws.folded.rows = rows + block.begin;
    ws.folded.count = block.end - block.begin;
    run_block(args, inner, transform, samples, block, rows, limits, ws);
  });
}

}  // namespace acqcore::ACQCORE_ISA
