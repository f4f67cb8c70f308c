// Row statistics of softmax(head(hidden)), with optional Gram matrices of samples. One loop multiplies and folds tiles,
// so the logits never leave the cache.
//
// The vocabulary is divided into splits, and splits into tiles. A task is a block of rows times a slot of adjacent
// splits: for each tile the thread packs the weights once (L2), multiplies every row panel by them and folds the logits
// while they are in L1. For rows of a sample with a Gram matrix, the fold keeps its factors, and the sample's last row
// adds the tile to the slot's Gram (gram.h). Draws of block dropout are folded beside their row, from the same products
// (blocks.h). Splits and slots are merged in order. They depend on V alone and a sample lies within one block, so results
// do not depend on other rows, other samples or the number of threads.
// Measured on an AMD EPYC (Zen 5, 2 cores, N=4096, D=576, V=49152): the product alone runs at 490 GFLOP/s in float32
// and 970 in bfloat16. The BLAS of torch 2.13 reaches 200 and rounds bfloat16 results, hence the custom product. The
// fold adds 5 %.
#include "blocks.h"
#include "factors.h"
#include "isa.h"
#include "mixture.h"
#include "parallel.h"
#include "samples.h"
#include "tile.h"

namespace acqcore::ACQCORE_ISA {
namespace {

constexpr int64_t kGramSlots = 8;           // bounds the memory of the Grams
constexpr int64_t kPackedBytes = 16 << 20;  // limit on packed hidden states
constexpr int64_t kGramBytes = 24 << 20;    // limit on the Grams of all slots, unless one sample exceeds it
constexpr int64_t kMaxRows = 4096 / kPanelRows * kPanelRows;

// Rows of a task. No other block shares their panels or samples.
struct Block {
  int64_t begin, end;             // among the scored rows
  int64_t panel;                  // its first panel in the chunk
  int64_t sample_begin, sample_end;
};

// Blocks whose hidden states are packed together.
struct Chunk {
  int64_t begin = 0, end = 0;    // blocks
  int64_t rows = 0, panels = 0;
  int64_t grams = 0;             // elements in a slot's Grams
};

struct Plan {
  Inner inner;
  Blocks blocks;        // of columns that drop together, if there are draws
  int64_t planes;       // logits per row and column: the row's own, and each draw's
  bool deep;            // a tile's logits are complete only after several loops over the rows
  int64_t columns;      // per split
  int64_t splits;
  int64_t slots;
  int64_t slot_splits;  // splits per slot
  int64_t chunk_rows;   // maximum, unless a sample is longer
  int64_t block_rows;   // target
};

Plan make_plan(const RowStatsArgs& args, int64_t scored) {
  Plan p;
  const BlockDraws& drawn = args.drawn;
  p.blocks = drawn.draws ? divide(args.head, drawn.dropout) : Blocks{};
  p.inner = drawn.draws ? p.blocks.inner : inner_dimension(args.head);
  p.planes = 1 + drawn.draws;
  p.deep = p.inner.depth < p.inner.units;
  const int64_t tiles = ceil_div(args.head.weight.rows, kTile);
  p.columns = ceil_div(tiles, kMaxSplits) * kTile;
  p.splits = ceil_div(args.head.weight.rows, p.columns);
  p.slot_splits = args.gram.samples ? ceil_div(p.splits, kGramSlots) : 1;
  p.slots = ceil_div(p.splits, p.slot_splits);
  int64_t fitting = kPackedBytes / (4 * greater(1, p.inner.units));
  if (drawn.draws) fitting = lesser(fitting, kStateBytes / (int64_t(sizeof(RowState)) * drawn.draws * p.splits));
  fitting = fitting / kPanelRows * kPanelRows;
  const int64_t needed = ceil_div(scored, kPanelRows) * kPanelRows;
  p.chunk_rows = lesser(needed, lesser(kMaxRows, greater(kPanelRows, fitting)));
  // Split the rows too if the slots yield fewer than four tasks per thread.
  const int64_t blocks = greater(1, ceil_div(4 * args.head.threads, p.slots));
  p.block_rows = ceil_div(ceil_div(p.chunk_rows, blocks), kPanelRows) * kPanelRows;
  if (drawn.draws && p.deep) {
    const int64_t waiting = kBufferBytes / (4 * kTile * p.planes) / kPanelRows * kPanelRows;
    p.block_rows = lesser(p.block_rows, greater(kPanelRows, waiting));
  }
  return p;
}

// Numbers of blocks and chunks, and the maximum sizes of both.
struct Limits {
  int64_t blocks = 0, chunks = 0;
  int64_t chunk_rows = 0, chunk_panels = 0, chunk_grams = 0, block_rows = 0, padded = 0, gram_scratch = 0;
};

// Divides the scored rows into blocks and the blocks into chunks; with null `blocks` and `chunks` it only counts.
Limits cut(const Plan& plan, int64_t scored, Sample* samples, int64_t sample_count, Block* blocks, Chunk* chunks) {
  Limits limits;
  Block block{};
  Chunk chunk;
  const auto close_block = [&]() {
    if (block.end == block.begin) return;
    const int64_t rows = block.end - block.begin;
    block.panel = chunk.panels;
    if (blocks) blocks[limits.blocks] = block;
    ++limits.blocks;
    chunk.rows += rows;
    chunk.panels += ceil_div(rows, kPanelRows);
    limits.block_rows = greater(limits.block_rows, rows);
    block = {block.end, block.end, 0, block.sample_end, block.sample_end};
  };
  const auto close_chunk = [&]() {
    close_block();
    chunk.end = limits.blocks;
    if (chunk.end == chunk.begin) return;
    if (chunks) chunks[limits.chunks] = chunk;
    ++limits.chunks;
    limits.chunk_rows = greater(limits.chunk_rows, chunk.rows);
    limits.chunk_panels = greater(limits.chunk_panels, chunk.panels);
    limits.chunk_grams = greater(limits.chunk_grams, chunk.grams);
    chunk = {};
    chunk.begin = chunk.end = limits.blocks;
  };
  int64_t next = 0;  // sample
  for (int64_t row = 0; row < scored;) {
    const bool of_sample = next < sample_count && samples[next].begin == row;
    const int64_t bound = next < sample_count ? samples[next].begin : scored;
    const int64_t end = of_sample ? samples[next].end : lesser(row + kPanelRows, bound);
    const GramLayout layout(of_sample ? end - row : 0, plan.inner.pairs);
    const int64_t gram = layout.elements();
    const bool chunk_full = chunk.rows + (end - block.begin) > plan.chunk_rows ||
                            (of_sample && 4 * plan.slots * (chunk.grams + gram) > kGramBytes);
    if (chunk_full) {
      close_chunk();
    } else if (end - block.begin > plan.block_rows) {
      close_block();
    }
    if (of_sample) {
      samples[next].gram = chunk.grams;
      chunk.grams += gram;
      limits.padded = greater(limits.padded, layout.padded);
      limits.gram_scratch = greater(limits.gram_scratch, layout.scratch());
      block.sample_end = ++next;
    }
    block.end = row = end;
  }
  close_chunk();
  return limits;
}

// Per-thread scratch.
struct Workspace {
  float* weights;     // [kTile / kPanelColumns, depth, kPanelColumns]
  float* logits;      // [block_rows, kPanelRows or 1, planes, kTile]
  float* partial;     // [depth / blocks.units, kPlane], with draws
  LaneState* lanes;   // [block_rows]
  LaneState* drawn;   // [block_rows, K]
  float* factors;     // [padded, kTile], of a sample
  float* scale;       // [padded], rescaling factors of its rows of the Gram
  float* split;       // [GramLayout::scratch]
};

// Data of a chunk that the threads share.
struct Shared {
  const int64_t* rows;  // numbers of the scored rows
  int64_t first;        // the chunk's first row among them
  float* hidden;        // [panels, units, kPanelRows]
  RowState* states;     // [splits, chunk_rows]
  bool* keep;           // [chunk_rows, K, blocks.count]
  RowState* drawn;      // [splits, chunk_rows, K]
  float* references;    // [slots, chunk_rows], reference maxima of the slot's Grams
  float* grams;         // [slots, chunk_grams]
};

// Folds a row's draws over a tile.
void fold_draws(const RowStatsArgs& args, const Transform& transform, float* z /* [K, kTile] */, int64_t tile, int width,
                int64_t target, LaneState* lanes /* [K] */) {
  const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
  for (int k = 0; k < args.drawn.draws; ++k, z += kTile) {
    transform(z, width, tile);
    if (target >= 0 && target < width) lanes[k].target = z[target];
    fold(z, n, args.head.vocab_start + tile, lanes[k]);
  }
}

void run_task(const RowStatsArgs& args, const Plan& plan, const Limits& limits, const Transform* transforms,
              const Sample* samples, const Block& block, int64_t slot, const Shared& shared, const Workspace& ws) {
  const HeadArgs& head = args.head;
  const int draws = args.drawn.draws;
  const int64_t* rows = shared.rows;
  const int64_t row_logits = draws && !plan.deep ? 0 : plan.planes * kTile;  // a row's draws are folded at once
  float* references = shared.references + slot * limits.chunk_rows - shared.first;
  float* grams = shared.grams + slot * limits.chunk_grams;
  for (int64_t s = block.sample_begin; s < block.sample_end; ++s) {
    const GramLayout layout(samples[s].end - samples[s].begin, plan.inner.pairs);
    memset(grams + samples[s].gram, 0, 4 * layout.elements());
    for (int64_t i = samples[s].begin; i < samples[s].end; ++i) references[i] = -INFINITY;
  }
  const float* hidden = shared.hidden + block.panel * kPanelRows * plan.inner.units;
  for (int64_t split = slot * plan.slot_splits; split < lesser((slot + 1) * plan.slot_splits, plan.splits); ++split) {
    const int64_t last = lesser((split + 1) * plan.columns, head.weight.rows);
    for (int64_t i = 0; i < block.end - block.begin; ++i) clear(ws.lanes[i]);
    for (int64_t i = 0; i < (block.end - block.begin) * draws; ++i) clear(ws.drawn[i]);
    for (int64_t tile = split * plan.columns; tile < last; tile += kTile) {
      const int width = static_cast<int>(lesser(kTile, last - tile));
      const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
      for (int64_t k0 = 0; k0 < plan.inner.units || k0 == 0; k0 += plan.inner.depth) {
        const int64_t k = lesser(plan.inner.depth, plan.inner.units - k0);
        const bool deepest = k0 + plan.inner.depth >= plan.inner.units;
        pack_weights(head.weight, plan.inner, tile, width, k0, k, ws.weights);
        int64_t s = block.sample_begin;
        for (int64_t row = block.begin; row < block.end; row += kPanelRows) {
          const float* a = hidden + (row - block.begin) * plan.inner.units + k0 * kPanelRows;
          float* logits = plan.deep ? ws.logits + (row - block.begin) * row_logits : ws.logits;
          if (draws) {
            multiply_blocks(plan.blocks, a, ws.weights, width, k, ws.partial);
          } else {
            multiply_panel(plan.inner, a, ws.weights, width, k, k0 > 0, logits);
            if (!deepest) continue;
          }
          for (int64_t i = row; i < lesser(row + kPanelRows, block.end); ++i) {
            float* z = logits + (i - row) * row_logits;
            if (draws) {
              const bool* keep = shared.keep + (i - shared.first) * draws * plan.blocks.count + k0 / plan.blocks.units;
              combine(ws.partial + (i - row) * kTile, ceil_div(k, plan.blocks.units), keep, plan.blocks.count, draws,
                      width, k0 > 0, z);
              if (!deepest) continue;
            }
            LaneState& lanes = ws.lanes[i - block.begin];
            transforms[0](z, width, tile);
            const int64_t target = head.targets ? head.targets[rows[i]] - head.vocab_start - tile : -1;
            if (target >= 0 && target < width) lanes.target = z[target];
            if (draws) {
              fold_draws(args, transforms[1], z + kTile, tile, width, target, ws.drawn + (i - block.begin) * draws);
            }
            if (s == block.sample_end || i < samples[s].begin) {
              fold(z, n, head.vocab_start + tile, lanes);
              continue;
            }
            const int64_t own = i - samples[s].begin;
            ws.scale[own] = fold_factors(transforms[0], z, n, head.vocab_start + tile, lanes, references[i],
                                         ws.factors + own * kTile);
            if (i + 1 == samples[s].end) {
              const GramLayout layout(samples[s].end - samples[s].begin, plan.inner.pairs);
              for (int64_t j = layout.rows; j < layout.padded; ++j) {
                ws.scale[j] = 1;
                memset(ws.factors + j * kTile, 0, 4 * n);
              }
              add_tile_to_gram(samples[s], layout, ws.factors, ws.scale, tile, width, grams + samples[s].gram, ws.split);
              ++s;
            }
          }
        }
      }
    }
    const int64_t first = split * limits.chunk_rows + block.begin - shared.first;
    for (int64_t i = 0; i < block.end - block.begin; ++i) shared.states[first + i] = reduce(ws.lanes[i]);
    for (int64_t i = 0; i < (block.end - block.begin) * draws; ++i) shared.drawn[first * draws + i] = reduce(ws.drawn[i]);
  }
}

// Merges the splits of a row and of its draws and writes their states.
void finish_row(const RowStatsArgs& args, const Plan& plan, const Limits& limits, const Shared& shared, int64_t row) {
  const int64_t n = args.head.hidden.rows, number = shared.rows[shared.first + row];
  const BlockDraws& drawn = args.drawn;
  const int64_t draws = drawn.draws;
  RowState& total = shared.states[row];
  RowState* states = shared.drawn + row * draws;
  for (int64_t split = 1; split < plan.splits; ++split) {
    const int64_t place = split * limits.chunk_rows + row;
    merge(total, shared.states[place]);
    for (int64_t k = 0; k < draws; ++k) merge(states[k], shared.drawn[place * draws + k]);
  }
  write_state(&total, number, n, args.state, args.index);
  if (draws) {
    Normaliser* norms = reinterpret_cast<Normaliser*>(drawn.norms) + number * draws;
    finish_draws(states, drawn.draws, number, n, norms, drawn.state, drawn.votes);
  }
}

// Merges a sample's slots, rebased to its rows' largest logits, and writes its matrix of products.
void finish_sample(const RowStatsArgs& args, const Plan& plan, const Limits& limits, const Sample& sample,
                   const Shared& shared, const RowState* totals /* of the chunk */, double* scale /* [slots, padded] */) {
  const GramLayout layout(sample.end - sample.begin, plan.inner.pairs);
  for (int64_t slot = 0; slot < plan.slots; ++slot) {
    const float* references = shared.references + slot * limits.chunk_rows - shared.first;
    for (int64_t i = 0; i < layout.rows; ++i) {
      const float reference = references[sample.begin + i];
      // Factors are scaled by 2^40.
      scale[slot * layout.padded + i] =
          reference == -INFINITY ? 0 : exp(double(reference) - totals[sample.begin + i - shared.first].max) * 0x1p-40;
    }
  }
  write_products(args.gram, sample, layout, shared.rows, plan.slots, shared.grams, limits.chunk_grams, scale);
}

}  // namespace

bool row_stats(const RowStatsArgs& args) {
  const HeadArgs& head = args.head;
  const GramArgs& gram = args.gram;
  const int64_t n = head.hidden.rows;
  Scratch row_scratch(8 * n), special_scratch(8 * n), sample_scratch(gram.samples * int64_t(sizeof(Sample)));
  if (row_scratch.missing() || special_scratch.missing() || sample_scratch.missing()) return false;
  int64_t* rows = row_scratch.as<int64_t>();
  int64_t* specials = special_scratch.as<int64_t>();
  Sample* samples = sample_scratch.as<Sample>();
  const Listed listed = list_samples(head, gram, rows, specials, samples, [&](int64_t i) {
    write_state(nullptr, i, n, args.state, args.index);
  });
  const int64_t scored = listed.rows, sample_count = listed.samples;
  if (scored == 0) return true;

  const Plan plan = make_plan(args, scored);
  const int draws = args.drawn.draws;
  const Transform transforms[] = {Transform(head), Transform(head, draws ? args.drawn.dropout.inverse_keep : 1.0f)};
  const Limits limits = cut(plan, scored, samples, sample_count, nullptr, nullptr);
  Scratch block_scratch(limits.blocks * int64_t(sizeof(Block))), chunk_list(limits.chunks * int64_t(sizeof(Chunk)));
  const int64_t logit_rows = plan.deep ? limits.block_rows + kPanelRows : draws ? 1 : kPanelRows;
  const int64_t partials = draws ? plan.inner.depth / plan.blocks.units : 0;
  const auto carve = [&](Arena& arena) {
    return Workspace{arena.take<float>(kTile * plan.inner.depth), arena.take<float>(logit_rows * plan.planes * kTile),
                     arena.take<float>(partials * kPlane), arena.take<LaneState>(limits.block_rows),
                     arena.take<LaneState>(limits.block_rows * draws), arena.take<float>(limits.padded * kTile),
                     arena.take<float>(limits.padded), arena.take<float>(limits.gram_scratch)};
  };
  Shared shared{};
  const auto carve_chunk = [&](Arena& arena) {
    shared.hidden = arena.take<float>(limits.chunk_panels * kPanelRows * plan.inner.units);
    shared.states = arena.take<RowState>(plan.splits * limits.chunk_rows);
    shared.keep = arena.take<bool>(limits.chunk_rows * draws * plan.blocks.count);
    shared.drawn = arena.take<RowState>(plan.splits * limits.chunk_rows * draws);
    shared.references = arena.take<float>(limits.padded ? plan.slots * limits.chunk_rows : 0);
    shared.grams = arena.take<float>(plan.slots * limits.chunk_grams);
  };
  Arena layout(nullptr), chunk_layout(nullptr);
  carve(layout);
  layout.take<double>(plan.slots * limits.padded);
  carve_chunk(chunk_layout);
  Scratch thread_scratch(head.threads * layout.used()), chunk_scratch(chunk_layout.used());
  if (block_scratch.missing() || chunk_list.missing() || thread_scratch.missing() || chunk_scratch.missing()) {
    return false;
  }
  Block* blocks = block_scratch.as<Block>();
  Chunk* chunks = chunk_list.as<Chunk>();
  cut(plan, scored, samples, sample_count, blocks, chunks);
  Arena chunk_arena(chunk_scratch.as<char>());
  carve_chunk(chunk_arena);
  shared.rows = rows;

  for (int64_t c = 0; c < limits.chunks; ++c) {
    const Chunk& chunk = chunks[c];
    const int64_t block_count = chunk.end - chunk.begin;
    shared.first = blocks[chunk.begin].begin;
    const int64_t sample_begin = blocks[chunk.begin].sample_begin, sample_end = blocks[chunk.end - 1].sample_end;
#pragma omp parallel num_threads(head.threads)
    {
      const Tiles tiles;
      Arena arena(thread_scratch.as<char>() + thread_number() * layout.used());
      const Workspace ws = carve(arena);
      double* scale = arena.take<double>(plan.slots * limits.padded);
#pragma omp for
      for (int64_t p = 0; p < chunk.panels; ++p) {
        int64_t b = chunk.begin;
        while (b + 1 < chunk.end && blocks[b + 1].panel <= p) ++b;
        const int64_t row = blocks[b].begin + (p - blocks[b].panel) * kPanelRows;
        const int count = static_cast<int>(lesser(kPanelRows, blocks[b].end - row));
        pack_rows(head.hidden, rows + row, count, plan.inner.pairs, plan.inner.units,
                  shared.hidden + p * kPanelRows * plan.inner.units);
        for (int64_t i = row; draws && i < row + count; ++i) {
          keep_blocks(args.drawn.dropout, plan.blocks, rows[i], draws,
                      shared.keep + (i - shared.first) * draws * plan.blocks.count);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < block_count * plan.slots; ++task) {
        run_task(args, plan, limits, transforms, samples, blocks[chunk.begin + task % block_count], task / block_count,
                 shared, ws);
      }
#pragma omp for
      for (int64_t i = 0; i < chunk.rows; ++i) finish_row(args, plan, limits, shared, i);
#pragma omp for schedule(dynamic, 1)
      for (int64_t s = sample_begin; s < sample_end; ++s) {
        finish_sample(args, plan, limits, samples[s], shared, shared.states, scale);
      }
    }
  }
  return true;
}

}  // namespace acqcore::ACQCORE_ISA
